"""Every report, golden: reports.txt has what each command prints for the results below."""

import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Of
from typing import Any

import pytest

from aapt_deploy.cli import reports

GOLDEN = Path(__file__).with_name("reports.txt")


def times(p50: float) -> Of:
    return Of(p50_ms=p50, p95_ms=2 * p50, p99_ms=3 * p50, max_ms=4 * p50)


def but(given: Of, **other: object) -> Of:
    """The same with other values."""
    return Of(**vars(given) | other)


def layer(name: str, ms: float) -> Of:
    return Of(name=name, kind="conv", tactic="sm90_gemm" * 9, ms=ms, share=ms / 100)


LATENCY = Of(
    profile="tiny", backend="onnxruntime", precision="int8", blocks=120, budget_ms=166.7,
    steady={"generator": times(20.125), "step": times(40.5)}, cold_step_ms=[300.4, 90.0],
    first_frame_ms=812.4, open_ms=512.6, sustained_fps=98.76, deadline_misses=3,
    machine={"cores": 2}, floor_ms={}, layers={}, within_budget=True,
)  # fmt: skip
ON_GPU = Of(**vars(LATENCY) | {
    "within_budget": False, "budget_ms": 50.0, "floor_ms": {"generator": 5.0},
    "layers": {"generator": [layer("b." + "x" * 70, 9.0), *(layer(f"l{i}", 1) for i in range(20))]},
})  # fmt: skip
CHANGES = [
    Of(name="generator", before_ms=20.0, after_ms=10.0, delta_ms=-10.0, ratio=0.5),
    Of(name="new" * 30, before_ms=None, after_ms=1.25, delta_ms=1.25, ratio=None),
]
STAGE = {"products_gflop": 1234.56, "attention_gflop": 0.0, "weights_gb": 1.5, "bound": ""}
STAGES = [
    Of(name="generator", activations_gb=0.25, floor_ms=3.125, **STAGE | {"bound": "memory"}),
    Of(name="decoder", activations_gb=0.125, floor_ms=None, **STAGE),
]
PLAN = Of(
    profile="tiny", target="H100", stages=STAGES, memory_gb={"weights": 3.0, "cache": 0.5},
    limit_gb=80, fits=True, total_gb=3.5, floor_ms=4.25, passes=1, budget_ms=166.7,
)  # fmt: skip
ON_CPU = but(PLAN, target="this CPU", limit_gb=0, floor_ms=None)
LOSS = Of(
    candidate="onnxruntime-int8", reference="onnxruntime-fp32", latent_error=[0.01, 0.03],
    seconds=[Of(psnr_db=41.26, ssim=0.98765, sharpness=0.99, brightness=1.0)] * 2,
    decoder_psnr_db=44.44, drift=0.01, drift_per_s=0.002, flat_blocks=0, still_blocks=1, blocks=60,
    failures=[],
)  # fmt: skip
STREAMED = Of(output="-", frames=24, seconds=1.0, fps=98.7, first_frame_ms=812.4, ended="done")
BUILT = Of(
    key="onnxruntime-fp32", step_ms=20.06, bytes=12_345_678, threads=2, spinning=True,
    psnr_db=None, seconds=3.21,
)  # fmt: skip
WINDOW = {
    "from_s": 0, "sharpness": 1.0, "colour": 0.5, "distance": 0.25, "dynamics": 2.0, "flow": None,
    "gains": {"yaw": 0.9, "strafe": None, "pitch": 1.1, "forward": 1.0}, "prompt": {"a": 1, "b": 0},
    "gain_errors": {"yaw": 0.05, "strafe": None},
}  # fmt: skip
JUDGED = {
    "engine": "torch fp32", "windows": [WINDOW, WINDOW | {"from_s": 5}], "again": WINDOW,
    "seconds": [{}, {"terrain": 0.5, "still": 0.75, "recognised": 0.9}],
}  # fmt: skip
RECORD = {
    "flights": 32, "window_s": 5, "true": {"window": WINDOW, "last": None},
    "made": {"a.safetensors": JUDGED, "b": {k: v for k, v in JUDGED.items() if k != "again"}},
}  # fmt: skip
BUNDLE = Of(path=Path("my demo/bundle"), manifest={"start_frames": {"dunes": "", "woods": ""}})
FINDINGS = Of(
    here=Of(gpu="H100", sm=90, tensorrt="10.16", cuda="13.0", driver="580"), receipt=Path("r.json"),
    proofs=[
        Of(name="plugin", ok=True, seconds=1.25, found="yes"),
        Of(name="aot", ok=False, seconds=0, found="no"),
    ],
    choices=[Of(form="python", reason="it is the fastest")],
)  # fmt: skip

CASES: dict[str, Callable[[Any], None]] = {
    "parity": lambda r: r.parity(
        [Of(graph="decoder", case="f", error=1e-6, relative=2e-5, ok=ok) for ok in (True, False)],
        Path("bundle"),
    ),
    "coverage": lambda r: r.coverage([
        Of(graph="generator", fp8=0.9, gflop=12.345, rest={"attention": 0.02, "ends": 0.08}),
        Of(graph="decoder", fp8=1.0, gflop=1.0, rest={}),
    ]),
    "engines": lambda r: r.engines([BUILT, but(BUILT, psnr_db=41.26, spinning=False)]),
    "latency": lambda r: r.latency(LATENCY),
    "latency of layers": lambda r: r.latency(ON_GPU),
    "difference": lambda r: r.difference(
        Of(differs={"backend": ("a", "b")}, stages={"p50_ms": CHANGES}, layers={"g": CHANGES})
    ),
    "no difference": lambda r: r.difference(Of(differs={}, stages={}, layers={})),
    "plan": lambda r: r.plan(PLAN),
    "plan that does not fit": lambda r: r.plan(but(PLAN, fits=False)),
    "plan for a CPU": lambda r: r.plan(ON_CPU),
    "quality": lambda r: r.quality(LOSS),
    "quality that fails": lambda r: r.quality(but(LOSS, failures=["psnr", "drift"])),
    "streamed": lambda r: r.streamed(STREAMED),
    "streamed, signal": lambda r: r.streamed(but(STREAMED, ended="signal", output="x.mp4")),
    "streamed, reader": lambda r: r.streamed(but(STREAMED, ended="reader gone")),
    "doctor": lambda r: r.doctor([
        Of(name="Python", ok=True, needed=True, found="3.11", fix="none"),
        Of(name="av", ok=False, needed=True, found="-", fix="pip install av"),
        Of(name="TensorRT", ok=False, needed=False, found="-", fix=""),
    ]),
    "evaluation": lambda r: r.evaluation(RECORD, Path("evaluation")),
    "demo": lambda r: r.demo(LATENCY, Path("demo/demo.mp4"), BUNDLE),
    "demo that is too slow": lambda r: r.demo(ON_GPU, Path("demo/demo.mp4"), BUNDLE),
    "tensorrt": lambda r: r.tensorrt(FINDINGS),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_report_is_as_before(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """After a change that is meant: `python -m tests.cli.test_reports 2> tests/cli/reports.txt`."""
    CASES[name](reports)
    out, err = capsys.readouterr()
    sections = GOLDEN.read_text(encoding="utf-8").split("### ")[1:]
    golden = dict(section.split("\n", 1) for section in sections)
    assert out == ""
    changed = "\n".join(difflib.unified_diff(golden[name].splitlines(), err.splitlines()))
    assert err == golden[name], changed


def test_the_golden_file_has_no_other_report() -> None:
    text = GOLDEN.read_text(encoding="utf-8")
    assert [line[4:] for line in text.splitlines() if line.startswith("### ")] == [*CASES]


if __name__ == "__main__":
    for title, show in CASES.items():
        print(f"### {title}", file=sys.stderr)
        show(reports)
