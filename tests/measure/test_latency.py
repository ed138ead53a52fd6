"""Test latency: parts add up, the verdict follows the numbers, programs read records."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aapt_deploy.backends.torch_cuda import engine
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.cli import reports
from aapt_deploy.cli.measure import _floors
from aapt_deploy.errors import BundleError
from aapt_deploy.measure import latency
from aapt_deploy.measure.latency import (
    COLD_BLOCKS,
    STAGES,
    Latency,
    StageTimes,
    measure,
    measure_bundle,
)
from aapt_deploy.models import cost
from aapt_deploy.profiles import Profile, Target
from aapt_deploy.rollout.engine import LayerTime
from aapt_deploy.rollout.starts import Start, all_starts, coarse_start
from tests.support.commands import recorded
from tests.support.fake_engines import FakeEngines
from tests.support.opening import silent, unexpected

SLEEP_S = 0.012


class Slow(FakeEngines):
    """A generator that takes SLEEP_S per pass, and twice that for its third steady block."""

    def __getitem__(self, graph: str) -> "Slow":
        return Slow(self.profile, graph, self.calls)

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        if self.graph == "generator":
            time.sleep(SLEEP_S * (2 if inputs["block"] == COLD_BLOCKS + 2 else 1))
        return super().run(**inputs)


def begin(profile: Profile) -> Start:
    return Start(
        np.zeros((profile.video.height, profile.video.width, 3), np.uint8),
        "",
        np.array([[0, 5, 10, 15]]),
    )


@pytest.fixture(scope="module")
def slow(tiny: Profile) -> Latency:
    fast_video = tiny.replace(video=replace(tiny.video, fps=240))  # a budget of 16.7 ms
    return measure(lambda: Slow(fast_video), fast_video, begin(tiny), 10, lambda done: None)


@pytest.fixture(scope="module")
def real(bundle: Path) -> Latency:
    return measure_bundle(Bundle.open(bundle), "onnxruntime", None, 12, unexpected, silent)


def test_every_stage_is_there_and_the_step_holds_them_all(real: Latency, tiny: Profile) -> None:
    assert set(real.steady) == set(STAGES)
    assert {name: real.steady[name].count for name in STAGES if name != "prompt"} == dict.fromkeys(
        set(STAGES) - {"prompt"}, 12
    )
    inside = [real.steady[name].p50_ms for name in ("generator", "decoder", "commit", "hand-off")]
    assert real.steady["step"].p50_ms >= max(inside) > 0
    assert (
        real.steady["step"].max_ms
        <= sum(real.steady[name].max_ms for name in ("generator", "decoder", "commit", "hand-off"))
        + 0.01
    )
    assert len(real.samples_ms) == 12
    assert len(real.cold_step_ms) == COLD_BLOCKS
    assert real.first_frame_ms > real.open_ms > 0
    assert real.passes_per_block == len(tiny.sampler.timesteps)
    assert (real.backend, real.precision, real.profile) == ("onnxruntime", "fp32", "tiny-cpu")


def test_the_step_is_the_sum_of_its_parts(slow: Latency) -> None:
    """Two passes of SLEEP_S in the generator are long and known; the rest is short."""
    wanted = 2000 * SLEEP_S
    assert wanted <= slow.steady["generator"].p50_ms < 2 * wanted
    assert wanted <= slow.steady["step"].p50_ms < slow.steady["generator"].p50_ms + 20
    assert slow.steady["step"].max_ms >= 2 * wanted
    assert min(slow.samples_ms) >= wanted
    assert slow.steady["encode"].count == 10
    assert "prompt" in slow.steady  # the first block's, cold
    assert slow.steady["prompt"].count == 1


def test_frames_per_second_are_those_of_the_steps(slow: Latency) -> None:
    assert slow.sustained_fps == pytest.approx(4 * 10 / (sum(slow.samples_ms) / 1000), rel=0.01)
    assert slow.budget_ms == 16.7
    assert slow.deadline_misses == 10
    assert not slow.within_budget


@pytest.mark.parametrize(
    ("p95_ms", "misses", "good"),
    [(166.7, 0, True), (166.8, 0, False), (20.0, 1, True), (20.0, 2, False), (500.0, 9, False)],
)
def test_the_verdict(real: Latency, p95_ms: float, misses: int, good: bool) -> None:
    """p95 of the step inside the budget, and at most one block in a hundred late."""
    steady = {**real.steady, "step": replace(real.steady["step"], p95_ms=p95_ms)}
    assert (
        replace(
            real, steady=steady, blocks=100, deadline_misses=misses, budget_ms=166.7
        ).within_budget
        is good
    )


def test_percentiles() -> None:
    times = StageTimes.of([i / 1000 for i in range(1, 101)])
    assert times == StageTimes(100, 50.5, 95.05, 99.01, 100.0)
    assert StageTimes.of([0.002]) == StageTimes(1, 2.0, 2.0, 2.0, 2.0)


def test_the_record_is_json_with_the_machine_and_the_raw_samples(real: Latency) -> None:
    record = json.loads(real.json())
    assert record["within_budget"] is real.within_budget
    assert record["samples_ms"] == real.samples_ms
    assert record["steady"]["step"]["p95_ms"] == real.steady["step"].p95_ms
    assert {"cpu", "cores", "system", "python", "aapt_deploy"} <= set(record["machine"])
    assert str(Path.home()) not in real.json()


def test_engines_are_closed_also_when_a_block_fails(tiny: Profile) -> None:
    fake = FakeEngines(tiny)

    class Broken(FakeEngines):
        def __getitem__(self, graph: str) -> "Broken":
            return Broken(self.profile, graph, self.calls)

        def commit(self, block: int) -> None:
            raise RuntimeError("broken")

    broken = Broken(tiny, "", fake.calls)
    with pytest.raises(RuntimeError, match="broken"):
        measure(lambda: broken, tiny, begin(tiny), 10, lambda done: None)
    assert ("", "close", {}) in fake.calls


def test_progress_counts_every_block(bundle: Path) -> None:
    said: list[str] = []
    measure_bundle(Bundle.open(bundle), "onnxruntime", "int8", 10, unexpected, said.append)
    assert said[-1] == "18 of 18 blocks"
    assert len(said) == 18


def test_a_bundle_without_that_engine_is_refused(bare: Path) -> None:
    with pytest.raises(BundleError, match="has no onnxruntime engine"):
        measure_bundle(Bundle.open(bare), "onnxruntime", None, 10, unexpected, silent)


def test_floors_stand_beside_their_stages(
    real: Latency, capsys: pytest.CaptureFixture[str]
) -> None:
    reports.latency(real)
    assert "roofline" not in capsys.readouterr().err
    half = real.steady["step"].p50_ms / 2
    reports.latency(replace(real, floor_ms={"step": half}))
    lines = capsys.readouterr().err.splitlines()
    rows = [line for line in lines if line.startswith("step ") and "50%" in line]
    assert len(rows) == 1 and f"{half:.2f}" in rows[0]


def test_a_gpu_profile_s_floors_are_those_of_its_plan(tiny: Profile) -> None:
    assert _floors(tiny) == {}
    shape = tiny.replace(target=Target("cuda", "H100", 90, 80))
    planned = cost.cost_of(shape)
    by_name = {stage.name: stage.floor_ms for stage in planned.stages}
    assert _floors(shape) == {
        "step": planned.floor_ms,
        "generator": 2 * (by_name["generator"] or 0),
        "decoder": by_name["decoder"],
    }


# --- the command ---


def test_the_command_says_the_verdict_and_exits_by_it(
    bundle: Path, aapt: Any, tiny: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = aapt("profile", bundle, "--blocks", 10, "--json")
    assert good.code == 0, good.err
    assert "verdict: within budget" in good.err
    assert json.loads(good.out)["within_budget"] is True
    assert good.out.count("\n") == 1

    class TooSlow(Slow):
        def __getitem__(self, graph: str) -> "TooSlow":
            return TooSlow(self.profile, graph, self.calls)

        def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
            time.sleep(
                0.1 if self.graph == "generator" and int(inputs["block"]) >= COLD_BLOCKS else 0
            )
            return super().run(**inputs)

    monkeypatch.setattr(
        latency, "open_engines", lambda bundle, backend, precision, warn: TooSlow(tiny)
    )
    bad = aapt("profile", bundle, "--blocks", 10, "--json")
    assert bad.code == 3
    assert "verdict: OVER BUDGET" in bad.err
    assert json.loads(bad.out)["within_budget"] is False
    assert json.loads(bad.out)["deadline_misses"] == 10


# --- clocks and figures by hand ---


class Clock:
    """In the place of the module's clock: moved by the test alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.now)

    def takes(self, seconds: float) -> Callable[..., str]:
        def call(**arguments: object) -> str:
            self.now += seconds
            return f"answer to {sorted(arguments)}"

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_stopwatch_adds_up_each_stage_of_each_block(clock: Clock) -> None:
    watch = latency.Stopwatch()
    assert watch("prompt", "run", clock.takes(0.5), {"text": 1}) == "answer to ['text']"
    watch("generator", "reset", clock.takes(0.25), {"text_k.00": 1})
    watch("generator", "reset", clock.takes(4), {})
    for seconds in (1, 2):
        watch("generator", "run", clock.takes(seconds), {})
    watch("generator", "commit", clock.takes(0.125), {"block": 0})
    # The next block is begun before this one is decoded.
    watch("generator", "run", clock.takes(16), {})
    watch("generator", "commit", clock.takes(32), {"block": 1})
    watch("decoder", "run", clock.takes(8), {})
    assert watch.next_block() == {
        "prompt": 0.75, "reset": 4, "generator": 3, "commit": 0.125, "decoder": 8,
    }  # fmt: skip
    watch("decoder", "run", clock.takes(64), {})
    watch("decoder", "run", clock.takes(64), {})
    assert watch.next_block() == {"generator": 16, "commit": 32, "decoder": 128}
    assert not watch.making and not watch.decoding and not watch.made


@pytest.mark.parametrize(
    ("step", "beside", "left"),
    [(10.0, False, 3.0), (10.0, True, 5.0), (4.0, True, 0.0), (4.0, False, -3.0)],
)
def test_the_hand_off_is_what_no_stage_accounts_for(step: float, beside: bool, left: float) -> None:
    spent = {"generator": 4.0, "commit": 1.0, "decoder": 2.0}
    assert latency._hand_off(step, spent, beside) == left
    assert latency._hand_off(9.0, {"decoder": 8.0, "generator": 1.0}, True) == 1.0
    assert latency._hand_off(9.0, {"generator": 1.0}, False) == 8.0


def test_a_summary_by_hand(tiny: Profile) -> None:
    budget_s = tiny.step_budget_ms / 1000
    steps = [budget_s, budget_s * 1.0001, 0.0123456, 0.0234567]
    stages = {"step": steps, "generator": [0.0012344], "decoder": []}
    layers = {"decoder": [LayerTime("conv", "", "", 1.0, 0.5)]}
    found = latency._summary(
        tiny, FakeEngines(tiny), stages, [0.0123456, 0.5], (0.98765, 0.12345), layers
    )
    assert (found.profile, found.backend, found.precision) == ("tiny-cpu", "fake", "fp32")
    assert (found.blocks, found.passes_per_block) == (4, len(tiny.sampler.timesteps))
    assert found.budget_ms == round(tiny.step_budget_ms, 1) == 166.7
    assert list(found.steady) == ["step", "generator"], "what was not measured is not shown"
    assert found.steady["generator"] == StageTimes(1, 1.234, 1.234, 1.234, 1.234)
    assert found.cold_step_ms == [12.35, 500.0]
    assert (found.first_frame_ms, found.open_ms) == (987.6, 123.5)
    assert found.sustained_fps == round(4 * 4 / sum(steps), 1)
    assert found.deadline_misses == 1, "a step that takes the budget is in time"
    assert found.samples_ms == [round(1000 * s, 3) for s in steps] and found.samples_ms[2] == 12.346
    assert found.layers is layers and found.floor_ms == {} and found.machine["cores"]


class Beside(FakeEngines):
    """Engines whose decoder works beside the generator, and which time their layers."""

    overlapped = True

    def layer_times(self, runs: int) -> dict[str, list[LayerTime]]:
        self.calls.append(("", "layer_times", {"runs": runs}))
        return {"generator": [LayerTime("qkv", "gemm", "t", 1.0, 1.0)]}


def test_beside_the_decoder_frames_are_encoded_when_all_is_measured(
    tiny: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as are kept; layers are timed before the engines are closed."""
    engines, done, written = Beside(tiny), list[int](), list[tuple[int, int]]()

    class Sink:
        def __enter__(self) -> "Sink":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def write(self, frames: np.ndarray) -> None:
            written.append((len(frames), len(done)))

    opened: list[tuple[object, ...]] = []
    monkeypatch.setattr(latency, "open_sink", lambda *given: opened.append(given) or Sink())  # type: ignore[func-returns-value]
    monkeypatch.setattr(latency, "ENCODED_BLOCKS", 5)
    found = measure(lambda: engines, tiny, begin(tiny), 10, done.append)
    ((file, format_, *size),) = opened
    assert str(file).endswith(".mp4") and format_ is None and size == [64, 32, 24]
    assert done == list(range(1, 10 + COLD_BLOCKS + 1))
    assert written == [(4, done[-1])] * 5 and found.steady["encode"].count == 5
    assert found.layers == {"generator": [LayerTime("qkv", "gemm", "t", 1.0, 1.0)]}
    ends = [call for call in engines.calls if call[0] == ""]
    assert ends == [("", "layer_times", {"runs": latency.LAYER_RUNS}), ("", "close", {})]


def test_a_bundle_is_measured_from_its_first_start_frame(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bundle.open(bundle)
    engines = recorded(monkeypatch, latency, "open_engines", "engines")
    measures = recorded(monkeypatch, latency, "measure", "measured")
    said: list[str] = []
    assert measure_bundle(opened, "torch", "fp32", 11, unexpected, said.append) == "measured"
    (call,) = measures
    assert call.pop("open_all")() == "engines" and list(engines[0].values()) == [
        opened, "torch", "fp32", unexpected,
    ]  # fmt: skip
    call.pop("progress")(3)
    assert said == [f"3 of {COLD_BLOCKS + 11} blocks"]
    first = all_starts(opened)[0]
    begun = call.pop("begin")
    assert np.array_equal(begun.image, first.image) and begun.prompt == first.prompt
    assert call == {"profile": opened.profile, "blocks": 11}


def test_random_weights_are_measured_from_a_coarse_picture(
    tiny: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens = recorded(monkeypatch, engine, "open_random", "engines")
    measures = recorded(monkeypatch, latency, "measure", "measured")
    assert latency.measure_random(tiny, "bf16", 11, silent) == "measured"
    (call,) = measures
    assert call["open_all"]() == "engines" and list(opens[0].values()) == [tiny, "bf16"]
    assert np.array_equal(call["begin"].image, coarse_start(tiny).image)
    assert (call["profile"], call["blocks"]) == (tiny, 11)
