"""The steerable camera: velocities in, per-pixel rays out (AAPT App. G).

A camera flies at a constant altitude over the ground plane. Its state is a position, a heading and a pitch; pitch is a vertical lens shift,
so the picture plane stays upright and horizon and verticals stay straight. The generator never sees the state, only the motion during one
block as a map of rays relative to the previous latent frame: bounded however long a stream runs.

Axes of a ray: right, down, forward. Positive yaw turns right, positive pitch looks up.
"""

import math
from dataclasses import dataclass

import numpy as np

from aapt_deploy.profiles import CONDITION_CHANNELS, Profile

FIELD_OF_VIEW = math.radians(75)  # horizontal
PITCH_RANGE = 0.22  # largest |pitch| in radians: a quarter of the picture's height


@dataclass(frozen=True)
class Velocity:
    """Camera motion: world units per second for forward and strafe, radians per second for yaw and pitch."""

    forward: float = 0.0
    strafe: float = 0.0
    yaw: float = 0.0
    pitch: float = 0.0


LIMITS = Velocity(forward=36.0, strafe=14.0, yaw=0.30, pitch=0.16)  # largest magnitudes in the training data
CRUISE = Velocity(forward=22.0)  # what a stream does until it is told otherwise

# Divisors that bring a map to about unit standard deviation over the training data (App. G, change 3). A direction is taken relative to the
# same pixel's direction at rest: that grid is constant and RoPE already tells a token where it is.
ORIGIN_SCALE = 2.5  # world units per block
DIRECTION_SCALE = 0.025


@dataclass(frozen=True)
class Pose:
    """Where the camera is. `x`, `y`, `z` in world units (z up), `heading` and `pitch` in radians."""

    x: float = 0.0
    y: float = 0.0
    z: float = 0.0
    heading: float = 0.0
    pitch: float = 0.0

    def moved(self, velocity: Velocity, seconds: float) -> "Pose":
        """The pose after `seconds` of constant velocity; pitch stops at +-PITCH_RANGE."""
        turn = velocity.yaw * seconds
        middle = self.heading + turn / 2  # second-order accurate arc
        forward, strafe = velocity.forward * seconds, velocity.strafe * seconds
        pitch = min(max(self.pitch + velocity.pitch * seconds, -PITCH_RANGE), PITCH_RANGE)
        return Pose(
            self.x + forward * math.sin(middle) + strafe * math.cos(middle),
            self.y + forward * math.cos(middle) - strafe * math.sin(middle),
            self.z,
            self.heading + turn,
            pitch,
        )


def focal_length(width: int) -> float:
    """Focal length in pixels of a picture `width` pixels wide."""
    return width / 2 / math.tan(FIELD_OF_VIEW / 2)


def _directions(profile: Profile, rise: float, turn: float) -> np.ndarray:
    """Unit rays [3, h, w] through the latent pixels, seen from a camera that is `turn` rad to the left and pitched `rise` (tangent) lower."""
    stride, v = profile.video.spatial_stride, profile.video
    f = focal_length(v.width)
    across = (np.arange(profile.latent_width) + 0.5) * stride - v.width / 2
    down = (np.arange(profile.latent_height) + 0.5) * stride - v.height / 2
    dy, dx = np.meshgrid(down / f - rise, across / f, indexing="ij")  # [h, w] each
    right = dx * math.cos(turn) + math.sin(turn)
    ahead = -dx * math.sin(turn) + math.cos(turn)
    rays = np.stack([right, dy, ahead])  # [3, h, w]
    unit: np.ndarray = rays / np.linalg.norm(rays, axis=0)
    return unit


def condition_map(profile: Profile, before: Pose, after: Pose) -> np.ndarray:
    """Camera condition of the block that ends at `after`, whose predecessor ended at `before`: float32 [1, 6, h, w].

    Channels 0-2 are the ray origin, 3-5 the ray direction, both in the frame of `before` and scaled to about unit deviation
    (AAPT App. G: poses relative to the previous frame, origin and direction instead of Pluecker moments).
    """
    dx, dy = after.x - before.x, after.y - before.y
    sin, cos = math.sin(before.heading), math.cos(before.heading)
    origin = np.array([dx * cos - dy * sin, before.z - after.z, dx * sin + dy * cos])  # right, down, forward
    rise = math.tan(after.pitch) - math.tan(before.pitch)
    direction = _directions(profile, rise, after.heading - before.heading) - _directions(profile, 0.0, 0.0)
    shape = (3, profile.latent_height, profile.latent_width)
    rays = np.concatenate([np.broadcast_to(origin[:, None, None] / ORIGIN_SCALE, shape), direction / DIRECTION_SCALE])
    assert rays.shape[0] == CONDITION_CHANNELS, f"{rays.shape=}"
    return rays[None].astype(np.float32)
