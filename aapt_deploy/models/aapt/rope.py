"""Compute the temporal half of the 3-D RoPE, which a graph takes as an input.

Each block has one fixed angle (AAPT App. A). The host computes it in float64 from the absolute
block index. It is reduced before rounding, so streams of days lose no precision. The spatial half
is a constant of the generator.
"""

import math

import numpy as np

from aapt_deploy.profiles import Profile

SLOWEST_TURN = 64.0  # blocks per radian of the slowest temporal pair


def rope_pairs(profile: Profile) -> tuple[int, int, int]:
    """Split head_dim / 2 rotary pairs into (time, height, width); a quarter is for time."""
    pairs = profile.head_dim // 2
    time = pairs // 4
    height = (pairs - time) // 2
    return time, height, pairs - time - height


def temporal_rope(profile: Profile, block: int | np.ndarray) -> np.ndarray:
    """Return cosines and sines for absolute block indices [...]: float32 [..., 2, P_time]."""
    frequency = np.geomspace(1.0, 1 / SLOWEST_TURN, rope_pairs(profile)[0])
    angle = np.mod(np.asarray(block, np.float64)[..., None] * frequency, 2 * math.pi)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-2).astype(np.float32)
