"""The route of docs/deploy-h100.md, whole: an fp8 export, built for TensorRT, streamed.

backends/trt/engine streams it, and the names of one part are those of the next.

The device is emulated, a plan is its lowered graph (`lowered_graphs`), our kernels are their
arithmetic in NumPy. Everything else is what runs on the user's machine. The frames are held against
ONNX Runtime on the exported graphs, which keeps attention in float32.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aapt_deploy.backends.trt.doctor import receipts
from aapt_deploy.bundle import scales
from aapt_deploy.bundle.bundle import Bundle, _describe
from aapt_deploy.errors import BundleError
from aapt_deploy.ops.block_causal_attention import kernels
from tests.support.bundles import rewrite_manifest
from tests.support.commands import Ran
from tests.support.fake_tensorrt import TensorRT, receipt
from tests.support.fake_tensorrt import here as here
from tests.support.opening import open_engines
from tests.support.tiny import FEW_BLOCKS, Exported, frames_of
from tests.support.trt_plans import decibels, emulated_kernels

PLUGINS = "aapt_deploy.backends.trt.plugin"
OURS = {"python": 3, "aot": 6}  # plugin layers of the three layers of attention


@pytest.fixture
def eight(
    exported: Exported, here: TensorRT, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Path:
    """The fp8 bundle without engines, on a machine where our kernels run."""
    path = Path(shutil.copytree(exported.path, tmp_path / "eight"))
    here.profile = Bundle.open(path).profile
    monkeypatch.setattr(kernels, "load", emulated_kernels(here.driver, here.profile))
    for name in OURS:
        module = "ahead_of_time" if name == "aot" else name
        plugin: Any = ModuleType(f"{PLUGINS}.{module}")
        plugin.register = lambda launchers: SimpleNamespace(failures=())
        plugin.define_once = lambda launch: None
        monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
        monkeypatch.setattr(PLUGINS + f".{module}", plugin, raising=False)
    return path


def streamed(path: Path) -> list[np.ndarray]:
    opened = Bundle.open(path)
    engines = open_engines(opened, "tensorrt")
    try:
        return frames_of(engines, opened, FEW_BLOCKS, 3)
    finally:
        engines.close()


@pytest.mark.parametrize(
    ("form", "proved", "least"),
    [
        ("python", [receipts.PLUGIN_FP8, receipts.PLUGIN_CAPTURED], 26),
        ("aot", [receipts.AOT_WORKS, receipts.AOT_OP, receipts.CAPTURED], 26),
        ("native-fp8", [receipts.FP8_ATTENTION, receipts.CAPTURED], 26),
        ("native", [receipts.CAPTURED], 30),
    ],
)
def test_an_fp8_export_becomes_a_stream(
    eight: Path,
    here: TensorRT,
    exported_frames: list[np.ndarray],
    aapt: Callable[..., Ran],
    form: str,
    proved: list[str],
    least: float,
) -> None:
    receipt(here, *proved)
    ran = aapt("build-engine", eight, "--backend", "tensorrt", "--json")
    assert ran.code == 0, ran.err
    opened = Bundle.open(eight)
    opened.verify()
    entry, ours = opened.engines["tensorrt-fp8"], form in OURS
    assert (entry["plugin"], entry["cache_layout"]) == (
        form,
        "hopper_fp8" if ours else "token_major",
    )
    audit = entry["audit"]["generator"]
    assert (
        audit["plugins"],
        audit["attention"],
        audit["fp8"],
        entry["audit"]["prompt"]["fp8"],
    ) == (OURS.get(form, 0), 3 * (not ours), 4, 4)
    assert (
        entry["parity"]["generator"] < opened.profile.quality.latent_error
        and ("scales" in entry) is ours
    )
    (told,) = json.loads(ran.out)["engines"]
    assert told["key"] == "tensorrt-fp8" and told["psnr_db"] == entry["psnr_db"] > 30
    assert "audit" not in ran.err and ("3 of TensorRT's attention" in ran.err) is not ours
    before = len(here.driver.journal)
    assert decibels(streamed(eight), exported_frames) > least
    calls = here.driver.journal[before:]
    last = max(index for index, call in enumerate(calls) if call.startswith("cuGraphInstantiate"))
    assert not any(call.startswith(("cuMemAlloc", "cuMemHostAlloc")) for call in calls[last:]), (
        "allocated while streaming"
    )
    video = eight.parent / "flight.rgb"
    ran = aapt("stream", eight, "-o", video, "--backend", "tensorrt", "--seconds", 0.5)
    assert (
        ran.code == 0
        and video.stat().st_size
        == 12 * opened.profile.video.width * opened.profile.video.height * 3
    ), ran.err


def test_scales_that_are_not_the_plan_s_are_refused(
    eight: Path, here: TensorRT, aapt: Callable[..., Ran]
) -> None:
    receipt(here, receipts.PLUGIN_FP8, receipts.PLUGIN_CAPTURED)
    assert aapt("build-engine", eight, "--backend", "tensorrt").code == 0
    file = Bundle.open(eight).engines["tensorrt-fp8"]["scales"]
    tensors = load_file(eight / file)
    del tensors["attention.01.k_scale"]
    metadata = {scales.KEY: json.dumps({"format": scales.FORMAT})}
    save_file(tensors, eight / file, metadata=metadata)
    with pytest.raises(BundleError, match="does not match the manifest"):
        open_engines(Bundle.open(eight), "tensorrt")
    rewrite_manifest(
        eight, lambda manifest: manifest["files"].update({file: _describe(eight / file)})
    )
    ran = aapt(
        "stream", eight, "-o", eight.parent / "x.rgb", "--backend", "tensorrt", "--seconds", 0.5
    )
    assert ran.code == 4 and "attention.01.k_scale is missing" in ran.error
