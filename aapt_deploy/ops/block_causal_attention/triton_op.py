"""The op on any NVIDIA GPU with token-major caches in bf16 (or fp16, fp32).

A plain flash kernel in Triton, for GPUs and precisions without FP8, and to check the FP8 kernels
independently. Importing it makes `torch.ops.aapt.block_causal_attention` run on CUDA tensors.
The cache and the block are two runs of keys. The cache's valid length is read from device
memory, so one CUDA graph serves every step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aapt_deploy.ops.block_causal_attention import softmax_scale, torch_op

ROWS, KEYS = 64, 64  # of one tile of scores
LOG2_E = 1.4426950408889634


@triton.jit  # type: ignore[untyped-decorator]
def _visit(q, k, v, length, scale, acc, maximum, total, stride,  # type: ignore[no-untyped-def]
           D: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """Add keys 0 .. length - 1 of one head, rows `stride` apart, to the running softmax.

    q [ROWS, D], acc [ROWS, D], maximum and total [ROWS].
    """
    column = tl.arange(0, D)
    for first in range(0, length, KEYS):
        key = first + tl.arange(0, KEYS)
        at = key[:, None].to(tl.int64) * stride + column[None, :]
        inside = key[:, None] < length
        keys = tl.trans(tl.load(k + at, mask=inside, other=0.0))
        scores = tl.dot(q, keys, input_precision="ieee") * scale  # [ROWS, KEYS]
        scores = tl.where(key[None, :] < length, scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        rescale = tl.exp2(maximum - higher)
        total = total * rescale + tl.sum(p, 1)
        values = tl.load(v + at, mask=inside, other=0.0)
        acc = acc * rescale[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
        maximum = higher
    return acc, maximum, total


@triton.jit  # type: ignore[untyped-decorator]
def _attend(q, k, v, k_cache, v_cache, cache_len, out, T, scale,  # type: ignore[no-untyped-def]
            H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """q, k, v, out [T, H, D]; caches [S, H, D]. Grid (ceil(T / ROWS), H)."""
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = (row[:, None].to(tl.int64) * H + head) * D + tl.arange(0, D)[None, :]
    inside = row[:, None] < T
    queries = tl.load(q + at, mask=inside, other=0.0)
    acc = tl.zeros([ROWS, D], tl.float32)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc, maximum, total = _visit(
        queries, k + head * D, v + head * D, T, scale, acc, maximum, total, H * D, D, KEYS
    )
    k_past, v_past, length = k_cache + head * D, v_cache + head * D, tl.load(cache_len)
    acc, maximum, total = _visit(
        queries, k_past, v_past, length, scale, acc, maximum, total, H * D, D, KEYS
    )
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


@torch_op.operator.register_kernel("cuda")
def attend(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_len: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, T, H, D], caches [1, S, H, D], cache_len int32 [1] -> out, k, v.

    All of one dtype. out is like q; k and v are the block's own. D is a power of 2.
    """
    out = attended(q, k, v, k_cache, v_cache, cache_len)
    return out, k.contiguous().clone(), v.contiguous().clone()


def attended(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_len: Tensor
) -> Tensor:
    """Compute `attend` without copies of the block."""
    streams, tokens, heads, dim = q.shape
    assert streams == 1, f"{q.shape=}: several streams are for training, in the plain form"
    assert q.dtype == k_cache.dtype == v_cache.dtype, f"{q.dtype=} {k_cache.dtype=}"
    assert dim & dim - 1 == 0, f"{dim=}"
    q, k, v = (x.contiguous() for x in (q, k, v))
    assert k_cache.is_contiguous() and v_cache.is_contiguous()
    out = torch.empty_like(q)
    grid = (triton.cdiv(tokens, ROWS), heads)
    scale = softmax_scale(dim) * LOG2_E
    _attend[grid](
        q, k, v, k_cache, v_cache, cache_len, out, tokens, scale,
        H=heads, D=dim, ROWS=ROWS, KEYS=KEYS,
    )  # fmt: skip
    return out
