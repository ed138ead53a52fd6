"""A session without a sink: its length, its pace, its prompt; and the policy for signals."""

import itertools
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.models.aapt.camera import CRUISE
from aapt_deploy.models.aapt.prompts import parse, token_ids
from aapt_deploy.rollout.starts import Start, start
from aapt_deploy.stream import session as sessions
from aapt_deploy.stream.controls import Control
from aapt_deploy.stream.session import Session, stop_signals


class Fixed:
    """Controls that set one prompt per block, then keep the last."""

    def __init__(self, *prompts: str | None) -> None:
        self.prompts, self.asked = prompts, list[tuple[int, float]]()

    def at(self, block: int, seconds: float) -> Control:
        self.asked.append((block, seconds))
        return Control(CRUISE, self.prompts[min(block, len(self.prompts) - 1)])

    def close(self) -> None:
        pass


@pytest.fixture
def begin(bundle: Path) -> Start:
    return start(Bundle.open(bundle), None, None)


def blocks(*arguments: object) -> Iterator[np.ndarray]:
    """What a rollout yields: one frame, then four a block."""
    yield np.zeros((1, 2, 2, 3), np.uint8)
    for block in itertools.count(1):
        yield np.full((4, 2, 2, 3), block, np.uint8)


@pytest.mark.parametrize(("wanted", "sizes"), [(1, [1]), (2, [1, 1]), (5, [1, 4]), (6, [1, 4, 1])])
def test_a_session_has_as_many_frames_as_wanted(
    bundle: Path, begin: Start, monkeypatch: pytest.MonkeyPatch, wanted: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(sessions, "rollout", blocks)
    session = Session(Bundle.open(bundle).profile, begin, Fixed(None), print, wanted=wanted)
    assert [len(frames) for frames in session.frames({})] == sizes  # type: ignore[arg-type]
    assert (session.first_block_at > 0) is (wanted > 1)


def test_a_session_in_real_time_waits_for_each_block(
    bundle: Path, begin: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "rollout", blocks)
    session = Session(Bundle.open(bundle).profile, begin, Fixed(None), print, 0, 13, True)
    began = time.perf_counter()
    came = [time.perf_counter() - began for _ in session.frames({})]  # type: ignore[arg-type]
    assert came[0] < came[1] < came[2] < came[3]
    assert all(at >= due / 24 for at, due in zip(came, (0, 1, 5, 9), strict=True))


def test_the_newest_prompt_that_can_be_read_steers(bundle: Path, begin: Start) -> None:
    warnings: list[str] = []
    controls = Fixed(None, "night", "klingon", "klingon", "forest")
    session = Session(Bundle.open(bundle).profile, begin, controls, warnings.append)
    texts = [session.steer(block).text for block in range(5)]
    night, forest = token_ids(parse("night")), token_ids(parse("forest"))
    for text, expected in zip(texts, (begin.text, night, night, night, forest), strict=True):
        assert text is not None and expected is not None and np.array_equal(text, expected)
    assert len(warnings) == 1 and warnings[0].endswith("; the last prompt stays")
    assert controls.asked == [(block, block * 4 / 24) for block in range(5)]


def test_a_generator_without_text_ignores_prompts(bundle: Path, begin: Start) -> None:
    profile = Bundle.open(bundle).profile
    session = Session(profile, begin._replace(text=None), Fixed("klingon"), print)
    assert session.steer(0).text is None


# --- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_collected_and_the_second_interrupts(number: signal.Signals) -> None:
    with stop_signals() as caught:
        signal.raise_signal(number)
        assert caught == [number]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert caught == [number]


def test_a_signal_that_is_not_obeyed_in_time_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "GRACE_S", 0.05)
    began = time.perf_counter()
    with stop_signals():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            time.sleep(30)
    assert 0.05 <= time.perf_counter() - began < 10


def failing() -> None:
    with stop_signals():
        signal.raise_signal(signal.SIGTERM)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        raise ZeroDivisionError


def test_handlers_and_timer_are_restored_whatever_happens() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(ZeroDivisionError):
        failing()
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
