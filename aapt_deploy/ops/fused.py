"""The small operations between a generator's products, in plain PyTorch.

    modulated   RMS norm, shift and scale                        -> what a linear layer reads
    gated       gate and residual, then `modulated`              -> the residual, and the same
    heads       QK-norm and rotation, v moved                    -> q, k, v as attention reads them
    activated   GELU (tanh)                                      -> what a linear layer reads
    quantised   x / step as e4m3, saturating                     -> what a linear layer reads
    product     FP8 codes times FP8 weights, scales and bias     -> activations

A linear layer with a `step` (its input scale, float32 [1]) reads e4m3 codes, any other the
activations' own type. Everything between reading and writing is float32. fused_triton.py has the
same functions for a GPU, and is compared with these.

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
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor,
    eps: float, step: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x, y [N, dim], others as in `modulated` -> x + (1 + gate) * y, and that modulated.

    The sum is in x's type.
    """
    kept = (x.float() + (1 + gate) * y.float()).to(x.dtype)
    return kept, modulated(kept, shift, scale, eps, step)


def heads(
    qkv: Tensor, norm_q: Tensor, norm_k: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [N, 3 * H * D] -> q, k, v [1, N, H, D], contiguous, in qkv's type.

    norm_q and norm_k float32 [D], rope float32 [2, N, P].
    """
    n, dim = len(qkv), len(norm_q)
    q, k, v = qkv.view(n, 3, -1, dim).unbind(1)  # [N, H, D] each
    cos, sin = rope[0, :, None], rope[1, :, None]  # [N, 1, P]

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        norm = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        a, b = (wide * norm * weight).chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)

    return turned(q, norm_q)[None], turned(k, norm_k)[None], v.contiguous()[None]


def activated(x: Tensor, step: Tensor | None) -> Tensor:
    """GELU, tanh form, of x [N, hidden]."""
    y = F.gelu(x.float(), approximate="tanh")
    return y.to(x.dtype) if step is None else quantised(y, step)


def product(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Codes x [N, in] and weight [out, in] -> [N, out] of `dtype`.

    Scales float32, [1] and [1], or [N, 1] and [1, out].
    """
    y = x.float() @ weight.float().T * (x_scale * weight_scale)
    return (y if bias is None else y + bias.float()).to(dtype)
