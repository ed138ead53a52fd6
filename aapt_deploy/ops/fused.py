"""The small operations between a generator's products, each in one piece, in plain torch: the reference that the GPU's kernels are compared with.

    modulated   RMS norm, shift and scale                        -> what a linear layer reads
    gated       gate and residual, then `modulated`              -> the residual stream, and what a linear layer reads
    heads       QK-norm and rotation, v moved                    -> q, k, v as attention reads them
    activated   GELU (tanh)                                      -> what a linear layer reads
    quantised   x / step as e4m3, saturating                     -> what a linear layer reads
    product     FP8 codes times FP8 weights, scales and bias     -> activations

What a linear layer reads is e4m3 codes where it has a `step` (its input scale, float32 [1]), else of the activations' own type. Everything between
reading and writing is float32. fused_triton.py has the same functions for a GPU.

Letters: N tokens, H heads, D head_dim, P = D / 2 rotary pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aapt_deploy.ops.block_causal_attention.hopper_fp8 import E4M3_MAX as E4M3_MAX

FP8 = torch.float8_e4m3fn


def quantised(x: Tensor, step: Tensor) -> Tensor:
    """e4m3(x / step), to nearest, saturating at +-448; `step` float32, broadcast."""
    return (x.float() / step).clamp(-E4M3_MAX, E4M3_MAX).to(FP8)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float, step: Tensor | None) -> Tensor:
    """x [N, dim], shift and scale float32 [dim] -> rms_norm(x) * (1 + scale) + shift, [N, dim]."""
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (1 + scale) + shift
    return y.to(x.dtype) if step is None else quantised(y, step)


def gated(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    step: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x, y [N, dim], the rest as in `modulated` -> x + (1 + gate) * y in x's type, and that sum modulated."""
    kept = (x.float() + (1 + gate) * y.float()).to(x.dtype)
    return kept, modulated(kept, shift, scale, eps, step)


def heads(
    qkv: Tensor, norm_q: Tensor, norm_k: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [N, 3 * H * D], norm_q and norm_k float32 [D], rope float32 [2, N, P] -> q, k, v [1, N, H, D], contiguous, in qkv's type."""
    n, dim = len(qkv), len(norm_q)
    q, k, v = qkv.view(n, 3, -1, dim).unbind(1)  # [N, H, D] each
    cos, sin = rope[0, :, None], rope[1, :, None]  # [N, 1, P]

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        a, b = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).chunk(
            2, -1
        )
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)

    return turned(q, norm_q)[None], turned(k, norm_k)[None], v.contiguous()[None]


def activated(x: Tensor, step: Tensor | None) -> Tensor:
    """GELU, tanh form, of x [N, hidden]."""
    y = F.gelu(x.float(), approximate="tanh")
    return y.to(x.dtype) if step is None else quantised(y, step)


def product(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Codes x [N, in] and weight [out, in] -> [N, out] of `dtype`. Scales float32, [1] and [1] or [N, 1] and [1, out]."""
    y = x.float() @ weight.float().T * (x_scale * weight_scale)
    return (y if bias is None else y + bias.float()).to(dtype)
