"""What each command passes on to the work behind it, and what it makes of the answer."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aapt_deploy import assets
from aapt_deploy.backends import build, table
from aapt_deploy.backends.trial import BuildOptions, Built
from aapt_deploy.bundle import bundle as bundles
from aapt_deploy.bundle import scales
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.cli import commands, console, measure
from aapt_deploy.export import calibrate, export
from aapt_deploy.export.parity import Parity
from aapt_deploy.measure import latency, quality
from aapt_deploy.models import checkpoint, cost, random_weights
from aapt_deploy.models.fp8 import Coverage
from aapt_deploy.profiles import load
from aapt_deploy.stream import stream as streams
from aapt_deploy.stream.stream import Request, Streamed
from tests.support.bundles import rewrite_manifest
from tests.support.commands import Ran, recorded

Aapt = Callable[..., Ran]
ROW, SHARE = Parity("generator", "full", 1e-6, 1e-7, True), Coverage("generator", 2.0, 0.5, {})
BUILT = Built("onnxruntime-fp32", 17.5, 12, 2, True, None, 10.0)
PRESET = "aapt-8b-736x416-h100"


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return monkeypatch


def measured(within: bool = True) -> Any:
    steady = {"step": latency.StageTimes(10, 1.0, 2.0, 3.0, 4.0)}
    return latency.Latency(
        profile="p", backend="b", precision="x", blocks=10, passes_per_block=1,
        budget_ms=2.0 if within else 1.9, steady=steady, cold_step_ms=[1.0], first_frame_ms=5.0,
        open_ms=3.0, sustained_fps=24.0, deadline_misses=0, machine={"cores": 2}, samples_ms=[1.0],
    )  # fmt: skip


# --- export ---


@pytest.fixture
def exports(patch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Everything that `aapt export` calls, with the answers that it works on."""
    stored = SimpleNamespace(profile="its profile", sha256="its hash")
    return SimpleNamespace(
        stored=stored,
        reads=recorded(patch, checkpoint, "stored", stored),
        scales=recorded(patch, scales, "load", "the file's scales"),
        loads=recorded(patch, checkpoint, "load", "networks"),
        refusals=recorded(patch, bundles, "refuse_existing", None),
        calibrations=recorded(patch, calibrate, "calibrate", "new scales"),
        exports=recorded(patch, export, "export_bundle", [ROW]),
        shares=recorded(patch, export, "coverage", [SHARE]),
    )


def test_export_checks_and_exports_the_named_checkpoint(
    aapt: Aapt, exports: SimpleNamespace
) -> None:
    ran = aapt("export", "c.safetensors", "-o", "out", "--sha256", "abc", "--force", "--json")
    assert ran.code == 0, ran.err
    assert exports.reads == [{"path": Path("c.safetensors"), "sha256": "abc"}]
    (asked,) = exports.exports
    assert list(asked.values())[:3] == [exports.stored, Path("out"), True]
    assert isinstance(list(asked.values())[3], console.Steps) and list(asked.values())[4] is None
    assert [list(call.values()) for call in exports.shares] == [["its profile", None]]
    parity = [{"graph": "generator", "case": "full", "error": 1e-6, "relative": 1e-7, "ok": True}]
    shares = [{"graph": "generator", "gflop": 2.0, "fp8": 0.5, "rest": {}}]
    assert json.loads(ran.out) == {"bundle": "out", "parity": parity, "coverage": shares}
    assert "exporting to out" in ran.err and "bundle: out" in ran.err
    assert "50.0% of 2.00 GFLOP in FP8" in ran.err
    assert not exports.scales and not exports.calibrations and not exports.refusals


def test_export_takes_the_embedded_checkpoint_with_its_hash_unless_one_is_named(
    aapt: Aapt, exports: SimpleNamespace
) -> None:
    assert aapt("export").code == 0
    hash_ = assets.checkpoint_sha256()
    assert exports.reads == [{"path": assets.CHECKPOINT, "sha256": hash_}]
    assert list(exports.exports[0].values())[1:3] == [Path("bundle"), False]
    assert aapt("export", "c.safetensors").code == 0
    assert exports.reads[1] == {"path": Path("c.safetensors"), "sha256": None}


def test_export_in_fp8_takes_the_scales_of_a_file(aapt: Aapt, exports: SimpleNamespace) -> None:
    ran = aapt("export", "c", "--precision", "fp8", "--scales", "s.safetensors")
    assert ran.code == 0, ran.err
    assert [list(call.values()) for call in exports.scales] == [
        [Path("s.safetensors"), "its profile"]
    ]
    assert list(exports.exports[0].values())[4] == "the file's scales"
    assert list(exports.shares[0].values()) == ["its profile", "the file's scales"]
    assert not exports.calibrations and not exports.loads


@pytest.mark.parametrize("force", [False, True])
def test_export_in_fp8_calibrates_the_checkpoint_that_it_checked(
    aapt: Aapt, exports: SimpleNamespace, force: bool
) -> None:
    ran = aapt("export", "c", "-o", "out", "--precision", "fp8", *["--force"] * force)
    assert ran.code == 0, ran.err
    assert [list(call.values()) for call in exports.refusals] == [[Path("out"), force]]
    assert exports.loads == [{"path": Path("c"), "sha256": "its hash"}]
    (calibrated,) = exports.calibrations
    assert calibrated["checkpoint"] == "networks" and isinstance(
        calibrated["report"], console.Steps
    )
    assert list(exports.exports[0].values())[4] == "new scales"
    assert list(exports.shares[0].values()) == ["its profile", "new scales"]


def test_scales_are_refused_with_any_other_precision(aapt: Aapt, exports: SimpleNamespace) -> None:
    ran = aapt("export", "c", "--scales", "s.safetensors")
    assert ran.code == 2 and "add --precision fp8" in ran.err and not exports.reads
    ran = aapt("export", "c", "--precision", "bf16")
    assert ran.code == 2 and "precisions: fp32, fp8" in ran.err and not exports.reads


# --- build-engine ---


def test_build_engine_passes_on_every_option(
    aapt: Aapt, bundle: Path, patch: pytest.MonkeyPatch
) -> None:
    calls = recorded(patch, build, "build_engine", [BUILT])
    words = (
        "--backend",
        "tensorrt",
        "--precision",
        "bf16",
        "--attention",
        "native",
        "--sm",
        "8.9,120",
        "--json",
    )
    ran = aapt("build-engine", bundle, *words)
    assert ran.code == 0, ran.err
    opened, *rest, options = calls[0].values()
    assert opened.path == bundle and rest == ["tensorrt", "bf16"]
    assert options == BuildOptions(options.report, "native", (89, 120), options.progress)
    assert isinstance(options.progress, console.Phases) and options.report is options.progress
    assert json.loads(ran.out) == {"bundle": str(bundle), "engines": [dataclasses.asdict(BUILT)]}
    assert f"building tensorrt engines in {bundle}" in ran.err and "onnxruntime-fp32" in ran.err
    aapt("build-engine", bundle)
    assert list(calls[1].values())[1:3] == ["onnxruntime", None]
    assert list(calls[1].values())[3].attention == "auto"


# --- stream ---


def streamed(**changes: Any) -> Streamed:
    done = Streamed(121, 5.042, 228.57, 512.25, "x.mp4", "done")
    return dataclasses.replace(done, **changes)


def test_stream_passes_on_every_option(aapt: Aapt, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    calls = recorded(patch, streams, "stream", streamed())
    ran = aapt(
        "stream", bundle, "-o", "x.bin", "--format", "y4m", "--seconds", 2.5, "--seed", 7,
        "--image", "dunes", "--prompt", "desert", "--controls", "c.jsonl", "--realtime",
        "--backend", "torch", "--device", "cuda", "--precision", "bf16", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    opened, request, warn, progress, sink = calls[0].values()
    assert opened.path == bundle and sink is None
    assert request == Request(
        "x.bin", "y4m", 2.5, 7, "dunes", "desert", "c.jsonl", True, "torch-cuda", "bf16"
    )
    assert warn is console.warn and isinstance(progress, console.Progress)
    assert json.loads(ran.out) == dataclasses.asdict(streamed())
    assert "streaming to x.bin" in ran.err
    ran = aapt("stream", bundle, "-o", "-")
    assert list(calls[1].values())[1] == Request("-") and "streaming to stdout" in ran.err


@pytest.mark.parametrize(
    ("words", "paced"),
    [
        ((), False), (("--controls", "-"), True), (("--controls", "c.jsonl"), False),
        (("--controls", "-", "--fast"), False), (("--realtime",), True),
    ],
)  # fmt: skip
def test_a_stream_is_paced_for_live_controls_unless_said_otherwise(
    aapt: Aapt, bundle: Path, patch: pytest.MonkeyPatch, words: tuple[str, ...], paced: bool
) -> None:
    calls = recorded(patch, streams, "stream", streamed())
    assert aapt("stream", bundle, "-o", "x.mp4", *words).code == 0
    assert list(calls[0].values())[1].realtime is paced


@pytest.mark.parametrize(("signal", "code"), [(0, 0), (2, 130), (15, 143)])
def test_a_stream_ends_with_the_code_of_its_signal(
    aapt: Aapt, bundle: Path, patch: pytest.MonkeyPatch, signal: int, code: int
) -> None:
    recorded(patch, streams, "stream", streamed(signal=signal, ended="signal"))
    assert aapt("stream", bundle, "-o", "x.mp4").code == code


def test_frames_and_json_do_not_share_stdout(aapt: Aapt, bundle: Path) -> None:
    ran = aapt("stream", bundle, "-o", "-", "--json")
    assert ran.code == 2 and ran.error == "--json writes to stdout, and so does --out -"


# --- demo and init ---


@pytest.mark.parametrize("older", [False, True])
def test_the_demo_is_the_four_steps_on_one_bundle(
    aapt: Aapt, tmp_path: Path, patch: pytest.MonkeyPatch, bundle: Path, older: bool
) -> None:
    out = tmp_path / "deep" / "demo"
    if older:
        (out / "bundle").mkdir(parents=True)
        (out / "bundle" / "manifest.json").touch()
    exports = recorded(patch, commands, "_export", ([ROW], []))
    builds = recorded(patch, commands, "_build", [BUILT])
    measures = recorded(patch, commands, "measured_latency", measured())
    flights = recorded(patch, commands, "_stream", streamed())
    opened = Bundle.open(bundle)
    patch.setattr(Bundle, "open", lambda path: opened if path == out / "bundle" else None)
    ran = aapt("demo", "-o", out, "--seconds", 3, "--json")
    assert ran.code == 0, ran.err
    assert [call.pop("report").__class__ for call in exports + builds] == [console.Steps] * 2
    assert exports == [
        {"checkpoint": None, "out": out / "bundle", "sha256": None, "force": older,
         "in_fp8": False, "scales_file": None}
    ]  # fmt: skip
    assert builds == [
        {"bundle": out / "bundle", "backend": "onnxruntime", "precision": None,
         "attention": "auto", "progress": None, "sms": (), "portable": False}
    ]  # fmt: skip
    assert isinstance(measures[0].pop("progress"), console.Progress)
    assert measures == [
        {"bundle": out / "bundle", "backend": "onnxruntime", "precision": None, "blocks": 60}
    ]
    request = Request(str(out / "demo.mp4"), seconds=3, controls=str(assets.demo_controls()))
    assert isinstance(flights[0].pop("progress"), console.Progress)
    assert flights == [{"bundle": out / "bundle", "request": request}]
    steps = ("1/4 export", "2/4 build-engine", "3/4 profile", "4/4 stream")
    assert [ran.err.index(step) for step in steps] == sorted(ran.err.index(step) for step in steps)
    paths = {"video": str(out / "demo.mp4"), "bundle": str(out / "bundle")}
    assert json.loads(ran.out) == paths | {"latency": json.loads(measured().json())}
    recorded(patch, commands, "measured_latency", measured(within=False))
    assert aapt("demo", "-o", out).code == 3


def test_init_passes_on_every_option(aapt: Aapt, tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "r.safetensors"
    out.write_bytes(b"x" * 2_340_000)
    calls = recorded(patch, random_weights, "random_checkpoint", 1_260_000)
    ran = aapt("init", "tiny-cpu", "-o", out, "--seed", 5, "--device", "cuda", "--force")
    assert ran.code == 0, ran.err
    assert list(calls[0].values()) == [load("tiny-cpu"), out, 5, "cuda", True]
    assert f"{out}: 1.3 M parameters, 2.3 MB" in ran.err
    assert "drawing weights for tiny-cpu" in ran.err
    assert aapt("init", "tiny-cpu", "-o", out).code == 0
    assert list(calls[1].values()) == [load("tiny-cpu"), out, 0, "cpu", False]


# --- profile, plan, diff, quality ---


def test_profile_measures_a_bundle_with_every_option(
    aapt: Aapt, bundle: Path, patch: pytest.MonkeyPatch
) -> None:
    calls = recorded(patch, latency, "measure_bundle", measured())
    words = ("--backend", "torch", "--device", "cpu", "--precision", "fp32", "--blocks", 17)
    ran = aapt("profile", bundle, *words, "--json")
    assert ran.code == 0, ran.err
    opened, *rest, warn, progress = calls[0].values()
    assert opened.path == bundle and rest == ["torch", "fp32", 17]
    assert warn is console.warn and isinstance(progress, console.Progress)
    assert f"profiling {bundle}" in ran.err and json.loads(ran.out)["within_budget"]
    aapt("profile", bundle)
    assert list(calls[1].values())[1:4] == ["onnxruntime", None, 120]
    recorded(patch, latency, "measure_bundle", measured(within=False))
    assert aapt("profile", bundle).code == 3


def test_profile_measures_a_preset_on_a_gpu_with_random_weights_and_its_floors(
    aapt: Aapt, patch: pytest.MonkeyPatch
) -> None:
    calls = recorded(patch, latency, "measure_random", measured())
    shapes = recorded(patch, cost, "cost_of", SimpleNamespace(floors_ms={"step": 8.75}))
    words = ("--backend", "torch", "--device", "cuda", "--precision", "bf16", "--blocks", 17)
    ran = aapt("profile", PRESET, *words, "--json")
    assert ran.code == 0, ran.err
    *asked, progress = calls[0].values()
    assert asked == [load(PRESET), "bf16", 17] and isinstance(progress, console.Progress)
    assert json.loads(ran.out)["floor_ms"] == {"step": 8.75}
    assert shapes == [{"profile": load(PRESET)}]
    aapt("profile", PRESET, "--backend", "torch", "--device", "cuda")
    assert list(calls[1].values())[1:3] == [None, 120]


def test_a_folder_is_profiled_as_a_bundle_also_where_nothing_is_built(
    aapt: Aapt, bundle: Path, patch: pytest.MonkeyPatch
) -> None:
    calls = recorded(patch, latency, "measure_bundle", measured())
    assert aapt("profile", bundle, "--backend", "torch", "--device", "cuda").code == 0
    assert list(calls[0].values())[1] == "torch-cuda"


@pytest.mark.parametrize("fits", [True, False])
def test_plan_prints_the_cost_of_a_preset_or_a_bundle(
    aapt: Aapt, bundle: Path, patch: pytest.MonkeyPatch, fits: bool
) -> None:
    true = cost.cost_of(load("tiny-cpu"))
    answer = dataclasses.replace(true, limit_gb=0, memory_gb={"weights": 2.0})
    answer = answer if fits else dataclasses.replace(answer, limit_gb=1)
    calls = recorded(patch, cost, "cost_of", answer)
    for asked, shape in ((PRESET, load(PRESET)), (bundle, Bundle.open(bundle).profile)):
        ran = aapt("plan", asked, "--json")
        assert ran.code == (0 if fits else 3), ran.err
        assert list(calls.pop().values()) == [shape]
        assert json.loads(ran.out) == json.loads(answer.json()) and "floor ms" in ran.err
    assert aapt("plan", PRESET).out == ""


def lost(**changes: Any) -> quality.Loss:
    good = dict.fromkeys(("latent_error", "drift", "drift_per_s"), 1.0)
    loss = quality.Loss(
        "p", "a", "b", [quality.Second(40.0, 0.9, 1.0, 1.0)], [0.1], 50.0, 0.0, 0.0, 0, 0, 6,
        good | {"psnr_db": 1.0, "ssim": 0.1}, {},
    )  # fmt: skip
    return dataclasses.replace(loss, **changes)


def test_quality_passes_on_every_option(
    aapt: Aapt, bundle: Path, copied: Path, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    calls, plots = recorded(patch, quality, "compare", lost()), list[object]()
    plotters = recorded(patch, quality, "plotter", plots.append)
    ran = aapt(
        "quality", bundle, "--backend", "torch", "--device", "cpu", "--precision", "fp32",
        "--reference", "onnxruntime-int8", "--reference-bundle", copied, "--seconds", 3,
        "--plot", tmp_path / "q.png", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    opened, *asked, warn, progress, other = calls[0].values()
    assert opened.path == bundle and other.path == copied
    assert asked == ["onnxruntime-int8", "torch-fp32", 3]
    assert warn is console.warn and isinstance(progress, console.Progress)
    assert plotters == [{"path": tmp_path / "q.png"}] and plots == [lost()]
    assert json.loads(ran.out) == json.loads(lost().json())
    assert f"comparing engines of {bundle}" in ran.err
    aapt("quality", bundle)
    opened, *asked, _, _, other = calls[1].values()
    assert asked == ["onnxruntime-fp32", f"onnxruntime-{_own(bundle)}", 5] and other is None
    recorded(patch, quality, "compare", lost(flat_blocks=1))
    assert aapt("quality", bundle).code == 3


def _own(bundle: Path) -> str:
    return table.precision_of(Bundle.open(bundle), "onnxruntime", None)


def test_an_fp8_bundle_is_compared_with_pytorch_in_bf16(
    aapt: Aapt, copied: Path, patch: pytest.MonkeyPatch
) -> None:
    rewrite_manifest(copied, lambda manifest: manifest.update(precision="fp8"))
    calls = recorded(patch, quality, "compare", lost())
    assert aapt("quality", copied, "--backend", "torch", "--device", "cuda").code == 0
    assert list(calls[0].values())[1:3] == ["torch-bf16", "torch-cuda-fp8"]


def test_floors_are_for_a_gpu_with_pytorch(patch: pytest.MonkeyPatch) -> None:
    calls = recorded(patch, cost, "cost_of", SimpleNamespace(floors_ms={"step": 8.75}))
    assert measure._floors(load("tiny-cpu")) == {} and not calls
    assert measure._floors(load(PRESET)) == {"step": 8.75}
    patch.setitem(sys.modules, "aapt_deploy.models.cost", None)
    assert measure._floors(load(PRESET)) == {}
