"""Measure step latency against the frame budget (`aapt profile`).

The rollout has no clocks. It gets engines wrapped in a stopwatch, so what is timed is exactly what
`stream` runs:

    prompt      text -> its keys and values        once per prompt
    generator   all passes of one block
    commit      keeping the block in the cache; turning a sink that follows
    decoder     one latent frame -> four frames
    hand-off    everything else in the loop: noise, camera rays, sampler arithmetic, copying the
                frames out
    encode      frames -> H.264, outside the step: a consumer's cost
    step        prompt + generator + commit + decoder + hand-off, wall clock from one block's frames
                to the next

If the decoder works beside the generator (Engines.overlapped), a block is generated while the one
before is decoded. A step is then as long as the longer of the two. Frames are encoded when all is
measured, because the engines would work on meanwhile.

A cold block is among the first COLD_BLOCKS, while caches fill and memory is touched first.
"""

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from aapt_deploy.backends.table import open_engines, refuse_unsupported
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.measure.machine import machine
from aapt_deploy.models.family import family_of
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.engine import Engines, Layered, LayerTime, Tapped
from aapt_deploy.rollout.loop import Steering, rollout
from aapt_deploy.rollout.starts import Start, all_starts, coarse_start
from aapt_deploy.video.sinks import open_sink

COLD_BLOCKS = 8
STAGES = ("step", "generator", "decoder", "commit", "hand-off", "encode", "prompt")
ENCODED_BLOCKS = 32  # kept for the end, where encoding would be in the way
LAYER_RUNS = 20  # of each graph, for the table of layers
MISS_SHARE = 0.01  # deadline misses that a stream's buffer absorbs; more fail the verdict


@dataclass(frozen=True)
class StageTimes:
    """Percentiles of one stage's steady times, in milliseconds."""

    count: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float

    @classmethod
    def of(cls, seconds: list[float]) -> "StageTimes":
        ms = np.array(seconds) * 1000
        return cls(
            len(ms), *(round(float(v), 3) for v in (*np.percentile(ms, (50, 95, 99)), ms.max()))
        )


@dataclass(frozen=True)
class Latency:
    """The verdict and what it rests on."""

    profile: str
    backend: str
    precision: str
    blocks: int
    passes_per_block: int
    budget_ms: float
    steady: dict[str, StageTimes]
    cold_step_ms: list[float]
    first_frame_ms: float  # open engines and start image -> first block's frames
    open_ms: float
    sustained_fps: float
    deadline_misses: int
    machine: dict[str, str | int]
    samples_ms: list[float] = field(repr=False)
    floor_ms: dict[str, float] = field(
        default_factory=dict
    )  # of stages, by arithmetic (models/cost.py); where the target's rates are known
    layers: dict[str, list[LayerTime]] = field(
        default_factory=dict, repr=False
    )  # by graph; of backends that can tell

    @property
    def within_budget(self) -> bool:
        """p95 of a step inside the budget, and almost no block late."""
        return (
            self.steady["step"].p95_ms <= self.budget_ms
            and self.deadline_misses <= MISS_SHARE * self.blocks
        )

    def json(self) -> str:
        return json.dumps({**asdict(self), "within_budget": self.within_budget})


class Stopwatch:
    """A tap that adds up what the engines' calls take, in seconds by stage, block by block.

    Two blocks may be in progress in two threads.
    """

    def __init__(self) -> None:
        self.making: dict[str, float] = {}  # the block that is being generated
        self.made: deque[dict[str, float]] = deque()  # blocks that wait to be decoded
        self.decoding: dict[str, float] = {}

    def __call__(
        self, graph: str, method: str, call: Callable[..., Any], arguments: dict[str, Any]
    ) -> Any:
        start = time.perf_counter()
        answer = call(**arguments)
        spent = self.decoding if graph == "decoder" else self.making
        reset = "prompt" if arguments else "reset"
        stage = {"run": graph, "commit": "commit", "turn": "commit", "reset": reset}[method]
        spent[stage] = spent.get(stage, 0.0) + time.perf_counter() - start
        if method == "commit":
            self.made.append(self.making)
            self.making = {}
        return answer

    def clear(self) -> dict[str, float]:
        """Return and forget what the start took. No block may be in progress."""
        spent = self.made.popleft() if self.made else {}
        self.making, self.decoding = {}, {}
        return spent

    def next_block(self) -> dict[str, float]:
        """Return what the oldest block took that was not returned yet."""
        spent, self.decoding = self.made.popleft() | self.decoding, {}
        return spent


def measure_bundle(
    bundle: Bundle, backend: str, precision: str | None, blocks: int,
    warn: Callable[[str], None], progress: Callable[[str], None],
) -> Latency:  # fmt: skip
    """Measure an engine of `bundle` from its first start frame."""
    open_all = lambda: open_engines(bundle, backend, precision, warn)
    done = _counting(progress, blocks)
    return measure(open_all, bundle.profile, all_starts(bundle)[0], blocks, done)


def measure_random(
    profile: Profile, precision: str | None, blocks: int, progress: Callable[[str], None]
) -> Latency:
    """Measure random weights in the shape of `profile`, drawn on the GPU in seconds.

    It shows what a size costs before a checkpoint or a file exists.
    """
    from aapt_deploy.backends.torch_cuda import engine

    refuse_unsupported(profile, engine.BACKEND)
    open_all = lambda: engine.open_random(profile, precision)
    return measure(open_all, profile, coarse_start(profile), blocks, _counting(progress, blocks))


def _counting(progress: Callable[[str], None], blocks: int) -> Callable[[int], None]:
    return lambda done: progress(f"{done} of {COLD_BLOCKS + blocks} blocks")


def measure(
    open_all: Callable[[], Engines],
    profile: Profile,
    begin: Start,
    blocks: int,
    progress: Callable[[int], None],
) -> Latency:
    """Run `blocks` steady blocks after COLD_BLOCKS cold ones and report.

    Call `progress` with the number of blocks done.
    """
    start = time.perf_counter()
    watch, engines = Stopwatch(), open_all()
    opened = time.perf_counter()
    beside = engines.overlapped
    stages: dict[str, list[float]] = {name: [] for name in STAGES}
    cold: list[float] = []
    kept: list[np.ndarray] = []
    steering = Steering(family_of(profile).cruise, begin.text)
    try:
        tapped, video = Tapped(engines, watch), profile.video
        frames = rollout(tapped, profile, begin.image, lambda block: steering, seed=0)
        next(frames)
        if read := watch.clear().get("prompt"):  # by families whose start is a block
            stages["prompt"].append(read)
        size = video.width, video.height, video.fps
        with TemporaryDirectory() as folder, open_sink(f"{folder}/encode.mp4", None, *size) as sink:
            first = 0.0
            for block in range(COLD_BLOCKS + blocks):
                before = time.perf_counter()
                shown = next(frames)
                after = time.perf_counter()
                first = first or after - start
                step, spent, steady = after - before, watch.next_block(), block >= COLD_BLOCKS
                if spent.get("prompt"):
                    stages["prompt"].append(spent["prompt"])
                if steady:
                    stages["step"].append(step)
                    stages["hand-off"].append(_hand_off(step, spent, beside))
                    for name in ("generator", "decoder", "commit"):
                        stages[name].append(spent.get(name, 0.0))
                else:
                    cold.append(step)
                if not beside:
                    sink.write(shown)
                    stages["encode"] += [time.perf_counter() - after] if steady else []
                elif len(kept) < ENCODED_BLOCKS:
                    kept.append(shown)
                progress(block + 1)
            stages["encode"] += [_seconds(partial(sink.write, shown)) for shown in kept]
        layers = engines.layer_times(LAYER_RUNS) if isinstance(engines, Layered) else {}
    finally:
        engines.close()
    return _summary(profile, engines, stages, cold, (first, opened - start), layers)


def _summary(
    profile: Profile, engines: Engines, stages: dict[str, list[float]], cold: list[float],
    start_s: tuple[float, float], layers: dict[str, list[LayerTime]],
) -> Latency:  # fmt: skip
    """Summarise times in seconds. start_s: to the first frame, and of that to open the engines."""
    steps = stages["step"]
    return Latency(
        profile=profile.name,
        backend=engines.backend,
        precision=engines.precision,
        blocks=len(steps),
        passes_per_block=profile.passes,
        budget_ms=round(profile.step_budget_ms, 1),
        steady={name: StageTimes.of(times) for name, times in stages.items() if times},
        cold_step_ms=[round(1000 * s, 2) for s in cold],
        first_frame_ms=round(1000 * start_s[0], 1),
        open_ms=round(1000 * start_s[1], 1),
        sustained_fps=round(profile.frames_per_block * len(steps) / sum(steps), 1),
        deadline_misses=sum(1000 * s > profile.step_budget_ms for s in steps),
        machine=machine(),
        samples_ms=[round(1000 * s, 3) for s in steps],
        layers=layers,
    )


def _hand_off(step: float, spent: dict[str, float], beside: bool) -> float:
    """Return what of a step no stage accounts for."""
    decoder = spent.get("decoder", 0.0)
    others = sum(spent.values()) - decoder
    return max(0.0, step - max(decoder, others)) if beside else step - decoder - others


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
