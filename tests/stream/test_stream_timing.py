"""When a stream shows its blocks, and the figures it reports.

The clock only moves when it is told to.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.models.aapt.camera import CRUISE, Velocity
from aapt_deploy.rollout.loop import Steering
from aapt_deploy.stream import session
from aapt_deploy.stream import stream as streams
from aapt_deploy.stream.stream import Request, Streamed, stream

OPEN_S = 5.0  # until the engines are open
BLOCK_S = 0.05  # until the next frames are made
FPS = 24


@dataclass
class Clock:
    """A clock, and what happened at which time."""

    now: float = 1000.0
    shown: list[tuple[float, int]] = field(default_factory=list)  # time, frames
    steered: list[Steering] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """`stream` on a clock of its own, over engines and a sink that take known times."""
    made = Clock()

    def open_engines(*arguments: object) -> Any:
        made.now += OPEN_S
        return SimpleNamespace(close=lambda: None)

    def rollout(
        engines: Any, profile: Any, image: Any, steer: Any, seed: int
    ) -> Iterator[np.ndarray]:
        made.now += BLOCK_S
        yield np.zeros((1, 32, 64, 3), np.uint8)
        for block in range(1000):
            made.steered.append(steer(block))
            made.now += BLOCK_S
            yield np.zeros((4, 32, 64, 3), np.uint8)

    class Sink:
        def __enter__(self) -> "Sink":
            return self

        def __exit__(self, *arguments: object) -> None:
            pass

        def write(self, frames: np.ndarray) -> None:
            made.shown.append((made.now, len(frames)))

    for module in (streams, session):
        monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(streams, "open_engines", open_engines)
    monkeypatch.setattr(session, "rollout", rollout)
    monkeypatch.setattr(streams, "open_sink", lambda *arguments: Sink())
    return made


def run(bundle: Path, lines: list[str] | None = None, **more: Any) -> Streamed:
    progress: list[str] = [] if lines is None else lines
    return stream(Bundle.open(bundle), Request("out.rgb", **more), pytest.fail, progress.append)


def test_each_block_is_shown_when_it_is_due_counted_from_the_open_engines(
    bundle: Path, clock: Clock
) -> None:
    run(bundle, seconds=1.0, realtime=True)
    opened = 1000.0 + OPEN_S
    due = [opened + BLOCK_S, *(opened + (1 + 4 * block) / FPS for block in range(6))]
    due[1] = opened + 2 * BLOCK_S  # the first block is not there in time: one frame lasts 42 ms
    assert [time for time, _ in clock.shown] == pytest.approx(due)
    assert [frames for _, frames in clock.shown] == [1, 4, 4, 4, 4, 4, 3]


def test_without_pacing_nothing_waits(bundle: Path, clock: Clock) -> None:
    run(bundle, seconds=1.0)
    steps = np.diff([time for time, _ in clock.shown])
    assert steps == pytest.approx([BLOCK_S] * 6) and clock.slept == []


def test_a_block_that_is_late_is_shown_at_once_and_the_next_ones_catch_up(
    bundle: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = session.rollout

    def stalling(*arguments: Any) -> Iterator[np.ndarray]:
        for number, frames in enumerate(real(*arguments)):
            clock.now += 0.25 if number == 2 else 0
            yield frames

    monkeypatch.setattr(session, "rollout", stalling)
    run(bundle, seconds=1.0, realtime=True)
    opened = 1000.0 + OPEN_S
    late = opened + 2 * BLOCK_S + 0.25 + BLOCK_S
    due = [opened + (1 + 4 * block) / FPS for block in range(6)]
    assert due[1] < late < due[3]
    shown = [time for time, _ in clock.shown]
    assert shown[2:] == pytest.approx([late, late + BLOCK_S, *due[3:]])


def test_the_figures_are_of_the_frames_after_the_start_image(bundle: Path, clock: Clock) -> None:
    lines: list[str] = []
    done = run(bundle, lines, seconds=1.0)
    assert (done.frames, done.seconds, done.ended, done.signal) == (24, 1.0, "done", 0)
    assert done.fps == round(23 / (7 * BLOCK_S), 1)
    assert done.first_frame_ms == pytest.approx(1000 * (OPEN_S + 2 * BLOCK_S))
    assert lines[0] == "0.0 of 1.0 s, 1 frames, 20.0 fps"
    assert lines[1] == "0.2 of 1.0 s, 5 frames, 50.0 fps"
    assert lines[-1] == f"1.0 of 1.0 s, 24 frames, {24 / (7 * BLOCK_S):.1f} fps"
    assert len(lines) == 7


def test_a_stream_of_one_frame_has_no_rate_of_frames(bundle: Path, clock: Clock) -> None:
    done = run(bundle, seconds=1 / FPS)
    assert (done.frames, done.fps, done.first_frame_ms) == (1, 0.0, 0.0)
    assert done.seconds == round(1 / FPS, 3)


def test_without_a_length_it_runs_until_a_signal_and_finishes_the_block_in_hand(
    bundle: Path, clock: Clock
) -> None:
    lines: list[str] = []

    def progress(line: str) -> None:
        lines.append(line)
        if len(lines) == 4:
            signal.raise_signal(signal.SIGTERM)

    done = stream(Bundle.open(bundle), Request("out.rgb"), pytest.fail, progress)
    assert (done.frames, done.ended, done.signal) == (13, "signal", signal.SIGTERM)
    assert lines[-1] == "0.5 s, 13 frames, 65.0 fps"


def test_a_signal_that_is_not_heeded_interrupts_after_a_grace(bundle: Path) -> None:
    with pytest.raises(KeyboardInterrupt), session.stop_signals() as caught:  # noqa: PT012  signals
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        left, again = signal.getitimer(signal.ITIMER_REAL)
        assert session.GRACE_S - 1 < left <= session.GRACE_S == 3.0 and again == 0
        signal.raise_signal(signal.SIGALRM)  # as the timer would
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_second_signal_interrupts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), session.stop_signals():  # noqa: PT012  two signals
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_line_acts_from_the_block_that_begins_at_its_time(
    bundle: Path, clock: Clock, tmp_path: Path
) -> None:
    """Block n begins n latent frames after the start: four frames at 24 a second."""
    flight = tmp_path / "flight.jsonl"
    flight.write_text('{"yaw": 0.1, "at": 0.333333}\n{"yaw": 0.2, "at": 0.51}\n')
    run(bundle, seconds=1.0, controls=str(flight))
    yaws = [steering.controls.yaw for steering in clock.steered]
    assert yaws == [0, 0, 0.1, 0.1, 0.2, 0.2]
    assert clock.steered[0].controls == CRUISE
    assert clock.steered[2].controls == Velocity(CRUISE.forward, yaw=0.1)


def test_a_paced_stream_gives_the_bytes_of_one_that_does_not_wait(
    bundle: Path, tmp_path: Path
) -> None:
    opened = Bundle.open(bundle)
    for name, paced in (("a", True), ("b", False)):
        request = Request(str(tmp_path / f"{name}.rgb"), seconds=0.5, realtime=paced)
        stream(opened, request, pytest.fail, lambda line: None)
    assert (tmp_path / "a.rgb").read_bytes() == (tmp_path / "b.rgb").read_bytes()
