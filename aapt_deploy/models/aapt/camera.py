"""Steer the camera: velocities in, per-pixel rays out (AAPT App. G).

A camera flies at a constant altitude over the ground plane. Its state is a position, a heading and
a pitch. Pitch is a vertical lens shift, so the horizon and verticals stay straight. The generator
sees only the motion during one block, as rays relative to the previous latent frame. They stay
bounded however long a stream runs.

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
    """Camera motion, in world units per second (forward, strafe) and radians per second."""

    forward: float = 0.0
    strafe: float = 0.0
    yaw: float = 0.0
    pitch: float = 0.0


# Largest magnitudes in the training data.
LIMITS = Velocity(forward=36.0, strafe=14.0, yaw=0.30, pitch=0.16)
CRUISE = Velocity(forward=22.0)  # of a stream that nobody steers

# Divisors that bring a map to about unit standard deviation over the training data (App. G,
# change 3). A direction is relative to the same pixel's direction at rest. That grid is constant,
# and RoPE already encodes a token's place.
ORIGIN_SCALE = 2.5  # world units per block
DIRECTION_SCALE = 0.025


@dataclass(frozen=True)
class Pose:
    """The camera's state: `x`, `y`, `z` in world units (z up), `heading`, `pitch` in radians."""

    x: float = 0.0
    y: float = 0.0
    z: float = 0.0
    heading: float = 0.0
    pitch: float = 0.0

    def moved(self, velocity: Velocity, seconds: float) -> "Pose":
        """Return the pose after `seconds` of constant velocity; pitch stops at +-PITCH_RANGE."""
        turn = velocity.yaw * seconds
        middle = self.heading + turn / 2  # second-order accurate arc
        forward, strafe = velocity.forward * seconds, velocity.strafe * seconds
        pitch = min(max(self.pitch + velocity.pitch * seconds, -PITCH_RANGE), PITCH_RANGE)
        x = self.x + forward * math.sin(middle) + strafe * math.cos(middle)
        y = self.y + forward * math.cos(middle) - strafe * math.sin(middle)
        return Pose(x, y, self.z, self.heading + turn, pitch)


def focal_length(width: int) -> float:
    """Return the focal length in pixels of a picture `width` pixels wide."""
    return width / 2 / math.tan(FIELD_OF_VIEW / 2)


def _directions(profile: Profile, rise: float, turn: float) -> np.ndarray:
    """Return unit rays [3, h, w] through the latent pixels, in the frame of another camera.

    That camera looks `turn` rad further to the left and `rise` (tangent) lower.
    """
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
    """Return the condition of a block from pose `before` to `after`: float32 [1, 6, h, w].

    Channels 0-2 are the ray origin, 3-5 the ray direction, in the frame of `before` and scaled to
    about unit deviation. AAPT App. G does so too: poses are relative to the previous frame, with
    origin and direction instead of Pluecker moments.
    """
    dx, dy = after.x - before.x, after.y - before.y
    sin, cos = math.sin(before.heading), math.cos(before.heading)
    right, forward = dx * cos - dy * sin, dx * sin + dy * cos
    origin = np.array([right, before.z - after.z, forward])[:, None, None] / ORIGIN_SCALE
    rise = math.tan(after.pitch) - math.tan(before.pitch)
    direction = _directions(profile, rise, after.heading - before.heading)
    direction = (direction - _directions(profile, 0.0, 0.0)) / DIRECTION_SCALE
    rays = np.concatenate([np.broadcast_to(origin, direction.shape), direction])
    assert rays.shape[0] == CONDITION_CHANNELS, f"{rays.shape=}"
    return rays[None].astype(np.float32)
