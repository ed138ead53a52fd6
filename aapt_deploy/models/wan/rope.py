"""Compute temporal RoPE and time features, which the generator's graph takes as inputs.

The host computes them in float64. In float32, time features alone cost 3e-5 of a latent.
RoPE has an axis each for time, rows and columns, with theta 10000 over the axis' own channels
(Wan2.1; the interleaved pairs of its weights are half-split in ours, see `keys`).
"""

import math

import numpy as np

from aapt_deploy.profiles import Profile

THETA = 10_000.0
TIME_FEATURES = 256
TRAINED_SCALE = 1000.0  # time features are of 1000 x the share of noise


def rope_pairs(profile: Profile) -> tuple[int, int, int]:
    """Split head_dim / 2 rotary pairs into (time, height, width): 22, 21, 21 for 128 channels."""
    pairs = profile.head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def angles(position: np.ndarray, pairs: int) -> np.ndarray:
    """Return float64 [..., pairs]: the angles of positions [...] on one axis."""
    frequency = THETA ** -(np.arange(pairs) / pairs)
    return np.asarray(position, np.float64)[..., None] * frequency


def cos_sin(angle: np.ndarray, axis: int) -> np.ndarray:
    """Stack cosine and sine along a new `axis`, float32; reduced first, for long streams."""
    turned = np.mod(angle, 2 * math.pi)
    return np.stack([np.cos(turned), np.sin(turned)], axis=axis).astype(np.float32)


def temporal_rope(profile: Profile, frames: np.ndarray) -> np.ndarray:
    """Return float32 [1, 2, n, P_time] for the absolute indices [n] of latent frames."""
    return cos_sin(angles(frames, rope_pairs(profile)[0]), axis=0)[None]


def time_features(t: float) -> np.ndarray:
    """Return float32 [1, 256], cosines first, for the share of noise t."""
    angle = angles(np.array([TRAINED_SCALE * t]), TIME_FEATURES // 2)
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)
