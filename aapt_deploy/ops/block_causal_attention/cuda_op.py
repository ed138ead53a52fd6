"""The op on a Hopper GPU with FP8 caches, by the kernels that TensorRT's plugin launches.

    aapt::block_causal_attention_fp8   attend: packs the block and attends
    aapt::commit_fp8                   commit: moves a block image into the caches

Every launch is queued on torch's current stream. Lengths and slots are read from device memory. The
only allocations are the outputs, from torch's caching allocator. So a step may be captured once
into a CUDA graph and replayed for every block of a stream.
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
    """Return out bf16 [1, T, H, D] and the block images k_block, v_block.

        q, k, v             bf16 [1, T, H, D]
        k_cache, v_cache    uint8 [H, tiles, 64 * D], only read
        cache_len           int32 [1]
        q_scale, k_scale    float32 [H]
        v_scale, k_mean     float32 [H, D]
        k_block, v_block    uint8 [H, ceil(T / 64), 64 * D]

    Raises MachineError if the GPU is not a Hopper.
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
    """Move the `tokens` tokens of block images into the caches, from token slot[0] on.

    slot is int32 [1], on the device. A slot outside the caches moves nothing.
    """
    commit_into(k_block, v_block, slot, k_cache, v_cache, tokens)


@commit.register_fake
def _(
    k_block: Tensor, v_block: Tensor, slot: Tensor, k_cache: Tensor, v_cache: Tensor, tokens: int
) -> None:
    pass


# The three launches, for callers that own all memory: a captured graph has fixed addresses.


def pack_into(
    k: Tensor, v: Tensor, k_scale: Tensor, k_mean: Tensor, v_scale: Tensor,
    k_block: Tensor, v_block: Tensor,
) -> None:  # fmt: skip
    """Pack k, v bf16 [1, T, H, D] into their block images."""
    _, tokens, heads, dim = k.shape
    _launch("aapt_pack", dim, (k, v, k_scale, k_mean, v_scale), (tokens, heads), (k_block, v_block))


def attend_into(
    q: Tensor, k_block: Tensor, v_block: Tensor, k_cache: Tensor, v_cache: Tensor,
    cache_len: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Attend from q bf16 [1, T, H, D] to the caches' valid tokens and the block's; write out."""
    _, tokens, heads, dim = q.shape
    read = (q, k_block, v_block, k_cache, v_cache, cache_len, q_scale, k_scale, v_scale)
    _launch("aapt_attend", dim, read, (tokens, heads, k_cache.shape[1]), (out,))


def commit_into(
    k_block: Tensor, v_block: Tensor, slot: Tensor, k_cache: Tensor, v_cache: Tensor, tokens: int
) -> None:
    """Move a block image into the caches; see `commit`."""
    heads, cache_tiles, size = k_cache.shape
    read, numbers = (k_block, v_block, slot), (tokens, heads, cache_tiles)
    _launch("aapt_commit", size // TILE_KEYS, read, numbers, (k_cache, v_cache))


def _launch(
    kernel: str, head_dim: int,
    inputs: tuple[Tensor, ...], numbers: tuple[int, ...], outputs: tuple[Tensor, ...],
) -> None:  # fmt: skip
    stream = torch.cuda.current_stream(outputs[0].device).cuda_stream
    loaded = kernels.load(head_dim, kernels.VARIANTS[kernels.CHOSEN])
    loaded(kernel, _at(*inputs), numbers, _at(*outputs), stream)


def _check(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    one, _, heads, dim = q.shape
    assert one == 1 and q.shape == k.shape == v.shape, f"{q.shape=} {k.shape=} {v.shape=}"
    assert k_cache.shape == v_cache.shape, f"{k_cache.shape=} {v_cache.shape=}"
    assert (len(k_cache), k_cache.shape[2]) == (heads, TILE_KEYS * dim), f"{k_cache.shape=}"
    assert k_cache.dtype == torch.uint8, f"{k_cache.dtype=}"
    assert {q.dtype, k.dtype, v.dtype} == {torch.bfloat16}, f"{q.dtype=} {k.dtype=} {v.dtype=}"


def _empty(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Outputs:
    heads, _, size = k_cache.shape
    image = (heads, tiles(q.shape[1]), size)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, k_cache.new_empty(image), v_cache.new_empty(image)


def _at(*tensors: Tensor) -> tuple[int, ...]:
    """Return the device addresses of contiguous tensors."""
    assert all(t.is_contiguous() for t in tensors), [tuple(t.stride()) for t in tensors]
    return tuple(tensor.data_ptr() for tensor in tensors)
