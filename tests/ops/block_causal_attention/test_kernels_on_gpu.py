"""The kernels on a Hopper GPU: bytes, accuracy, repeatability.

Every ring is launched, and replayed from a graph. bench/attention.py does more of it.
"""

import pytest
import torch

from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import HEAD_DIMS
from tests.support import attention_checks as checks
from tests.support.attention_checks import RINGS, Case, Stream

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")]


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(
    ("kind", "tokens", "cached"),
    [
        ("plain", 1, 0),
        ("plain", 63, 1),
        ("sharp", 64, 64),
        ("outlier", 65, 4801),
        ("plain", 1196, 100),
        ("sink", 1196, 36_136),
        ("plain", 1, 112_001),
    ],
)
def test_a_launch(dim: int, kind: str, tokens: int, cached: int) -> None:
    run, case = checks.on_gpu(dim), Case(kind, tokens, cached, 2, dim, tokens, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(case.pack(run), case.block, strict=True))
    found = case.check(run)
    assert found["ok"], found
    last = 64 * case.cache[0].shape[1] - tokens
    assert all(case.commit(run, slot) for slot in (0, 1, last, last + 1, -1))


@pytest.mark.parametrize("captured", [False, True], ids=["launched", "replayed"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("ring", RINGS, ids=str)
def test_a_stream(ring: Ring, dim: int, captured: bool) -> None:
    stream = Stream(
        checks.on_gpu(dim), ring, ring.sink_blocks + 2 * ring.window_blocks + 1, 2, dim, 0, "cuda"
    )
    errors = stream.errors(checks.replayed(stream) if captured else stream.launch)
    assert max(errors) < 0.06, errors
