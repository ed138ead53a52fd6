"""The temporal half of the 3-D RoPE, computed on the host: a graph takes its cosines and sines as an input.

One fixed angle per block (AAPT App. A), in float64 from the absolute block index and reduced before it is rounded, so that a stream may run
for days without losing precision. The spatial half is constant and lives in the generator.
"""

import math

import numpy as np

from aapt_deploy.profiles import Profile

SLOWEST_TURN = 64.0  # blocks per radian of the slowest temporal pair


def rope_pairs(profile: Profile) -> tuple[int, int, int]:
    """Rotary pairs for (time, height, width): a quarter of them turn with time. They sum to head_dim / 2."""
    pairs = profile.head_dim // 2
    time = pairs // 4
    height = (pairs - time) // 2
    return time, height, pairs - time - height


def temporal_rope(profile: Profile, block: int | np.ndarray) -> np.ndarray:
    """Cosines and sines of the temporal angles of absolute block indices [...]: float32 [..., 2, P_time]."""
    frequency = np.geomspace(1.0, 1 / SLOWEST_TURN, rope_pairs(profile)[0])
    angle = np.mod(np.asarray(block, np.float64)[..., None] * frequency, 2 * math.pi)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-2).astype(np.float32)
