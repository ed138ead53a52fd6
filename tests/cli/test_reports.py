"""What the command line prints for people, to the character: one golden file for each report.

RENEW_GOLDEN=1 renews the files (tests/support/golden.py).
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aapt_deploy.backends.trial import Built
from aapt_deploy.backends.trt.cuda import Gpu
from aapt_deploy.backends.trt.doctor.ask import Findings
from aapt_deploy.backends.trt.doctor.receipts import Choice, Proof
from aapt_deploy.cli import reports
from aapt_deploy.export.parity import Parity
from aapt_deploy.measure.diff import Change, Difference
from aapt_deploy.measure.doctor import Check
from aapt_deploy.measure.latency import Latency, StageTimes
from aapt_deploy.measure.quality import Loss, Second
from aapt_deploy.models.cost import Cost, StageCost
from aapt_deploy.models.fp8 import Coverage
from aapt_deploy.profiles import Quality
from aapt_deploy.rollout.engine import LayerTime
from aapt_deploy.stream.stream import Streamed
from tests.support import golden

Printed = Callable[..., None]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    """Run reports and compare what they print, all of it on stderr, with the golden file `name`."""

    def compare(name: str, *calls: tuple[Callable[..., None], Sequence[Any]]) -> None:
        capsys.readouterr()
        for report, arguments in calls:
            report(*arguments)
        out, err = capsys.readouterr()
        assert out == ""
        golden.check(f"reports/{name}.txt", err)

    return compare


MACHINE: dict[str, str | int] = {"cpu": "A CPU", "cores": 2}
STAGES = {
    "step": 17.5,
    "generator": 12.25,
    "decoder": 4.5,
    "commit": 0.125,
    "hand-off": 0.625,
    "encode": 2.0,
}
LAYERS = [
    LayerTime(f"visual.{index:02d}.qkv", "gemm", f"sm90_kernel_{index}", 1.5 - index / 16, 0.0625)
    for index in range(17)
]  # fmt: skip


def measured(**changes: Any) -> Latency:
    steady = {name: StageTimes(100, ms, 1.25 * ms, 1.5 * ms, 2 * ms) for name, ms in STAGES.items()}
    good = Latency(
        profile="demo-cpu", backend="onnxruntime", precision="fp32", blocks=100, passes_per_block=5,
        budget_ms=166.7, steady=steady, cold_step_ms=[31.0, 45.5, 20.0], first_frame_ms=512.25,
        open_ms=245.5, sustained_fps=228.57,
        deadline_misses=0, machine=MACHINE, samples_ms=[17.5],
    )  # fmt: skip
    return dataclasses.replace(good, **changes)


def test_parity(printed: Printed) -> None:
    rows = [
        Parity("generator", "empty cache", 1.25e-6, 2.5e-7, True),
        Parity("decoder", "first frame", 0.0125, 0.5, False),
    ]  # fmt: skip
    printed("parity", (reports.parity, (rows, Path("demo/bundle"))))


def test_coverage(printed: Printed) -> None:
    rest = {"attention": 0.0625, "kept by *.first.*": 0.25}
    rows = [Coverage("generator", 1234.5, 0.6875, rest), Coverage("prompt", 0.125, 1.0, {})]
    printed("coverage", (reports.coverage, (rows,)))


def test_engines(printed: Printed) -> None:
    rows = [
        Built("onnxruntime-fp32", 17.53, 12_345_678, 2, True, None, 10.04),
        Built("onnxruntime-int8", 9.96, 3_456_789, 1, False, 41.26, 103.0),
    ]  # fmt: skip
    printed("engines", (reports.engines, (rows,)))


def test_latency_within_and_over_the_budget(printed: Printed) -> None:
    late = measured(budget_ms=16.7, deadline_misses=99)
    printed("latency", (reports.latency, (measured(),)), (reports.latency, (late,)))


def test_latency_beside_its_floors_and_layer_by_layer(printed: Printed) -> None:
    floors = {"step": 8.75, "generator": 6.125, "decoder": 2.0}
    long = LayerTime("a." * 60, "kgen", "t" * 80, 0.5, 0.125)
    layers = {"generator": LAYERS, "decoder": [long]}
    printed("latency-gpu", (reports.latency, (measured(floor_ms=floors, layers=layers),)))


def test_difference(printed: Printed) -> None:
    layers = [Change(f"layer {index:02d}", 1.0 + index, 2.0 + index) for index in range(20)]
    stages = {
        "p50_ms": [
            Change("step", 20.0, 17.5), Change("prompt", None, 0.5), Change("encode", 2.0, None),
        ],
        "p95_ms": [Change("step", 25.0, 25.0)],
    }  # fmt: skip
    different = Difference(
        {"precision": ("fp32", "int8"), "machine.cpu": ("A", "-")}, stages, {"generator": layers}
    )
    same = Difference({}, {"p50_ms": [Change("step", 0.0, 1.0)]}, {})
    printed("difference", (reports.difference, (different,)), (reports.difference, (same,)))


def planned(**changes: Any) -> Cost:
    stages = [
        StageCost("generator", 12345.67, 890.12, 8.125, 0.75, 12.345, "compute"),
        StageCost("prompt", 0.5, 0.0, 0.25, 0.001, 0.05, "memory"),
    ]  # fmt: skip
    memory = {"weights": 8.375, "kv cache": 8.25, "runtime": 1.0}
    made = Cost("aapt-8b", "H100", stages, 8.25, memory, 80, 1, 166.7, 14.25)
    return dataclasses.replace(made, **changes)


def test_plan(printed: Printed) -> None:
    without = [dataclasses.replace(stage, floor_ms=None, bound="") for stage in planned().stages]
    on_a_cpu = planned(stages=without, target="2 CPU cores", limit_gb=0, floor_ms=None)
    several = planned(limit_gb=16, passes=5)
    printed("plan", *((reports.plan, (result,)) for result in (planned(), several, on_a_cpu)))


def lost(**changes: Any) -> Loss:
    seconds = [Second(41.26, 0.98765, 1.0125, 0.9875), Second(35.04, 0.91, 0.9, 1.1)]
    thresholds = dataclasses.asdict(Quality())
    made = Loss(
        "demo-cpu", "onnxruntime-fp32", "onnxruntime-int8", seconds, [0.0125, 0.025], 45.25,
        0.1, 0.0125, 0, 0, 144, thresholds, MACHINE,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def test_quality(printed: Printed) -> None:
    bad = lost(latent_error=[0.2, 0.4], drift=0.2, flat_blocks=3)
    printed("quality", (reports.quality, (lost(),)), (reports.quality, (bad,)))


@pytest.mark.parametrize("ended", ["done", "signal", "reader gone"])
def test_streamed(printed: Printed, ended: str) -> None:
    to_file = Streamed(121, 5.042, 228.57, 512.25, "flight.mp4", ended)
    to_stdout = dataclasses.replace(to_file, output="-")
    printed(
        f"streamed-{ended.replace(' ', '-')}",
        *((reports.streamed, (r,)) for r in (to_file, to_stdout)),
    )


def test_doctor(printed: Printed) -> None:
    checks = [
        Check("python", True, True, "3.11.9"),
        Check("onnxruntime", False, True, "not installed", "pip install onnxruntime"),
        Check("ffmpeg", False, False, "not on PATH", "install ffmpeg"),
        Check("a", True, False, "found", "not shown"),
    ]  # fmt: skip
    printed("doctor", (reports.doctor, (checks,)))


def test_doctor_for_tensorrt(printed: Printed) -> None:
    here = Gpu("11.4.0.106", 90, "13.0", "580.65.06", "NVIDIA H100", "k" * 64)
    proofs = [
        Proof("native builds", True, "differs by 0.001", 12.34),
        Proof("aot plugin", False, "refused", 0.05),
    ]
    best = Choice("native", packed=False, captured=True, reason="TensorRT's own attention")
    findings = SimpleNamespace(
        here=here, proofs=proofs, choices=[best], receipt=Path("cache/receipt.json")
    )
    assert {field.name for field in dataclasses.fields(Findings)} <= {*vars(findings)}
    printed("doctor-tensorrt", (reports.tensorrt, (findings,)))


def window(from_s: int, **changes: Any) -> dict[str, Any]:
    figures: dict[str, Any] = dict.fromkeys(
        ("sharpness", "colour", "distance", "dynamics", "flow"), 1.25
    )
    gains = {"yaw": 1.0, "strafe": None, "pitch": 0.5, "forward": 0.75}
    errors = {"yaw": 0.125, "strafe": None, "pitch": 0.25, "forward": 0.0625}
    prompt = {"place": 1.0, "weather": 0.5}
    return (
        figures
        | {"from_s": from_s, "gains": gains, "gain_errors": errors, "prompt": prompt}
        | changes
    )


def test_evaluation(printed: Printed) -> None:
    seconds = [
        {"terrain": 1.0, "still": 1.0, "recognised": 1.0},
        {"terrain": 0.75, "still": 0.5, "recognised": 0.875},
    ]
    full = {
        "engine": "fp32",
        "windows": [window(0), window(55, flow=None)],
        "again": window(0),
        "seconds": seconds,
    }
    short = {"engine": "int8", "windows": [window(0)], "seconds": seconds[:1]}
    record = {
        "made": {"demo": full, "other": short}, "true": {"window": window(0), "last": window(55)},
        "window_s": 5, "flights": 8,
    }  # fmt: skip
    printed("evaluation", (reports.evaluation, (record, Path("runs/evaluation"))))


def test_demo(printed: Printed) -> None:
    bundle: Any = SimpleNamespace(
        path=Path("my demo/bundle"), manifest={"start_frames": {"dunes": {}, "woods": {}}}
    )
    slow = measured(budget_ms=1.0, sustained_fps=12.4)
    printed(
        "demo", *((reports.demo, (r, Path("demo/flight.mp4"), bundle)) for r in (measured(), slow))
    )


def test_every_report_has_a_golden_file() -> None:
    """A new report is met here: give it a test of its own above."""
    made = {
        name
        for name, thing in vars(reports).items()
        if callable(thing) and not name.startswith("_")
    }
    ours = {name for name in made if getattr(reports, name).__module__ == reports.__name__}
    covered = {"tensorrt": "doctor-tensorrt", "streamed": "streamed-done"}
    files = {path.stem for path in (golden.FOLDER / "reports").glob("*.txt")}
    assert ours and {covered.get(name, name) for name in ours} <= files


def test_a_golden_file_that_differs_or_is_missing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(golden.RENEW, raising=False)
    with pytest.raises(AssertionError, match="is missing"):
        golden.check("a/b.txt", "one\n", tmp_path)
    monkeypatch.setenv(golden.RENEW, "1")
    golden.check("a/b.txt", "one  \n", tmp_path)
    monkeypatch.delenv(golden.RENEW)
    golden.check("a/b.txt", "one\n", tmp_path)
    with pytest.raises(AssertionError, match="is not what is printed"):
        golden.check("a/b.txt", "two\n", tmp_path)
