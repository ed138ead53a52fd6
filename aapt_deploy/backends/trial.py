"""Short trial runs: what a build measures of the engine that it made, and the options that it was given."""

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
    """What a build tells while it runs. Called from any thread."""

    def phase(self, name: str, parent: str | None, steps: int) -> None:
        """`name` begins, inside `parent`, with `steps` steps to come."""
        ...

    def step(self, name: str, step: int) -> None: ...

    def done(self, name: str) -> None: ...


@dataclass(frozen=True)
class Options:
    """What a caller of a build may choose beside the precision."""

    report: Report  # gets one line a step
    attention: str = "auto"  # one of the backend's forms, or the best that is proved
    progress: Progress | None = None  # gets phases of known length, of a backend that has them


@dataclass(frozen=True)
class Built:
    """What a build measured of one engine."""

    key: str  # "<backend>-<precision>"
    step_ms: float  # median of a whole step
    bytes: int  # of the engine's files
    threads: int
    spinning: bool
    psnr_db: float | None  # frames of the first second against fp32, same seed; None for fp32 itself; tensorrt: against the exported graphs
    seconds: float  # build time


def left_and_right(engines: Engines, profile: Profile, start: Start, seed: int = 0) -> Iterator[np.ndarray]:
    """A rollout that turns left and right, so that quality and calibration see motion."""
    controls = family_of(profile).left_and_right
    steer = lambda block: Steering(controls(block), start.text)  # noqa: E731
    return rollout(engines, profile, start.image, steer, seed)


def median_step_ms(engines: Engines, profile: Profile, start: Start) -> float:
    """Median time from one block's frames to the next."""
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
    """PSNR of the first second's frames between two engines, same start and seed."""
    pairs = zip(left_and_right(reference, profile, start), left_and_right(engines, profile, start), strict=False)
    errors = [np.square(a.astype(np.float64) - b).mean() for a, b in itertools.islice(pairs, 1, 1 + QUALITY_BLOCKS)]
    return metrics.psnr_db(float(np.mean(errors)))


def mean_psnr_db(reference: Engines, engines: Engines, profile: Profile, starts: list[Start]) -> float:
    """`psnr_db` over all `starts`, to two decimals."""
    return round(float(np.mean([psnr_db(reference, engines, profile, start) for start in starts])), 2)
