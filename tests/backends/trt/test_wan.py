"""The Wan family on TensorRT, over the emulated device: text beside the cache, several passes.

A plan is its lowered graph. The real compiler takes these graphs in test_real_tensorrt.py.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from aapt_deploy.backends.build import build_engine
from aapt_deploy.backends.trial import BuildOptions
from aapt_deploy.backends.trt.doctor import receipts
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.engine import Engines
from aapt_deploy.rollout.loop import Rollout, Steering
from tests.support.fake_tensorrt import TensorRT, receipt
from tests.support.fake_tensorrt import here as here
from tests.support.opening import open_engines
from tests.support.trt_plans import assert_same, decibels

BLOCKS = 6  # the window and the sink are full before


def frames_of(engines: Engines, profile: Profile) -> list[np.ndarray]:
    """A stream from noise whose prompt changes once."""
    rng = np.random.default_rng(7)
    shape = (1, profile.text.tokens, profile.text.dim)
    texts = [rng.standard_normal(shape, np.float32) for _ in range(2)]
    stream = Rollout(engines, profile, None, seed=3)
    made = [stream.step(Steering(None, texts[block // 3])) for block in range(BLOCKS)]
    engines.close()
    return made


@pytest.fixture
def wan(wan_bundle: Path, here: TensorRT, tmp_path: Path) -> Bundle:
    opened = Bundle.open(Path(shutil.copytree(wan_bundle, tmp_path / "wan")))
    here.profile = opened.profile
    receipt(here, receipts.CAPTURED)
    return opened


@pytest.mark.parametrize(("precision", "least"), [("fp32", None), ("bf16", 30)])
def test_a_stream_is_that_of_onnx_runtime(wan: Bundle, precision: str, least: int | None) -> None:
    said = list[str]()
    build_engine(wan, "tensorrt", precision, BuildOptions(said.append))
    entry = wan.engines[f"tensorrt-{precision}"]
    assert (entry["plugin"], entry["cache_layout"]) == ("native", "token_major")
    # Of every layer: the cache's attention, and the text's.
    assert entry["audit"]["generator"]["attention_expected"] == 2 * wan.profile.model.depth
    wanted = frames_of(open_engines(wan, "onnxruntime", "fp32"), wan.profile)
    found = frames_of(open_engines(wan, "tensorrt", precision), wan.profile)
    assert [len(frames) for frames in found] == [len(frames) for frames in wanted]
    if least is None:
        assert_same(found, wanted)
    else:
        assert decibels(found, wanted) > least
