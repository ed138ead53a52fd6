"""Measure a new engine in short trial runs, and define what a build takes and returns."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from aapt_deploy.models.family import family_of
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.engine import Engines
from aapt_deploy.rollout.loop import Steering, rollout
from aapt_deploy.rollout.starts import Start
from aapt_deploy.video import metrics

TUNING_BLOCKS = 10  # measured for each thread setting
QUALITY_BLOCKS = 6  # compared with fp32: one second

Report = Callable[[str], None]


class Progress(Protocol):
    """Receives the progress of a build, from any thread."""

    def phase(self, name: str, parent: str | None, steps: int) -> None:
        """Start the phase `name` of `steps` steps, inside `parent`."""
        ...

    def step(self, name: str, step: int) -> None: ...

    def done(self, name: str) -> None: ...


@dataclass(frozen=True)
class BuildOptions:
    """BuildOptions of a build, beside the precision."""

    report: Report  # gets one line a step
    attention: str = "auto"  # one of the backend's forms, or the best that is proved
    sms: tuple[int, ...] = ()  # compute capabilities x 10 to build for; (): the GPU that is here
    progress: Progress | None = None  # gets phases of known length, if the backend has them
    portable: bool = False  # plans that TensorRT's lean runtime can run


@dataclass(frozen=True)
class Built:
    """The measurements of one new engine."""

    key: str  # "<backend>-<precision>"
    step_ms: float | None  # median of a whole step; None if the engine cannot run here
    bytes: int  # of the engine's files
    threads: int
    spinning: bool
    psnr_db: float | None  # first second against fp32 (tensorrt: the exported graphs), same seed
    seconds: float  # build time


def left_and_right(engines: Engines, profile: Profile, start: Start) -> Iterator[np.ndarray]:
    """Run a rollout that turns left and right, so quality and calibration see motion."""
    controls = family_of(profile).left_and_right
    steer = lambda block: Steering(controls(block), start.text)
    return rollout(engines, profile, start.image, steer, seed=0)


def median_step_ms(engines: Engines, profile: Profile, start: Start) -> float:
    """Return the median time from one block's frames to the next."""
    frames = left_and_right(engines, profile, start)
    next(frames)
    next(frames)  # the first block also encodes the prompt
    times = []
    for _ in range(TUNING_BLOCKS):
        before = time.perf_counter()
        next(frames)
        times.append(time.perf_counter() - before)
    return 1000 * float(np.median(times))


def psnr_db(reference: Engines, engines: Engines, profile: Profile, start: Start) -> float:
    """Return the PSNR between two engines over the first second, same start and seed."""
    rollouts = (left_and_right(each, profile, start) for each in (reference, engines))
    pairs = itertools.islice(zip(*rollouts, strict=False), 1, 1 + QUALITY_BLOCKS)
    errors = [np.square(a.astype(np.float64) - b).mean() for a, b in pairs]
    return metrics.psnr_db(float(np.mean(errors)))


def mean_psnr_db(
    reference: Engines, engines: Engines, profile: Profile, starts: list[Start]
) -> float:
    """Return the mean of `psnr_db` over all `starts`, to two decimals."""
    each = [psnr_db(reference, engines, profile, start) for start in starts]
    return round(float(np.mean(each)), 2)
