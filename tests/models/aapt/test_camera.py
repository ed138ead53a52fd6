"""The camera: signs and sizes of its map, and a rendered world that moves as the map says."""

import math

import numpy as np
import pytest

from aapt_deploy.models.aapt.camera import (
    CRUISE,
    DIRECTION_SCALE,
    FIELD_OF_VIEW,
    LIMITS,
    ORIGIN_SCALE,
    PITCH_RANGE,
    Pose,
    Velocity,
    condition_map,
    focal_length,
)
from aapt_deploy.models.aapt.prompts import Look
from aapt_deploy.profiles import load
from aapt_deploy.train.world.worlds import World

DEMO = load("demo-cpu")
BLOCK_S = 4 / 24
WIDTH, HEIGHT = DEMO.video.width, DEMO.video.height


def moved(velocity: Velocity, start: Pose | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return origin [3, h, w] in world units and direction change [3, h, w] of one block."""
    before = start or Pose()
    rays = condition_map(DEMO, before, before.moved(velocity, BLOCK_S))[0]
    return rays[:3] * ORIGIN_SCALE, rays[3:] * DIRECTION_SCALE


def centre(rays: np.ndarray) -> np.ndarray:
    """The mean of the four middle pixels: the ray along the view axis."""
    h, w = rays.shape[1:]
    return rays[:, h // 2 - 1 : h // 2 + 1, w // 2 - 1 : w // 2 + 1].mean(axis=(1, 2))


def rest_directions() -> np.ndarray:
    """Return unit rays [3, h, w] (right, down, forward) at rest, from the pinhole model."""
    x = ((np.arange(DEMO.latent_width) + 0.5) * 8 - WIDTH / 2) / focal_length(WIDTH)
    y = ((np.arange(DEMO.latent_height) + 0.5) * 8 - HEIGHT / 2) / focal_length(WIDTH)
    rays = np.stack([*np.broadcast_arrays(x[None], y[:, None]), np.ones((len(y), len(x)))])
    return rays / np.linalg.norm(rays, axis=0)


# --- the map ---


def test_shape_and_type() -> None:
    rays = condition_map(DEMO, Pose(), Pose().moved(CRUISE, BLOCK_S))
    assert rays.shape == (1, 6, DEMO.latent_height, DEMO.latent_width)
    assert rays.dtype == np.float32


def test_a_camera_at_rest_gives_a_zero_map() -> None:
    for pose in (Pose(), Pose(1e4, -3e3, 54.0, 123.4, 0.1)):
        assert not condition_map(DEMO, pose, pose).any()


def test_forward_and_strafe_move_the_origin_alone() -> None:
    origin, turn = moved(Velocity(forward=12.0))
    assert origin[:, 0, 0] == pytest.approx([0, 0, 2.0], abs=1e-6)
    assert not turn.any()
    origin, turn = moved(Velocity(strafe=-6.0))
    assert origin[:, -1, 3] == pytest.approx([-1.0, 0, 0], abs=1e-6)
    assert not turn.any()


def test_climbing_moves_the_origin_up() -> None:
    origin = centre(condition_map(DEMO, Pose(z=3.0), Pose(z=4.0))[0, :3]) * ORIGIN_SCALE
    assert origin == pytest.approx([0, -1.0, 0], abs=1e-6)


def test_yaw_turns_the_rays_right_by_the_angle() -> None:
    angle = 0.24 * BLOCK_S
    origin, turn = moved(Velocity(yaw=0.24))
    assert not origin.any()
    assert centre(turn)[0] == pytest.approx(math.sin(angle), rel=0.01)
    assert abs(centre(turn)[1]) < 1e-6
    new, old = rest_directions() + turn, rest_directions()
    azimuth = np.arctan2(new[0], new[2]) - np.arctan2(old[0], old[2])
    assert azimuth == pytest.approx(np.full_like(azimuth, angle), abs=1e-6)  # every pixel
    assert np.linalg.norm(new, axis=0) == pytest.approx(np.ones(new.shape[1:]), abs=1e-6)
    assert moved(Velocity(yaw=-0.24))[1][0].mean() < 0


def test_pitch_lifts_the_rays() -> None:
    angle = 0.16 * BLOCK_S
    origin, turn = moved(Velocity(pitch=0.16))
    assert not origin.any()
    assert centre(turn)[1] == pytest.approx(-math.tan(angle), rel=0.01)  # the axis points down
    new = rest_directions() + turn
    old = rest_directions()
    shift = new[1] / new[2] - old[1] / old[2]  # of the lens: the same for all pixels
    assert shift == pytest.approx(np.full_like(shift, -math.tan(angle)), abs=1e-6)
    assert new[0] / new[2] == pytest.approx(old[0] / old[2], abs=1e-6)


BENDS = [Velocity(20.0, -9.0, 0.25, 0.1), Velocity(-8.0, 14.0, -0.3, -0.16)]


@pytest.mark.parametrize("velocity", [CRUISE, *BENDS])
def test_the_map_depends_on_relative_motion_alone(velocity: Velocity) -> None:
    here = condition_map(DEMO, Pose(), Pose().moved(velocity, BLOCK_S))
    for start in (Pose(x=500.0, y=-80.0, z=54.0), Pose(heading=2.5), Pose(1e5, 2e5, 30.0, -400.0)):
        there = condition_map(DEMO, start, start.moved(velocity, BLOCK_S))
        assert there == pytest.approx(here, abs=1e-5)


def test_a_reversed_motion_brings_the_camera_back() -> None:
    velocity = Velocity(20.0, -9.0, 0.25, 0.1)
    there = Pose(3.0, 4.0, 50.0, 1.0, -0.05).moved(velocity, BLOCK_S)
    back = there.moved(Velocity(*(-v for v in vars(velocity).values())), BLOCK_S)
    assert list(vars(back).values()) == pytest.approx([3.0, 4.0, 50.0, 1.0, -0.05])


def test_a_full_circle_closes() -> None:
    pose, steps = Pose(), 360
    for _ in range(steps):
        pose = pose.moved(Velocity(forward=10.0, yaw=2 * math.pi / (steps * BLOCK_S)), BLOCK_S)
    assert (pose.x, pose.y) == pytest.approx((0.0, 0.0), abs=1e-6)
    assert pose.heading == pytest.approx(2 * math.pi)


@pytest.mark.parametrize("sign", [1, -1])
def test_pitch_stops_at_its_range(sign: int) -> None:
    pose = Pose(pitch=sign * (PITCH_RANGE - 0.01))
    stopped = pose.moved(Velocity(pitch=sign * 0.16), 1.0)
    assert stopped.pitch == sign * PITCH_RANGE
    again = stopped.moved(Velocity(pitch=sign * 0.16), 1.0)
    assert again.pitch == sign * PITCH_RANGE
    assert not condition_map(DEMO, stopped, again).any()  # the generator sees no motion


def test_maps_within_the_limits_are_of_unit_scale() -> None:
    fastest = condition_map(DEMO, Pose(), Pose().moved(LIMITS, BLOCK_S))
    assert 1 < np.abs(fastest).max() < 4
    rays = condition_map(DEMO, Pose(), Pose().moved(CRUISE, BLOCK_S))
    assert 0.3 < np.sqrt((rays**2).mean() * 6) < 3


def test_focal_length_spans_the_field_of_view() -> None:
    assert 2 * math.atan(WIDTH / 2 / focal_length(WIDTH)) == pytest.approx(FIELD_OF_VIEW)


# --- a rendered world moves as the map says ---


@pytest.fixture(scope="module")
def world() -> World:
    return World(3, Look("mountains", "summer", "noon", "clear"), WIDTH, HEIGHT)


def shift_of(before: np.ndarray, after: np.ndarray, axis: int) -> int:
    """Return by how many pixels the middle of the picture moved along `axis`.

    The shift has the best normalised cross-correlation.
    """
    reach = 20

    def middle(picture: np.ndarray, shift: int) -> np.ndarray:
        h, w = picture.shape[:2]
        y, x = (shift, 0) if axis == 0 else (0, shift)
        y, x = h // 2 + y, w // 2 + x
        cut = picture[y - 24 : y + 24, x - 20 : x + 20].astype(np.float64)
        cut = cut - cut.mean(axis=(0, 1))
        return cut / np.linalg.norm(cut)

    here = middle(before, 0)
    return max(range(-reach, reach + 1), key=lambda shift: (here * middle(after, shift)).sum())


@pytest.mark.parametrize("angle", [-0.09, -0.04, 0.04, 0.09])
def test_yaw_moves_the_picture_by_the_predicted_pixels(world: World, angle: float) -> None:
    before = Pose(200.0, 120.0, 75.0, 0.7)
    after = before.moved(Velocity(yaw=angle), 1.0)
    turn = centre(condition_map(DEMO, before, after)[0, 3:])[0] * DIRECTION_SCALE
    predicted = -turn * focal_length(WIDTH)  # looking right moves things left
    assert np.sign(predicted) == -np.sign(angle)
    found = shift_of(world.render(before), world.render(after), axis=1)
    assert found == pytest.approx(predicted, abs=1.0)


@pytest.mark.parametrize("angle", [-0.1, 0.06])
def test_pitch_moves_the_picture_by_the_predicted_pixels(world: World, angle: float) -> None:
    before = Pose(200.0, 120.0, 75.0, 0.7)
    after = before.moved(Velocity(pitch=angle), 1.0)
    turn = centre(condition_map(DEMO, before, after)[0, 3:])[1] * DIRECTION_SCALE
    predicted = -turn * focal_length(WIDTH)  # looking up moves things down
    assert np.sign(predicted) == np.sign(angle)
    found = shift_of(world.render(before), world.render(after), axis=0)
    assert found == pytest.approx(predicted, abs=1.0)


def test_the_map_says_where_each_pixel_was_before_the_turn(world: World) -> None:
    before = Pose(200.0, 120.0, 75.0, 0.7)
    after = before.moved(Velocity(yaw=0.1, pitch=-0.08), 1.0)
    rays = rest_directions() + condition_map(DEMO, before, after)[0, 3:] * DIRECTION_SCALE
    column = rays[0] / rays[2] * focal_length(WIDTH) + WIDTH / 2 - 0.5
    row = rays[1] / rays[2] * focal_length(WIDTH) + HEIGHT / 2 - 0.5
    inside = (column > 1) & (column < WIDTH - 2) & (row > 1) & (row < HEIGHT - 2)
    assert inside.mean() > 0.6

    def sampled(pose: Pose, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Picture colours around (y, x), averaged over 2 x 2 pixels."""
        picture = world.render(pose).astype(np.float64)
        i, j = np.floor(y).astype(int), np.floor(x).astype(int)
        return (picture[i, j] + picture[i + 1, j] + picture[i, j + 1] + picture[i + 1, j + 1]) / 4

    rows, columns = np.arange(DEMO.latent_height), np.arange(DEMO.latent_width)
    y, x = np.meshgrid(rows * 8 + 3, columns * 8 + 3, indexing="ij")
    seen = sampled(after, y[inside], x[inside])
    followed = np.abs(sampled(before, row[inside], column[inside]) - seen).mean()
    ignored = np.abs(sampled(before, y[inside], x[inside]) - seen).mean()
    assert followed < 0.35 * ignored, f"{followed=} {ignored=}"


@pytest.mark.parametrize(("before", "after"), [(0.16, 0.22), (-0.22, -0.1), (0.2, -0.2)])
def test_pitching_from_a_pitched_pose_moves_the_rays_by_the_difference_of_tangents(
    before: float, after: float
) -> None:
    """Pitch is a lens shift: 5 % more than the tangent of the difference near the limit."""
    found = condition_map(DEMO, Pose(pitch=before), Pose(pitch=after))[0, 3:] * DIRECTION_SCALE
    rest = rest_directions()
    rays = found + rest
    risen = rest[1] / rest[2] - rays[1] / rays[2]
    assert risen == pytest.approx(math.tan(after) - math.tan(before), abs=1e-6)
    assert rays[0] / rays[2] == pytest.approx(rest[0] / rest[2], abs=1e-6)
