"""What a GPU's kernels will be held against, itself checked on a CPU.

The layout and the emulator check it, and the kernels run thread by thread.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from aapt_deploy.ops.block_causal_attention import Ring, emulator, kernels
from aapt_deploy.ops.block_causal_attention import hopper_fp8 as layout
from tests.support import attention_checks as checks
from tests.support.attention_checks import RINGS, Case, Run, Stream
from tests.support.kernels_on_cpu import COMPILER, build, launches

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Launches of the kernels for D = 64 on this CPU."""
    return launches(build(kernels.source_file(), 64, tmp_path_factory.mktemp("cpu") / "kernels.so"))


def test_the_model_is_the_emulator_and_the_images_are_the_layouts() -> None:
    """Two ways of writing the same thing down, of which one runs on a GPU."""
    case = Case("sink", 70, 200, 2, 64, 0, "cpu")
    s = layout.Scales(
        *(x.numpy() for x in (case.scales.q, case.scales.k, case.scales.k_mean, case.scales.v))
    )
    k, v = (x.float().numpy() for x in (case.k, case.v))
    block = layout.pack(k[200:], v[200:], s)
    for mine, its in zip(case.block, block, strict=True):
        np.testing.assert_array_equal(mine.numpy(), its)
    for found, stored in zip(
        layout.unpack_codes(*(x.numpy() for x in case.cache), 200), case.codes[1:], strict=True
    ):
        np.testing.assert_array_equal(found, stored[:200].view(torch.uint8).numpy())
    its = emulator.attend(
        case.q.float().numpy(), *block, 70, *(x.numpy() for x in case.cache), 200, s, emulator.EXACT
    )
    assert checks.rmse(case.model.bfloat16(), torch.from_numpy(its)) < 1e-3
    assert 1e-3 < checks.rmse(case.model, case.exact) < 0.1


@pytest.mark.parametrize(
    ("kind", "tokens", "cached"),
    [("plain", 1, 0), ("sharp", 65, 130), ("sink", 140, 64), ("outlier", 63, 1)],
)
def test_the_checks_pass_on_right_kernels(run: Run, kind: str, tokens: int, cached: int) -> None:
    case = Case(kind, tokens, cached, 1, 64, tokens, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(case.pack(run), case.block, strict=True))
    found = case.check(run)
    assert found["ok"] and found["from_model"] < 3e-3, found
    for slot in (0, 1, cached + 70 - tokens, -1, 10_000):
        assert case.commit(run, slot)


def test_the_checks_fail_on_wrong_kernels(run: Run) -> None:
    case = Case("plain", 65, 130, 1, 64, 0, "cpu")

    def short(
        kernel: str, inputs: Sequence[Tensor], numbers: Sequence[int], outputs: Sequence[Tensor]
    ) -> None:
        """One key of the cache is forgotten; one byte is wrong; the last row is not written."""
        if kernel == "aapt_attend":
            inputs = [*inputs[:5], inputs[5] - 20, *inputs[6:]]
        run(kernel, inputs, numbers, outputs)
        if kernel != "aapt_attend":
            outputs[1].view(-1)[5] ^= 1

    assert not case.check(short)["ok"]
    assert not all(torch.equal(a, b) for a, b in zip(case.pack(short), case.block, strict=True))
    assert not case.commit(short, 3)


@pytest.mark.parametrize("ring", RINGS, ids=str)
def test_a_stream_through_every_ring(run: Run, ring: Ring) -> None:
    """The kernels on a ring that fills and wraps.

    Checks text, sink, slots and lengths of `Ring`, and commits into tiles that two blocks share.
    """
    blocks = ring.sink_blocks + 2 * ring.window_blocks + 1
    stream = Stream(run, ring, blocks, 1, 64, 0, "cpu")
    errors = stream.errors(stream.launch)
    assert len(errors) == blocks and max(errors) < 0.06, errors
    stream = Stream(run, ring, blocks, 1, 64, 0, "cpu")

    def misplaced() -> None:
        stream.slot.zero_()
        stream.launch()

    assert max(stream.errors(misplaced)) > 0.1
