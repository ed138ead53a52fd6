"""The functions of fused.py on a GPU: four Triton kernels and PyTorch's FP8 product.

Rows are read once and written once. Nothing synchronises, and memory comes from torch's caching
allocator alone. So a step may be captured into a CUDA graph after one run has compiled
everything.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aapt_deploy.ops.fused import FP8

ELEMENTS = 2048  # of one program of an elementwise kernel
GELU_2C = 1.5957691216057308  # 2 * sqrt(2 / pi)


@triton.jit
def _e4m3(x, step):  # type: ignore[no-untyped-def]
    """x / step, saturated; the store rounds."""
    return tl.minimum(tl.maximum(x / step, -448.0), 448.0)


@triton.jit  # type: ignore[untyped-decorator]
def _modulate(x, y, gate, shift, scale, step, kept, out, dim, eps,  # type: ignore[no-untyped-def]
              RESIDUAL: tl.constexpr, QUANTISED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One row of [N, dim]: out = rms_norm(kept) * (1 + scale) + shift.

    kept is x, or with RESIDUAL x + (1 + gate) * y.
    """
    at = tl.arange(0, BLOCK)
    inside = at < dim
    row = tl.program_id(0).to(tl.int64) * dim + at
    value = tl.load(x + row, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        residual = tl.load(y + row, mask=inside, other=0.0).to(tl.float32)
        value += (1.0 + tl.load(gate + at, mask=inside, other=0.0)) * residual
        rounded = value.to(kept.dtype.element_ty)
        tl.store(kept + row, rounded, mask=inside)
        value = rounded.to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / dim + eps)
    moved = tl.load(shift + at, mask=inside, other=0.0)
    value = value * (1.0 + tl.load(scale + at, mask=inside, other=0.0)) + moved
    if QUANTISED:
        value = _e4m3(value, tl.load(step))
    tl.store(out + row, value.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _turn(source, weight, cos, sin, target, at, column, inside, eps,  # type: ignore[no-untyped-def]
          P: tl.constexpr):  # fmt: skip
    """One of q and k of one token: [HEADS, PAIRS] twice, normed per head and rotated."""
    a = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + at + P, mask=inside, other=0.0).to(tl.float32)
    norm = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * P) + eps)[:, None]
    a = a * norm * tl.load(weight + column, mask=column < P, other=0.0)
    b = b * norm * tl.load(weight + P + column, mask=column < P, other=0.0)
    tl.store(target + at, (a * cos - b * sin).to(target.dtype.element_ty), mask=inside)
    tl.store(target + at + P, (a * sin + b * cos).to(target.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _heads(qkv, norm_q, norm_k, rope, q, k, v, N, eps,  # type: ignore[no-untyped-def]
           H: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """One token: qkv [3, H, 2 * P] -> q, k, v [H, 2 * P].

    HEADS and PAIRS are H and P, rounded up to powers of two.
    """
    row = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
    inside = (head < H) & (column < P)
    at = head * (2 * P) + column
    cos = tl.load(rope + row * P + column, mask=column < P, other=0.0)
    sin = tl.load(rope + (row + N) * P + column, mask=column < P, other=0.0)
    source, target = qkv + row * (3 * H * 2 * P), row * (H * 2 * P)
    _turn(source, norm_q, cos, sin, q + target, at, column, inside, eps, P)
    _turn(source + H * 2 * P, norm_k, cos, sin, k + target, at, column, inside, eps, P)
    for half in tl.static_range(2):
        value = tl.load(source + 2 * H * 2 * P + at + half * P, mask=inside, other=0.0)
        tl.store(v + target + at + half * P, value, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _pointwise(x, step, out, count,  # type: ignore[no-untyped-def]
               GELU_C: tl.constexpr, GELU: tl.constexpr, QUANTISED: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        value = value * tl.sigmoid(GELU_C * (value + 0.044715 * value * value * value))
    if QUANTISED:
        value = _e4m3(value, tl.load(step))
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def quantised(x: Tensor, step: Tensor) -> Tensor:
    return _run_pointwise(x, step, False)


def activated(x: Tensor, step: Tensor | None) -> Tensor:
    return _run_pointwise(x, step, True)


def _run_pointwise(x: Tensor, step: Tensor | None, gelu: bool) -> Tensor:
    assert x.is_contiguous(), f"{x.stride()=}"
    out = torch.empty_like(x, dtype=x.dtype if step is None else FP8)
    grid = (triton.cdiv(x.numel(), ELEMENTS),)
    scale, quantise = x if step is None else step, step is not None
    _pointwise[grid](
        x, scale, out, x.numel(), GELU_C=GELU_2C, GELU=gelu, QUANTISED=quantise, BLOCK=ELEMENTS
    )
    return out


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float, step: Tensor | None) -> Tensor:
    return _run_modulate(x, None, shift, shift, scale, eps, step)[1]


def gated(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor,
    eps: float, step: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _run_modulate(x, y, gate, shift, scale, eps, step)


def _run_modulate(
    x: Tensor, y: Tensor | None, gate: Tensor, shift: Tensor, scale: Tensor,
    eps: float, step: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, dim = x.shape
    assert x.is_contiguous() and (y is None or y.is_contiguous()), f"{x.stride()=}"
    for row in (gate, shift, scale):
        assert row.is_contiguous() and row.dtype == torch.float32, f"{row.stride()=} {row.dtype=}"
    out = torch.empty_like(x, dtype=x.dtype if step is None else FP8)
    kept = x if y is None else torch.empty_like(x)
    _modulate[(n,)](
        x, x if y is None else y, gate, shift, scale, shift if step is None else step, kept, out,
        dim, eps, RESIDUAL=y is not None, QUANTISED=step is not None,
        BLOCK=triton.next_power_of_2(dim), num_warps=8,
    )  # fmt: skip
    return kept, out


def heads(
    qkv: Tensor, norm_q: Tensor, norm_k: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    n, dim = len(qkv), len(norm_q)
    count = qkv.shape[1] // (3 * dim)
    assert qkv.is_contiguous() and rope.is_contiguous(), f"{qkv.stride()=} {rope.stride()=}"
    assert rope.shape == (2, n, dim // 2), f"{rope.shape=}"
    q, k, v = (qkv.new_empty((1, n, count, dim)) for _ in range(3))
    pairs = triton.next_power_of_2(dim // 2)
    _heads[(n,)](
        qkv, norm_q, norm_k, rope, q, k, v, n, eps, H=count, P=dim // 2,
        HEADS=triton.next_power_of_2(count), PAIRS=pairs, num_warps=8,
    )  # fmt: skip
    return q, k, v


def product(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Multiply as in fused.py, by cuBLASLt or CUTLASS.

    `in` and `out` must be multiples of 16, `dtype` and bias bf16. With `use_fast_accum` the
    tensor core's own accumulator, of some 13 bits, takes the whole sum; bench/headline.py
    measures it.
    """
    return torch._scaled_mm(
        x, weight.t(), scale_a=x_scale, scale_b=weight_scale, bias=bias, out_dtype=dtype,
        use_fast_accum=True,
    )  # fmt: skip
