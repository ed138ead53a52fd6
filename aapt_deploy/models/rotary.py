"""Rotate queries and keys by RoPE's angles, in half-split order, for every family.

Letters: N tokens, H heads, D head_dim, P rotary pairs (D / 2), F tokens per frame.
"""

import torch
from torch import Tensor


def join_rope(temporal: Tensor, spatial: Tensor) -> Tensor:
    """Join temporal [..., 2, P_time] and spatial [2, F, P_space] to [..., 2, F, P]."""
    *shape, pairs = temporal.shape
    t = temporal[..., None, :].expand(*shape, spatial.shape[1], pairs)  # [..., 2, F, P_time]
    return torch.cat([t, spatial.expand(*t.shape[:-1], spatial.shape[-1])], dim=-1)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the pairs (x[..., :P], x[..., P:]). x [B, N, H, D], rope [B or 1, 2, N, P]."""
    cos, sin = rope[:, 0, :, None], rope[:, 1, :, None]  # [B, N, 1, P]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
