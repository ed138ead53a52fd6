"""Evaluate how long a generator's world holds (`aapt train evaluate`).

Flights last minutes, and a renderer knows the truth. figures.py measures, flights.py flies,
scores.py explains the figures.
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from aapt_deploy.backends.table import open_engines
from aapt_deploy.backends.torch_eager import EagerEngines
from aapt_deploy.backends.trial import Report
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.bundle.files import whole
from aapt_deploy.errors import UsageError
from aapt_deploy.measure.machine import machine
from aapt_deploy.models import checkpoint
from aapt_deploy.models.aapt.prompts import Look
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.engine import Engines
from aapt_deploy.train.judge.figures import (
    Classifier,
    Crowd,
    Response,
    Track,
    measure_frames,
    stacked,
)
from aapt_deploy.train.judge.flights import FIRST_WORLD, FlightPlan, flight_plans, generated_flight
from aapt_deploy.train.judge.scores import WINDOW_S, Flown, Truth, restarted, score, score_true
from aapt_deploy.train.world.worlds import CLEARANCE, World, headroom, start_pose
from aapt_deploy.video.pictures import write_image

CHUNK = 32  # blocks measured at a time
SHEET_ROWS = 6
SHEET_COLUMNS = 7
TEACHING_WORLDS = 160  # training worlds that the prompt classifier is fitted on
TEACHING_VIEWS = 4  # pictures of each, from where a flight may be
TEACHING_TRIES = 400


class Candidate(NamedTuple):
    """A generator that is judged."""

    profile: Profile
    sha256: str  # of its checkpoint
    open: Callable[[], Engines]


def _candidate(path: Path, backend: str, precision: str | None, warn: Report) -> Candidate:
    """Open a bundle with the wanted engines, or a checkpoint, which runs in torch and float32."""
    if path.is_file():
        loaded = checkpoint.load(path)
        run = lambda: EagerEngines(loaded, torch.get_num_threads(), "fp32")
        return Candidate(loaded.profile, loaded.sha256, run)
    bundle = Bundle.open(path)
    sha256 = bundle.manifest["source"]["sha256"]
    return Candidate(bundle.profile, sha256, lambda: open_engines(bundle, backend, precision, warn))


def _names(paths: Sequence[Path]) -> list[str]:
    """Name each path by its last part, with as much before it as makes names differ.

    Raises UsageError if a path is given twice.
    """
    resolved = [path.resolve() for path in paths]
    parts = [(p.with_suffix("") if p.suffix == ".safetensors" else p).parts for p in resolved]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part[-length:]).strip("/") for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError(
        f"one of {', '.join(map(str, paths))} is named twice", "name each bundle or checkpoint once"
    )


def evaluate(
    bundles: Sequence[Path], out: Path, flights: int, seconds: int, backend: str,
    precision: str | None, warn: Report, report: Report,
) -> dict[str, Any]:  # fmt: skip
    """`judge` bundles and checkpoints. Raises UsageError if a path is given twice."""
    named = zip(_names(bundles), bundles, strict=True)
    candidates = {name: _candidate(path, backend, precision, warn) for name, path in named}
    return judge(candidates, out, flights, seconds, report)


def judge(
    candidates: Mapping[str, Candidate], out: Path, flights: int, seconds: int, report: Report
) -> dict[str, Any]:
    """Fly all candidates through the same plans. Return the record.

    Write evaluation.json, curves.png and one sheet each into `out`.

    Raises UsageError if candidates differ in picture size or frame rate, or if `seconds` is not a
    multiple of the window. Raises what opening an engine raises. All before the first flight.
    """
    refuse_length(seconds)
    (first, leader), *others = candidates.items()
    profile = leader.profile
    for name, other in others:
        if other.profile.video != profile.video:
            raise UsageError(
                f"{first} and {name} differ in their video",
                "evaluate generators of one picture size and rate together",
            )
    for candidate in candidates.values():
        candidate.open().close()
    out.mkdir(parents=True, exist_ok=True)
    per_second = profile.video.fps // profile.video.temporal_stride
    truth = _truth(profile, flights, seconds * per_second, report)
    results = {}
    for name, candidate in candidates.items():
        flown = _fly_all(candidate, truth, partial(_under, name, report))
        results[name] = {
            "checkpoint": candidate.sha256,
            "engine": flown[0].engine,
            "timesteps": candidate.profile.sampler.timesteps,
        } | score(flown, truth, profile)
        _sheet(out / f"sheet-{name}.png", flown)
    record = {
        "what": "generated flights against the renderer",
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": {"torch": torch.__version__.split("+")[0]},
        "profile": profile.name,
        "flights": flights,
        "seconds": seconds,
        "window_s": WINDOW_S,
        "first_world": FIRST_WORLD,
        "true": score_true(truth, per_second),
        "made": results,
    }
    with whole(out / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    _curves(out / "curves.png", record)
    return record


def refuse_length(seconds: int) -> None:
    """Raise UsageError if windows do not divide flights of this length."""
    if seconds % WINDOW_S:
        raise UsageError(
            f"{seconds} seconds are no multiple of the {WINDOW_S} s window",
            f"take {seconds // WINDOW_S * WINDOW_S + WINDOW_S}",
        )


def _truth(profile: Profile, flights: int, blocks: int, report: Report) -> Truth:
    plans: list[FlightPlan] = []
    for plan in flight_plans(profile, flights, blocks):
        plans.append(plan)
        report(f"{len(plans)} of {flights} true flights")
    tracks = [measure_frames(plan.true) for plan in plans]
    commands = [plan.commands(profile) for plan in plans]
    seen = stacked([track.rows(slice(1, None)) for track in tracks])
    flown = [c[: len(t.motion) - 1] for c, t in zip(commands, tracks, strict=True)]
    response = Response.fit(np.concatenate(flown), seen.motion)
    late = [measure_frames(plan.late).rows(slice(1, None)) for plan in plans if len(plan.late)]
    crowd, classifier = Crowd(seen.features, flights), _classifier(profile, report)
    return Truth(plans, tracks, late, crowd, response, classifier, commands)


def _classifier(profile: Profile, report: Report) -> Classifier:
    """Fit a classifier on pictures of training worlds."""
    features, looks = [], []
    for seed in range(TEACHING_WORLDS):
        world = World(seed, Look(), profile.video.width, profile.video.height)
        rng = np.random.default_rng((seed, 3))
        tries = (start_pose(world, rng) for _ in range(TEACHING_TRIES))
        poses = (pose for pose in tries if headroom(world, [pose]) > CLEARANCE)
        views = [world.render(pose) for pose in islice(poses, TEACHING_VIEWS)]
        if views:  # a few worlds have no room for a flight
            features.append(measure_frames(np.stack(views)).features)
            looks += [world.look] * len(views)
        report(f"{seed + 1} of {TEACHING_WORLDS} worlds to learn prompts from")
    return Classifier(np.concatenate(features), looks)


def _under(name: str, report: Report, text: str) -> None:
    report(f"{name}: {text}")


def _fly_all(candidate: Candidate, truth: Truth, report: Report) -> list[Flown]:
    engines, profile = candidate.open(), candidate.profile
    blocks, video = len(truth.plans[0].velocities), profile.video
    window = WINDOW_S * video.fps // video.temporal_stride
    columns = np.linspace(0, blocks, SHEET_COLUMNS).round().astype(int)
    engine = f"{engines.backend}-{engines.precision}"
    flown: list[Flown] = []
    try:
        for plan in truth.plans:
            tracks: list[Track] = []
            waiting: list[np.ndarray] = []
            shown: list[np.ndarray] = []
            before: np.ndarray | None = None
            for block, frame in enumerate(generated_flight(engines, profile, plan)):
                waiting.append(frame)
                shown += [frame] * int((columns == block).sum())
                if len(waiting) == CHUNK or block == blocks:
                    tracks.append(measure_frames(np.stack(waiting), before))
                    waiting, before = [], frame
            again: Track | None = None
            if blocks > window:
                end = restarted(plan, shown[-1], window)
                again = measure_frames(np.stack(list(generated_flight(engines, profile, end))))
            flown.append(Flown(stacked(tracks), np.stack(shown), again, engine))
            report(f"{len(flown)} of {len(truth.plans)} flights")
    finally:
        engines.close()
    return flown


def _sheet(path: Path, flown: list[Flown]) -> None:
    """Draw a row per flight, a column per moment from the start to the end."""
    rows = [np.concatenate(list(f.shown), axis=1) for f in flown[:SHEET_ROWS]]
    write_image(path, np.ascontiguousarray(np.concatenate(rows)))


def _curves(path: Path, record: dict[str, Any]) -> None:
    """Draw the figures over time, a line per candidate, the true flights dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    reads: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "sharpness": lambda w: w["sharpness"],
        "colour, levels from the start frame": lambda w: w["colour"],
        "Frechet distance": lambda w: w["distance"],
        "dynamics": lambda w: w["dynamics"],
        "gain: yaw": lambda w: w["gains"]["yaw"],
        "prompt obedience": lambda w: float(np.mean(list(w["prompt"].values()))),
    }
    for axes, (title, read) in zip(figure.subplots(2, 3).ravel(), reads.items(), strict=True):
        for name, result in record["made"].items():
            figures = np.array([read(w) for w in result["windows"]], float)  # a None is a gap
            middles = [w["from_s"] + WINDOW_S / 2 for w in result["windows"]]
            axes.plot(middles, figures, marker=".", label=name)
        shown = [record["true"][name] for name in ("window", "last") if name in record["true"]]
        true = np.array([read(window) for window in shown], float)
        ends = [WINDOW_S / 2, record["seconds"] - WINDOW_S / 2]
        style = {"color": "grey", "linestyle": "--", "label": "true flights"}
        axes.plot(ends, [true[0], true[-1]], linewidth=1, **style)
        axes.set(title=title, xlabel="seconds")
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    figure.axes[0].legend()
    figure.savefig(path)
