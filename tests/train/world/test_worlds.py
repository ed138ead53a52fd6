"""Test the world: seeds fix pictures, prompts the look, and flights clear the hills."""

import dataclasses
import itertools
import math
import time
from functools import cache

import numpy as np
import pytest

from aapt_deploy.models.aapt.camera import FIELD_OF_VIEW, LIMITS, PITCH_RANGE, Pose, Velocity
from aapt_deploy.models.aapt.prompts import ATTRIBUTES, Look
from aapt_deploy.train.world.worlds import (
    CLEARANCE,
    SIZE,
    World,
    fly,
    headroom,
    random_velocities,
    start_pose,
)

WIDTH, HEIGHT = 64, 32


@cache
def world_of(seed: int, *look: str) -> World:
    return World(seed, Look(*look), WIDTH, HEIGHT)


def pictures(world: World, pitch: float = 0.0) -> np.ndarray:
    """Five views from above the ground, in 0..1: [5, H, W, 3]."""
    return (
        np.stack(
            [world.render(Pose(90.0 * i, 50.0 * i, 80.0, 1.3 * i, pitch)) for i in range(5)]
        ).astype(np.float64)
        / 255
    )


def ground(world: World) -> np.ndarray:
    """Mean colour of what lies below the horizon."""
    return pictures(world, -0.1)[:, HEIGHT // 2 :].mean(axis=(0, 1, 2))


# --- determinism ---


def test_the_same_seed_gives_the_same_flight() -> None:
    flights = [fly(World(5, Look(), WIDTH, HEIGHT), np.random.default_rng(1), 3) for _ in range(2)]
    assert np.array_equal(flights[0].frames, flights[1].frames)
    assert flights[0].poses == flights[1].poses
    assert flights[0].look == flights[1].look


def test_other_seeds_give_other_worlds_and_other_flights() -> None:
    looks = ("forest", "summer", "noon", "clear")
    views = [pictures(world_of(seed, *looks)) for seed in range(3)]
    assert all(np.abs(a - b).mean() > 0.02 for a, b in itertools.combinations(views, 2))
    flights = [fly(world_of(0, *looks), np.random.default_rng(seed), 1) for seed in range(3)]
    assert len({flight.poses for flight in flights}) == 3


def test_open_attributes_are_drawn_from_the_seed() -> None:
    looks = [World(seed, Look(place="desert"), WIDTH, HEIGHT).look for seed in range(6)]
    assert {look.place for look in looks} == {"desert"}
    assert all(
        value in words
        for look in looks
        for value, words in zip(vars(look).values(), ATTRIBUTES.values(), strict=True)
    )
    assert len({str(look) for look in looks}) > 3
    assert World(3, Look(place="desert"), WIDTH, HEIGHT).look == looks[3]


# --- the prompt chooses the look ---


@pytest.mark.parametrize("place", ATTRIBUTES["place"])
def test_night_is_darker_than_noon(place: str) -> None:
    noon, night = (
        pictures(world_of(1, place, "summer", time, "clear")).mean() for time in ("noon", "night")
    )
    assert night < 0.55 * noon


def test_dusk_is_redder_than_noon_and_dawn_lies_between_night_and_noon() -> None:
    light = {
        time: pictures(world_of(1, "desert", "summer", time, "clear")).mean(axis=(0, 1, 2))
        for time in ATTRIBUTES["time"]
    }
    warmth = {time: rgb[0] / rgb[2] for time, rgb in light.items()}
    assert warmth["dusk"] > 1.3 * warmth["noon"] > 1.3 * warmth["night"]
    assert light["night"].mean() < light["dawn"].mean() < light["noon"].mean()


@pytest.mark.parametrize("place", ATTRIBUTES["place"])
def test_winter_ground_is_brighter_than_summers(place: str) -> None:
    summer, winter = (
        ground(world_of(1, place, season, "noon", "clear")) for season in ("summer", "winter")
    )
    assert winter.mean() > 1.1 * summer.mean()


def test_autumn_forest_is_red_and_summer_forest_green() -> None:
    summer, autumn = (
        ground(world_of(1, "forest", season, "noon", "clear")) for season in ("summer", "autumn")
    )
    assert summer[1] > summer[0]
    assert autumn[0] > autumn[1]


def test_fog_hides_contrast() -> None:
    clear, foggy = (
        pictures(world_of(1, "mountains", "summer", "noon", weather))
        for weather in ("clear", "foggy")
    )
    assert foggy.std(axis=(1, 2)).mean() < 0.6 * clear.std(axis=(1, 2)).mean()


def test_the_place_shapes_the_ground() -> None:
    heights = {
        place: world_of(1, place, "summer", "noon", "clear").textures.height
        for place in ATTRIBUTES["place"]
    }
    assert heights["mountains"].max() > 1.5 * heights["desert"].max()
    flat = {
        place: float((height == height.min()).mean()) for place, height in heights.items()
    }  # open water is level
    assert flat["islands"] > 0.2 > 0.01 > flat["desert"]


# --- rendering ---


@pytest.mark.parametrize(
    ("place", "weather", "clock"),
    [
        ("mountains", "clear", "noon"),
        ("desert", "cloudy", "dusk"),
        ("islands", "foggy", "dawn"),
        ("forest", "clear", "night"),
    ],
)
def test_every_pose_gives_a_picture(place: str, weather: str, clock: str) -> None:
    world = world_of(2, place, "spring", clock, weather)
    extremes = list(
        itertools.product((0.0, -1e5, 511.999), (0.0, 60.0, 500.0), (-PITCH_RANGE, PITCH_RANGE))
    )
    began = time.perf_counter()
    for x, z, pitch in extremes:
        pose = Pose(x, -x, z, x / 7, pitch)
        picture = world.render(pose)
        assert picture.shape == (HEIGHT, WIDTH, 3)
        assert picture.dtype == np.uint8
        raw = world._draw(pose, HEIGHT, 40.0)
        assert np.isfinite(raw).all()
        assert raw.min() >= 0
        assert raw.max() <= 1
    print(f"{2 * len(extremes) / (time.perf_counter() - began):.0f} pictures/s at {WIDTH}x{HEIGHT}")


def test_the_world_is_a_torus() -> None:
    world = world_of(2, "islands", "spring", "dawn", "clear")
    pose = Pose(300.0, 40.0, 60.0, 0.4)
    wrapped = dataclasses.replace(
        pose, x=pose.x + SIZE, y=pose.y - 3 * SIZE, heading=pose.heading + 2 * math.pi
    )
    apart = np.abs(world.render(pose).astype(int) - world.render(wrapped))
    assert apart.mean() < 0.1
    assert np.percentile(apart, 99) <= 3


def test_nearer_ground_fills_the_picture_from_below() -> None:
    """The sky is above, and looking up shows more of it."""
    world = world_of(2, "desert", "summer", "noon", "clear")
    level, up = (
        world._draw(Pose(10.0, 10.0, 60.0, 0.0, pitch), HEIGHT, 40.0)
        for pitch in (0.0, PITCH_RANGE)
    )
    blue = lambda picture: (picture[..., 2] > picture[..., 0]).mean(axis=1)
    assert blue(level)[0] > 0.95
    assert blue(level)[-1] < 0.05
    assert blue(up).sum() > blue(level).sum()


def test_ground_height_is_bilinear() -> None:
    world = world_of(2, "mountains", "spring", "noon", "clear")
    height = world.textures.height
    assert world.ground_height(np.array([7.0]), np.array([9.0]))[0] == height[9, 7]
    middle = world.ground_height(np.array([511.5]), np.array([3.5]))[0]
    assert middle == pytest.approx(height[[3, 3, 4, 4], [511, 0, 511, 0]].mean(), rel=1e-5)


# --- flights ---


def near_ground(world: World, pose: Pose) -> float:
    """Highest ground in the sector that the camera sees up to 14 units ahead."""
    reach, fan = np.meshgrid(
        np.arange(0.0, 15.0, 7.0), pose.heading + np.linspace(-0.5, 0.5, 3) * FIELD_OF_VIEW
    )
    return float(
        world.ground_height(pose.x + reach * np.sin(fan), pose.y + reach * np.cos(fan)).max()
    )


@pytest.mark.parametrize("place", ATTRIBUTES["place"])
def test_no_flight_touches_the_ground(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        World, "render", lambda self, pose: np.zeros((1, 1, 3), np.uint8)
    )  # only the poses count here
    for seed in range(4):
        world = world_of(seed, place, "summer", "noon", "clear")
        for flight in range(4):
            clip = fly(world, np.random.default_rng((seed, flight)), 24, stride=1)
            assert len(clip.poses) == 25
            lowest = min(pose.z - near_ground(world, pose) for pose in clip.poses)
            assert lowest > CLEARANCE - 1e-3, f"{place=} {seed=} {flight=} {lowest=}"
            assert len({pose.z for pose in clip.poses}) == 1


def test_a_world_without_open_flights_is_flown_over_higher() -> None:
    world = World(0, Look("islands", "summer", "noon", "clear"), WIDTH, HEIGHT)
    world.altitude = 20.0  # below the water: no plan at this altitude can be clear
    clip = fly(world, np.random.default_rng(0), 2)
    assert clip.poses[0].z > 20.0
    assert headroom(world, list(clip.poses)) >= CLEARANCE - 1e-3
    assert clip.frames.shape == (9, HEIGHT, WIDTH, 3)


def test_a_clip_has_a_pose_for_frame_0_and_each_block() -> None:
    world = world_of(0, "forest", "summer", "noon", "clear")
    clip = fly(world, np.random.default_rng(2), 5)
    assert clip.frames.shape == (21, HEIGHT, WIDTH, 3)
    assert clip.frames.dtype == np.uint8
    assert len(clip.poses) == 6
    assert clip.look == world.look
    for frame, pose in zip(clip.frames[::4], clip.poses, strict=True):
        assert np.array_equal(world.render(pose), frame)
    assert float(np.abs(np.diff(clip.frames.astype(int), axis=0)).mean()) > 0.3  # it moves


def test_flight_plans_stay_within_the_limits_and_use_them() -> None:
    rng = np.random.default_rng(0)
    plans = [random_velocities(rng, 24) for _ in range(200)]
    assert all(len(plan) == 24 for plan in plans)
    for field in dataclasses.fields(Velocity):
        values = np.array([[getattr(v, field.name) for v in plan] for plan in plans])
        limit = getattr(LIMITS, field.name)
        assert np.abs(values).max() <= limit
        assert values.max() > 0.9 * limit
        assert values.min() < -0.2 * limit
    assert any(v.forward == 0 for plan in plans for v in plan)  # it also hovers


def test_start_poses_cover_the_torus() -> None:
    world, rng = world_of(0, "forest", "summer", "noon", "clear"), np.random.default_rng(0)
    poses = [start_pose(world, rng) for _ in range(200)]
    assert min(pose.x for pose in poses) < 30
    assert max(pose.y for pose in poses) > SIZE - 30
    assert {pose.z for pose in poses} == {world.altitude}
