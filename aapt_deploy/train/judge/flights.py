"""Fly held-out worlds with random cameras, to judge a generator by.

The renderer and a bundle's engines fly from the same first frame. Every block is measured on its
last frame. The renderer draws the first five seconds, in which both see the same land. It also
draws the last five, which show what a minute of such flying does to true pictures. Between them it
only checks that no ground is in the way.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from aapt_deploy.models.aapt.camera import Pose, Velocity
from aapt_deploy.models.aapt.prompts import Look, token_ids
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.engine import Engines
from aapt_deploy.rollout.loop import Steering, rollout
from aapt_deploy.train.world.data import VALIDATION_SEED
from aapt_deploy.train.world.worlds import CLEARANCE, World, headroom, random_velocities, start_pose

FIRST_WORLD = VALIDATION_SEED + 5000
TRUE_SECONDS = 5
PLANS = 400  # starts to try in a world before it is passed over
TURNS = 40  # ways on to try in every later stretch, before another start is tried


@dataclass(frozen=True)
class FlightPlan:
    """One flight: a world's seed and prompt, a start, the camera's command in every block."""

    seed: int
    look: Look
    start: Pose
    velocities: tuple[Velocity, ...]
    true: (
        np.ndarray
    )  # uint8 [1 + m, H, W, 3]: the start frame, then the last frame of each of the first m blocks
    late: (
        np.ndarray
    )  # uint8 [1 + m, H, W, 3]: of the last 1 + m blocks; none in a flight of no more than that

    def commands(self, profile: Profile) -> np.ndarray:
        """Return the camera's motion over each block, float64 [n, 4].

        yaw (rad), strafe, pitch (rad), forward (world units)
        """
        seconds = profile.video.temporal_stride / profile.video.fps
        pose, rows = Pose(), []
        for v in self.velocities:
            after = pose.moved(v, seconds)
            # A pitch at its stop does not move, whatever it is told.
            rows.append(
                (v.yaw * seconds, v.strafe * seconds, after.pitch - pose.pitch, v.forward * seconds)
            )
            pose = after
        return np.array(rows)


def flight_plans(profile: Profile, flights: int, blocks: int) -> Iterator[FlightPlan]:
    """Find `flights` plans of `blocks` blocks that stay above the ground, one per world.

    Deterministic.
    """
    found, seed = 0, FIRST_WORLD
    while found < flights:
        plan = _plan(profile, seed, blocks)
        seed += 1
        if plan is not None:
            found += 1
            yield plan


def _plan(profile: Profile, seed: int, blocks: int) -> FlightPlan | None:
    """The flight over world `seed`, or None where none of PLANS has the room."""
    video, rng = profile.video, np.random.default_rng((seed, 2))
    world = World(seed, Look(), video.width, video.height)
    stretch = min(blocks, TRUE_SECONDS * video.fps // video.temporal_stride)
    for _ in range(PLANS):
        start = dataclasses.replace(
            start_pose(world, rng), pitch=0.0
        )  # where a stream's begins: both meet the stops of pitch together
        flown = _flight(profile, world, start, blocks, stretch, rng)
        if flown is not None:
            break
    else:
        return None
    velocities, poses = flown
    late = poses[blocks - stretch - 1 :] if blocks > stretch else []
    frames = np.stack(
        [world.render(pose) for pose in [start, *poses[:stretch], *late]]
    )  # [1 + m (+ 1 + m), H, W, 3]
    return FlightPlan(
        seed, world.look, start, velocities, frames[: 1 + stretch], frames[1 + stretch :]
    )


def _flight(
    profile: Profile, world: World, start: Pose, blocks: int, stretch: int, rng: np.random.Generator
) -> tuple[tuple[Velocity, ...], list[Pose]] | None:
    """Find velocities of `blocks` blocks and the pose at the end of each, stretch by stretch.

    Return None if the ground is in the way.
    """
    seconds = profile.video.temporal_stride / profile.video.fps
    velocities: list[Velocity] = []
    poses: list[Pose] = []
    while len(velocities) < blocks:
        for _ in range(TURNS if velocities else 1):
            turn = random_velocities(rng, min(stretch, blocks - len(velocities)))
            tried = [poses[-1] if poses else start]
            for velocity in turn:
                tried.append(tried[-1].moved(velocity, seconds))
            if headroom(world, tried) > CLEARANCE:
                break
        else:
            return None
        velocities += turn
        poses += tried[1:]
    return tuple(velocities), poses


def generated_flight(engines: Engines, profile: Profile, plan: FlightPlan) -> Iterator[np.ndarray]:
    """Fly the generator.

    Yield the start frame as decoded and the last frame of each block, uint8 [H, W, 3].
    """
    text = token_ids(plan.look) if profile.text.tokens else None

    def steer(block: int) -> Steering:
        return Steering(plan.velocities[block], text)

    for frames in islice(
        rollout(engines, profile, plan.true[0], steer, plan.seed), 1 + len(plan.velocities)
    ):
        yield frames[-1]
