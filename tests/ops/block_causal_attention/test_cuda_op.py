"""The op in FP8 on a CPU: its launches reach the kernels' own source, run thread by thread."""

import ctypes
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from aapt_deploy.ops.block_causal_attention import cuda_op, kernels
from tests.support.attention_checks import Case
from tests.support.kernels_on_cpu import COMPILER, build, launch_at

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")
TOKENS, CACHED, HEADS, DIM = 70, 130, 3, 64  # 2 tiles of the block, 4 of the cache
STREAM = 77


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(kernels.source_file(), DIM, tmp_path_factory.mktemp("cpu") / "kernels.so")


@pytest.fixture(scope="module")
def case() -> Case:
    """Inputs of one launch. Do not change them."""
    return Case("plain", TOKENS, CACHED, HEADS, DIM, 0, "cpu", spare=110)


@pytest.fixture
def launched(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels that were launched, on the current stream of the tensors' device."""
    seen: list[str] = []

    def load(head_dim: int, variant: kernels.Variant) -> Callable[..., None]:
        assert (head_dim, variant) == (DIM, kernels.VARIANTS[kernels.CHOSEN])

        def launch(
            kernel: str, inputs: Sequence[int], numbers: Sequence[int], outputs: Sequence[int],
            stream: int,
        ) -> None:  # fmt: skip
            assert stream == STREAM
            assert tuple(map(len, (inputs, numbers, outputs))) == tuple(
                map(len, kernels.ABI[kernel])
            )
            seen.append(kernel)
            launch_at(library, kernel, inputs, numbers, outputs)

        return launch

    def current_stream(device: torch.device) -> SimpleNamespace:
        assert device == torch.device("cpu"), "the current stream of another device"
        return SimpleNamespace(cuda_stream=STREAM)

    monkeypatch.setattr(kernels, "load", load)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    return seen


def own(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The block's q, k, v [1, T, H, D]."""
    return case.q[None], *(x[None, CACHED:].contiguous() for x in (case.k, case.v))


def length() -> Tensor:
    return torch.tensor([CACHED], dtype=torch.int32)


@needs_compiler
def test_the_op_packs_its_block_and_attends_to_cache_and_block(
    case: Case, launched: list[str]
) -> None:
    s, before = case.scales, [x.clone() for x in case.cache]
    out, *images = cuda_op.attend._init_fn(
        *own(case), *case.cache, length(), s.q, s.k, s.v, s.k_mean
    )
    assert launched == ["aapt_pack", "aapt_attend"]
    assert all(torch.equal(*pair) for pair in zip(images, case.block, strict=True))
    assert all(torch.equal(*pair) for pair in zip(case.cache, before, strict=True))
    assert out.shape == (1, TOKENS, HEADS, DIM) and out.dtype == torch.bfloat16
    error = (out[0].float() - case.model).square().mean() / case.model.square().mean()
    assert error < 1e-5


@needs_compiler
@pytest.mark.parametrize("slot", [0, 1, 150, -1])
def test_a_commit_moves_the_block_to_its_slot_and_nothing_else(
    case: Case, launched: list[str], slot: int
) -> None:
    def commit(
        kernel: str, inputs: Sequence[Tensor], numbers: Sequence[int], outputs: Sequence[Tensor]
    ) -> None:
        assert kernel == "aapt_commit" and numbers[0] == TOKENS
        cuda_op.commit._init_fn(*inputs, *outputs, TOKENS)

    assert case.commit(commit, slot) and launched == ["aapt_commit"]


def test_without_numbers_the_op_gives_its_outputs_shapes() -> None:
    """What a compiler or an exporter asks for."""
    meta = lambda shape, dtype: torch.empty(shape, dtype=dtype, device="meta")
    block = meta((1, HEADS, TOKENS, DIM), torch.bfloat16).transpose(1, 2)  # strided
    cache = meta((HEADS, 4, 64 * DIM), torch.uint8)
    of_head, of_channel = meta((HEADS,), torch.float32), meta((HEADS, DIM), torch.float32)
    size = meta((1,), torch.int32)
    out, *images = torch.ops.aapt.block_causal_attention_fp8(
        block, block, block, cache, cache, size, of_head, of_head, of_channel, of_channel
    )
    assert out.shape == block.shape and out.dtype == torch.bfloat16 and out.is_contiguous()
    for image in images:
        assert image.shape == (HEADS, 2, 64 * DIM) and image.dtype == torch.uint8
    assert torch.ops.aapt.commit_fp8(*images, size, cache, cache, TOKENS) is None


def with_(position: int, change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], None]:
    def damage(given: list[Tensor]) -> None:
        given[position] = change(given[position])

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda given: given.__setitem__(slice(3), [x.repeat(2, 1, 1, 1) for x in given[:3]]),
         r"q\.shape=torch\.Size\(\[2, 70, 3, 64\]\)"),
        (with_(1, lambda k: k[:, :-1]), r"k\.shape=torch\.Size\(\[1, 69, 3, 64\]\)"),
        (with_(2, lambda v: v[:, :, :-1]), r"v\.shape=torch\.Size\(\[1, 70, 2, 64\]\)"),
        (with_(4, lambda cache: cache[:, :-1]), r"v_cache\.shape=torch\.Size\(\[3, 3, 4096\]\)"),
        (lambda given: given.__setitem__(slice(3, 5), [x[:-1] for x in given[3:5]]),
         r"k_cache\.shape=torch\.Size\(\[2, 4, 4096\]\)"),
        (lambda given: given.__setitem__(slice(3, 5), [x[..., 1:] for x in given[3:5]]),
         r"k_cache\.shape=torch\.Size\(\[3, 4, 4095\]\)"),
        (with_(3, lambda cache: cache.view(torch.int8)), r"k_cache\.dtype=torch\.int8"),
        (with_(0, Tensor.float), r"q\.dtype=torch\.float32"),
        (with_(1, Tensor.half), r"k\.dtype=torch\.float16"),
        (with_(2, Tensor.half), r"v\.dtype=torch\.float16"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_before_a_launch(
    case: Case, damage: Callable[[list[Tensor]], None], words: str
) -> None:
    s = case.scales
    given = [*own(case), *case.cache, length(), s.q, s.k, s.v, s.k_mean]
    damage(given)
    with pytest.raises(AssertionError, match=words):
        cuda_op.attend._init_fn(*given)


@needs_compiler
def test_a_tensor_with_gaps_has_no_address(case: Case, launched: list[str]) -> None:
    _, k, v = own(case)
    gaps = k.transpose(1, 2).contiguous().transpose(1, 2)
    s = case.scales
    with pytest.raises(AssertionError, match=r"\(13440, 64, 4480, 1\)"):
        cuda_op.pack_into(gaps, v, s.k, s.k_mean, s.v, *case.block)
    assert launched == []
