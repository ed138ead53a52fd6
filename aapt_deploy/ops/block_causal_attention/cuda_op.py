"""The op on a Hopper GPU with FP8 caches, `aapt::block_causal_attention_fp8` and `aapt::commit_fp8`: the kernels that TensorRT's plugin launches.

Everything goes to torch's current stream; lengths and slots are read from device memory; the only allocations are the outputs, from torch's caching
allocator. So a step may be captured once into a CUDA graph and replayed for every block of a stream.
"""

import torch
from torch import Tensor

from aapt_deploy.ops.block_causal_attention import kernels
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import TILE_KEYS, tiles

Outputs = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("aapt::block_causal_attention_fp8", mutates_args=(), device_types="cuda")
def attend(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_len: Tensor,
    q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, k_mean: Tensor,
) -> Outputs:  # fmt: skip
    """q, k, v bf16 [1, T, H, D]; caches uint8 [H, tiles, 64 * D]; cache_len int32 [1]; q_scale, k_scale float32 [H]; v_scale, k_mean float32 [H, D].

    Returns out bf16 [1, T, H, D] and the block images k_block, v_block uint8 [H, ceil(T / 64), 64 * D]; the caches are only read.
    Raises MachineError on a GPU that is no Hopper.
    """
    _check(q, k, v, k_cache, v_cache)
    out, k_block, v_block = _empty(q, k, v, k_cache, v_cache)
    pack_into(k, v, k_scale, k_mean, v_scale, k_block, v_block)
    attend_into(q, k_block, v_block, k_cache, v_cache, cache_len, q_scale, k_scale, v_scale, out)
    return out, k_block, v_block


@attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_len: Tensor,
    q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, k_mean: Tensor,
) -> Outputs:  # fmt: skip
    return _empty(q, k, v, k_cache, v_cache)


@torch.library.custom_op(
    "aapt::commit_fp8", mutates_args=("k_cache", "v_cache"), device_types="cuda"
)
def commit(
    k_block: Tensor, v_block: Tensor, slot: Tensor, k_cache: Tensor, v_cache: Tensor, tokens: int
) -> None:
    """Move the `tokens` tokens of block images into the caches, from token slot[0] on (int32 [1], on the device). A slot outside moves nothing."""
    commit_into(k_block, v_block, slot, k_cache, v_cache, tokens)


@commit.register_fake
def _(
    k_block: Tensor, v_block: Tensor, slot: Tensor, k_cache: Tensor, v_cache: Tensor, tokens: int
) -> None:
    pass


# The three launches, for callers that own all memory: an engine's blocks must stay where its captured graph has them.


def pack_into(
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    k_mean: Tensor,
    v_scale: Tensor,
    k_block: Tensor,
    v_block: Tensor,
) -> None:
    """k, v bf16 [1, T, H, D] -> their block images."""
    _, tokens, heads, dim = k.shape
    _launch("aapt_pack", dim, (k, v, k_scale, k_mean, v_scale), (tokens, heads), (k_block, v_block))


def attend_into(
    q: Tensor, k_block: Tensor, v_block: Tensor, k_cache: Tensor, v_cache: Tensor, cache_len: Tensor,
    q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """q bf16 [1, T, H, D] over the caches' valid tokens and the block's own -> out, like q."""
    _, tokens, heads, dim = q.shape
    read = (q, k_block, v_block, k_cache, v_cache, cache_len, q_scale, k_scale, v_scale)
    _launch("aapt_attend", dim, read, (tokens, heads, k_cache.shape[1]), (out,))


def commit_into(
    k_block: Tensor, v_block: Tensor, slot: Tensor, k_cache: Tensor, v_cache: Tensor, tokens: int
) -> None:
    """See `commit`."""
    heads, cache_tiles, size = k_cache.shape
    _launch(
        "aapt_commit",
        size // TILE_KEYS,
        (k_block, v_block, slot),
        (tokens, heads, cache_tiles),
        (k_cache, v_cache),
    )


def _launch(
    kernel: str,
    head_dim: int,
    inputs: tuple[Tensor, ...],
    numbers: tuple[int, ...],
    outputs: tuple[Tensor, ...],
) -> None:
    stream = torch.cuda.current_stream(outputs[0].device).cuda_stream
    loaded = kernels.load(head_dim, kernels.VARIANTS[kernels.CHOSEN])
    loaded(kernel, _at(*inputs), numbers, _at(*outputs), stream)


def _check(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    one, _, heads, dim = q.shape
    assert one == 1 and q.shape == k.shape == v.shape and k_cache.shape == v_cache.shape, (
        f"{q.shape=} {k.shape=} {v.shape=} {k_cache.shape=}"
    )
    assert (k_cache.shape[0], k_cache.shape[2]) == (
        heads,
        TILE_KEYS * dim,
    ) and k_cache.dtype == torch.uint8, f"{k_cache.shape=} {k_cache.dtype=}"
    assert {q.dtype, k.dtype, v.dtype} == {torch.bfloat16}, f"{q.dtype=} {k.dtype=} {v.dtype=}"


def _empty(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Outputs:
    heads, _, size = k_cache.shape
    image = (heads, tiles(q.shape[1]), size)
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        k_cache.new_empty(image),
        v_cache.new_empty(image),
    )


def _at(*tensors: Tensor) -> tuple[int, ...]:
    """Device addresses, of tensors that lie in memory as their shape says."""
    assert all(tensor.is_contiguous() for tensor in tensors), [
        tuple(tensor.stride()) for tensor in tensors
    ]
    return tuple(tensor.data_ptr() for tensor in tensors)
