"""What the stages of bench/headline.py share: shapes, devices, times, passes of a generator."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from headline_model import WIDE
from stages import HOW

from aapt_deploy.backends.torch_cuda import lane as torch_lane
from aapt_deploy.backends.torch_cuda.calibrate import noise_inputs
from aapt_deploy.profiles import Profile, load


def device() -> torch.device:
    return torch.device("cpu" if HOW.small else "cuda")


def precision() -> str:
    """Of the engines. A CPU has no bf16 that is worth the name."""
    return "fp32" if HOW.small and HOW.precision == "bf16" else HOW.precision


def shape(name: str, window: int) -> Profile:
    """A preset with another window; with --small, three layers of postage stamps."""
    profile = load("tiny-cpu" if HOW.small else name)
    if HOW.small:
        heads_of_64 = dataclasses.replace(profile.model, dim=128, depth=3)
        profile = profile.replace(model=heads_of_64)
    frames = 3 if HOW.small else window
    return profile.replace(
        window=dataclasses.replace(profile.window, frames=frames),
        sampler=dataclasses.replace(profile.sampler, timesteps=(1.0,)),
    )


def wide_shape() -> Profile:
    return shape(WIDE, 30)


def synchronise() -> None:
    if not HOW.small:
        torch.cuda.synchronize()


def allocated() -> int:
    return 0 if HOW.small else torch.cuda.memory_allocated()


def percentiles(seconds: list[float]) -> dict[str, float]:
    ms, wanted = 1000 * np.array(seconds), (("p50", 50), ("p95", 95), ("p99", 99), ("max", 100))
    return {name: round(float(np.percentile(ms, q)), 3) for name, q in wanted}


def timed(call: Callable[[], object], runs: int) -> list[float]:
    """Seconds of each run, after two that do not count."""
    found = []
    for run in range(runs + 2):
        synchronise()
        before = time.perf_counter()
        call()
        synchronise()
        found += [time.perf_counter() - before] if run >= 2 else []
    return found


def passes(engines: Any, profile: Profile, count: int) -> list[float]:
    """Seconds of each of `count` passes of the generator, the ring full; needs no decoder."""
    generator = engines["generator"]
    block = profile.window.sink_frames + 2 * profile.window.frames
    made = noise_inputs(profile, 0, torch.device("cpu"))
    inputs = {name: x.numpy() for name, x in made.items() if name not in ("cache_len", "slot")}
    seconds = []
    for step in range(count):
        before = time.perf_counter()
        generator.run(**inputs, block=block + step)
        seconds.append(time.perf_counter() - before)
        generator.commit(block + step)
    return seconds


@contextlib.contextmanager
def uncaptured() -> Iterator[None]:
    """Lanes launch what they would have captured."""
    true = torch_lane.Lane.prepare

    def prepare(lane: torch_lane.Lane, call: Callable[[], object]) -> Callable[[], object]:
        lane.settle()
        with lane.mine():
            for _ in range(torch_lane.WARM_UPS):
                call()
        return call

    torch_lane.Lane.prepare = prepare  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch_lane.Lane.prepare = true  # type: ignore[method-assign]
