"""Build the MMDiT's layers: norms, 3-D RoPE, modulation, one stream's half of a block.

Letters: B batch, N tokens, H heads, D head_dim, P rotary pairs (D / 2), F tokens per frame.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt_deploy.models.aapt.rope import rope_pairs
from aapt_deploy.models.rotary import join_rope as join_rope
from aapt_deploy.models.rotary import rotate as rotate
from aapt_deploy.profiles import Profile

EPS = 1e-5
MODULATIONS = 6  # shift, scale, gate for attention and again for the MLP
TIME_FEATURES = 256

# q, k, v [B, N, H, D] -> attended [B, N, H, D], and what else the caller wants returned
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def posterior(
    noisy: Tensor, previous: Tensor, t: Tensor, step_spread: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the distribution of a clean latent, given the previous and the noisy one.

    The prior is clean ~ N(previous, step_spread^2), and noisy = (1 - t) clean + t noise.
    noisy, previous [..., C, h, w]; t broadcastable, in (0, 1]; step_spread [C, 1, 1]. Returns the
    innovation (what `noisy` adds, at unit deviation), the posterior mean and its deviation.

    The network predicts the remaining error in units of that deviation. So it starts as a still
    picture, and its targets are of unit size at every t. This is the preconditioning of EDM (arXiv
    2206.00364) around the previous frame instead of zero.
    """
    variance = ((1 - t) * step_spread) ** 2 + t**2  # of noisy around (1 - t) previous
    innovation = (noisy - (1 - t) * previous) * variance.rsqrt()
    gain = (1 - t) * step_spread**2 * variance.rsqrt()
    return innovation, previous + gain * innovation, step_spread * t * variance.rsqrt()


def rms_norm(x: Tensor) -> Tensor:
    """Normalise the last dimension by its RMS, without weights."""
    return F.rms_norm(x, (x.shape[-1],), eps=EPS)


def time_features(t: Tensor) -> Tensor:
    """Turn the flow-matching time t [...] in 0..1 into sinusoidal features [..., 256]."""
    half = TIME_FEATURES // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(10000) / half * index)
    angle = 1000 * t[..., None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def spatial_rope(profile: Profile) -> Tensor:
    """Return cosine and sine of a frame's spatial angles: float32 [2, F, P_height + P_width].

    Positions are relative to the longer side, so angles stretch with the resolution (AAPT App. A).
    """
    patch = profile.model.patch
    rows, columns = profile.latent_height // patch, profile.latent_width // patch
    side = max(rows, columns)
    _, height, width = rope_pairs(profile)
    angles = []
    for count, pairs, axis in ((rows, height, 0), (columns, width, 1)):
        position = torch.arange(count, dtype=torch.float64) + 0.5 - count / 2
        position = position * 2 / side  # -1..1 along the longer side
        # Not from_numpy, which ignores the default device.
        frequency = torch.tensor(np.geomspace(0.5, side / 3, pairs)) * math.pi / 2
        angle = position[:, None] * frequency  # [count, pairs]
        angles.append((angle[:, None] if axis == 0 else angle[None]).expand(rows, columns, pairs))
    flat = torch.cat(angles, dim=-1).reshape(rows * columns, height + width)
    return torch.stack([flat.cos(), flat.sin()]).float()


class Stream(nn.Module):
    """One stream's half of an MMDiT block: projections, QK-norm, MLP and modulation table."""

    def __init__(self, profile: Profile, ends_at_attention: bool = False) -> None:
        super().__init__()
        m = profile.model
        self.heads, self.ends_at_attention = m.heads, ends_at_attention
        self.qkv = nn.Linear(m.dim, 3 * m.dim, bias=False)
        self.norm_q = nn.Parameter(torch.ones(profile.head_dim))
        self.norm_k = nn.Parameter(torch.ones(profile.head_dim))
        self.modulation = nn.Parameter(torch.zeros(2 if ends_at_attention else MODULATIONS, m.dim))
        if not ends_at_attention:
            self.out = nn.Linear(m.dim, m.dim)
            self.w1 = nn.Linear(m.dim, m.mlp_ratio * m.dim)
            self.w2 = nn.Linear(m.mlp_ratio * m.dim, m.dim)

    def forward(
        self, x: Tensor, shared: list[Tensor] | None, rope: Tensor | None, attend: Attend
    ) -> tuple[Tensor, ...]:
        """Pass tokens x [B, N, dim] through the block; also return what else `attend` returned.

        shared: the modulation by time, six of [B, N or 1, dim], to add to the stream's own; None
        for text. rope as in `rotate`; None for text.
        """
        modulation = list(self.modulation.unbind(0))
        if shared is not None:
            modulation = [m + own for m, own in zip(shared, modulation, strict=True)]
        q, k, v = self.project(x, *modulation[:2])
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        attended, *kept = attend(q, k, v)
        return (x if self.ends_at_attention else self.finish(x, attended, modulation[2:]), *kept)

    def project(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project x [B, N, dim] to q, k, v [B, N, H, D], with q and k normalised per head."""
        x = rms_norm(x) * (1 + scale) + shift
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # [B, N, H, D] each
        return rms_norm(q) * self.norm_q, rms_norm(k) * self.norm_k, v

    def finish(self, x: Tensor, attended: Tensor, modulation: list[Tensor]) -> Tensor:
        """Add the attended values [B, N, H, D] and the MLP to x [B, N, dim].

        modulation: gate, shift, scale, gate.
        """
        gate_attention, shift, scale, gate_mlp = modulation
        x = x + (1 + gate_attention) * self.out(attended.flatten(-2))
        y = rms_norm(x) * (1 + scale) + shift
        mlp: Tensor = self.w2(F.gelu(self.w1(y), approximate="tanh"))
        return x + (1 + gate_mlp) * mlp
