"""The functions of fused.py on a GPU: four Triton kernels and PyTorch's FP8 product.

Rows are read once and written once; nothing synchronises, and memory comes from torch's caching allocator alone, so a step may be captured into a
CUDA graph after one run has compiled everything.
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
    """One row of [N, dim]. RESIDUAL: kept = x + (1 + gate) * y first. out = rms_norm * (1 + scale) + shift."""
    at = tl.arange(0, BLOCK)
    inside = at < dim
    row = tl.program_id(0).to(tl.int64) * dim + at
    value = tl.load(x + row, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        value += (1.0 + tl.load(gate + at, mask=inside, other=0.0)) * tl.load(
            y + row, mask=inside, other=0.0
        ).to(tl.float32)
        rounded = value.to(kept.dtype.element_ty)
        tl.store(kept + row, rounded, mask=inside)
        value = rounded.to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / dim + eps)
    value = value * (1.0 + tl.load(scale + at, mask=inside, other=0.0)) + tl.load(
        shift + at, mask=inside, other=0.0
    )
    if QUANTISED:
        value = _e4m3(value, tl.load(step))
    tl.store(out + row, value.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _turn(source, weight, cos, sin, target, at, column, inside, eps, P: tl.constexpr):  # type: ignore[no-untyped-def]
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
    """One token: qkv [3, H, 2 * P] -> q, k, v [H, 2 * P]. HEADS and PAIRS are the powers of two that hold H and P."""
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
def _pointwise(
    x,
    step,
    out,
    count,
    GELU_C: tl.constexpr,
    GELU: tl.constexpr,
    QUANTISED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def]
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
    _pointwise[grid](
        x,
        x if step is None else step,
        out,
        x.numel(),
        GELU_C=GELU_2C,
        GELU=gelu,
        QUANTISED=step is not None,
        BLOCK=ELEMENTS,
    )
    return out


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float, step: Tensor | None) -> Tensor:
    return _run_modulate(x, None, shift, shift, scale, eps, step)[1]


def gated(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    step: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _run_modulate(x, y, gate, shift, scale, eps, step)


def _run_modulate(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    step: Tensor | None,
) -> tuple[Tensor, Tensor]:
    n, dim = x.shape
    assert x.is_contiguous() and (y is None or y.is_contiguous()), f"{x.stride()=}"
    assert all(
        row.is_contiguous() and row.dtype == torch.float32 for row in (gate, shift, scale)
    ), f"{gate.stride()=} {shift.stride()=}"
    out = torch.empty_like(x, dtype=x.dtype if step is None else FP8)
    kept = x if y is None else torch.empty_like(x)
    _modulate[(n,)](
        x, x if y is None else y, gate, shift, scale, shift if step is None else step, kept, out, dim, eps,
        RESIDUAL=y is not None, QUANTISED=step is not None, BLOCK=triton.next_power_of_2(dim), num_warps=8,
    )  # fmt: skip
    return kept, out


def heads(
    qkv: Tensor, norm_q: Tensor, norm_k: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    n, dim = len(qkv), len(norm_q)
    count = qkv.shape[1] // (3 * dim)
    assert qkv.is_contiguous() and rope.is_contiguous() and rope.shape == (2, n, dim // 2), (
        f"{qkv.stride()=} {rope.shape=}"
    )
    q, k, v = (
        torch.empty((1, n, count, dim), dtype=qkv.dtype, device=qkv.device) for _ in range(3)
    )
    pairs = triton.next_power_of_2(dim // 2)
    _heads[(n,)](
        qkv,
        norm_q,
        norm_k,
        rope,
        q,
        k,
        v,
        n,
        eps,
        H=count,
        P=dim // 2,
        HEADS=triton.next_power_of_2(count),
        PAIRS=pairs,
        num_warps=8,
    )
    return q, k, v


def product(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As in fused.py, by cuBLASLt or CUTLASS. Wants `in` and `out` in multiples of 16, and bf16 for `dtype` and bias.

    With `use_fast_accum` the tensor core's own accumulator, of some 13 bits, takes the whole sum; bench/headline.py measures cost and gain.
    """
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale,
        scale_b=weight_scale,
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )
