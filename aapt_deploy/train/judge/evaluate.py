"""`aapt train evaluate`: how long a generator's world holds, over minutes, against a renderer that knows the truth.

By windows of five seconds, over all flights (figures.py measures, flights.py flies):

    sharpness    mean gradient over that of the true flights' first seconds; 1 is as sharp as a render, a blur is less
    colour       distance of a picture's channel means from its own start frame's, in levels of 255
    distance     Frechet distance of the pictures, as a crowd, from true ones
    dynamics     change from block to block over that of true flights; 0 has frozen
    flow         optical flow of the picture as a whole, from block to block, over that of true flights: the dynamic degree
    gains        answer to yaw, strafe, pitch and forward, from block to block, over that of true flights; 1 obeys, 0 ignores
    gain_errors  standard errors of these, from flights drawn anew with repetition
    correlation  of the motion that a true flight would show with what is seen
    prompt       share of pictures in which each attribute is read as prompted

Turns are obeyed in degrees, but how much a step forward or sideways moves a picture depends on how far away the land is, in true flights as well. To
tell what is shown from what was forgotten, each flight begins anew from its own last picture, along its last commands: the window `again` has the
views of the last one, and a history of none.

and by second for the first five, against the true picture of the same moment: `terrain`, correlation in blocks of 8 pixels; `still`, what the start
frame scores if it is simply kept; `recognised`, share of flights whose picture is closer to its own truth than to any other flight's.
"""

import dataclasses
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
from aapt_deploy.errors import UsageError
from aapt_deploy.measure.machine import machine
from aapt_deploy.models import checkpoint
from aapt_deploy.models.aapt.prompts import Look
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.engine import Engines
from aapt_deploy.train.judge.figures import (
    MOVES,
    Classifier,
    Crowd,
    Response,
    Track,
    measure_frames,
    stacked,
)
from aapt_deploy.train.judge.flights import (
    FIRST_WORLD,
    TRUE_SECONDS,
    FlightPlan,
    flight_plans,
    generated_flight,
)
from aapt_deploy.train.world.worlds import CLEARANCE, World, headroom, start_pose
from aapt_deploy.video.pictures import write_image

WINDOW_S = 5
CHUNK = 32  # blocks measured at a time
SHEET_ROWS = 6
SHEET_COLUMNS = 7
TEACHING_WORLDS = 160  # training worlds that the prompt classifier is fitted on
TEACHING_VIEWS = 4  # pictures of each, from where a flight may be
TEACHING_TRIES = 400


class Flown(NamedTuple):
    """One generated flight."""

    track: Track  # row 0 is the start frame, as decoded
    shown: np.ndarray  # uint8 [columns, H, W, 3]
    again: Track | None = (
        None  # begun anew from the last picture, as many blocks as a window has; none of a flight of one window
    )
    engine: str = ""  # backend and precision


class Truth(NamedTuple):
    """What the generated flights are held against."""

    plans: list[FlightPlan]
    tracks: list[Track]  # of plan.true
    late: list[Track]  # of plan.late, if it has any
    crowd: Crowd
    response: Response
    classifier: Classifier
    commands: list[np.ndarray]  # per plan [n, 4]


class Candidate(NamedTuple):
    """A generator that is judged."""

    profile: Profile
    sha256: str  # of its checkpoint
    open: Callable[[], Engines]


def _entrant(path: Path, backend: str, precision: str | None, warn: Report) -> Candidate:
    """A bundle with the engines asked for, or a checkpoint, which runs as it is: in torch and float32."""
    if path.is_file():
        held = checkpoint.load(path)
        return Candidate(
            held.profile, held.sha256, lambda: EagerEngines(held, torch.get_num_threads(), "fp32")
        )
    bundle = Bundle.open(path)
    return Candidate(
        bundle.profile,
        bundle.manifest["source"]["sha256"],
        lambda: open_engines(bundle, backend, precision, warn),
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each: the last part of its path, with as much before it as tells them apart. Raises UsageError for one path twice."""
    parts = [
        (path.resolve().with_suffix("") if path.suffix == ".safetensors" else path.resolve()).parts
        for path in paths
    ]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part[-length:]).strip("/") for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError(
        f"one of {', '.join(map(str, paths))} is named twice", "name each bundle or checkpoint once"
    )


def evaluate(
    bundles: Sequence[Path],
    out: Path,
    flights: int,
    seconds: int,
    backend: str,
    precision: str | None,
    warn: Report,
    report: Report,
) -> dict[str, Any]:
    """`judge` bundles and checkpoints. Raises UsageError as it does, and when one path is given twice."""
    names = _names(bundles)
    candidates = {
        name: _entrant(path, backend, precision, warn)
        for name, path in zip(names, bundles, strict=True)
    }
    return judge(candidates, out, flights, seconds, report)


def judge(
    candidates: Mapping[str, Candidate], out: Path, flights: int, seconds: int, report: Report
) -> dict[str, Any]:
    """Fly all candidates through the same plans; write evaluation.json, curves.png and one sheet each into `out`. Returns the record.

    Raises UsageError when candidates differ in picture size or frame rate, or when `seconds` is no multiple of the window, and what opening an engine
    does; all before the first flight.
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
        made = {
            "checkpoint": candidate.sha256,
            "engine": flown[0].engine,
            "timesteps": candidate.profile.sampler.timesteps,
        }
        results[name] = made | _judge(flown, truth, profile)
        _sheet(out / f"sheet-{name}.png", flown)
    record = {
        "what": "generated flights against the renderer", "date": datetime.date.today().isoformat(), "machine": machine(),
        "versions": {"torch": torch.__version__.split("+")[0]}, "profile": profile.name,
        "flights": flights, "seconds": seconds, "window_s": WINDOW_S,
        "first_world": FIRST_WORLD, "true": _judge_true(truth, per_second), "made": results,
    }  # fmt: skip
    (out / "evaluation.json").write_text(json.dumps(record, indent=1) + "\n")
    _curves(out / "curves.png", record)
    return record


def refuse_length(seconds: int) -> None:
    """Raise UsageError for flights of a length that windows do not divide."""
    if seconds % WINDOW_S:
        raise UsageError(
            f"{seconds} seconds are no multiple of the {WINDOW_S} s window",
            f"take {seconds // WINDOW_S * WINDOW_S + WINDOW_S}",
        )


def _truth(profile: Profile, flights: int, blocks: int, report: Report) -> Truth:
    planned: list[FlightPlan] = []
    for plan in flight_plans(profile, flights, blocks):
        planned.append(plan)
        report(f"{len(planned)} of {flights} true flights")
    tracks = [measure_frames(plan.true) for plan in planned]
    commands = [plan.commands(profile) for plan in planned]
    seen = stacked([track.rows(slice(1, None)) for track in tracks])
    response = Response.fit(
        np.concatenate([c[: len(t.motion) - 1] for c, t in zip(commands, tracks, strict=True)]),
        seen.motion,
    )
    late = [measure_frames(plan.late).rows(slice(1, None)) for plan in planned if len(plan.late)]
    return Truth(
        planned,
        tracks,
        late,
        Crowd(seen.features, flights),
        response,
        _classifier(profile, report),
        commands,
    )


def _classifier(profile: Profile, report: Report) -> Classifier:
    """Fitted on pictures of training worlds."""
    features, looks = [], []
    for seed in range(TEACHING_WORLDS):
        world, rng = (
            World(seed, Look(), profile.video.width, profile.video.height),
            np.random.default_rng((seed, 3)),
        )
        poses = (
            pose
            for _ in range(TEACHING_TRIES)
            if headroom(world, [pose := start_pose(world, rng)]) > CLEARANCE
        )
        if views := [
            world.render(pose) for pose in islice(poses, TEACHING_VIEWS)
        ]:  # in a few worlds there is no room, for flights neither
            features.append(measure_frames(np.stack(views)).features)
            looks += [world.look] * len(views)
        report(f"{seed + 1} of {TEACHING_WORLDS} worlds to learn prompts from")
    return Classifier(np.concatenate(features), looks)


def _under(name: str, report: Report, text: str) -> None:
    report(f"{name}: {text}")


def _anew(plan: FlightPlan, picture: np.ndarray, blocks: int) -> FlightPlan:
    """The last `blocks` blocks of a plan, from a `picture` [H, W, 3] of which nothing is known."""
    return dataclasses.replace(plan, velocities=plan.velocities[-blocks:], true=picture[None])


def _fly_all(candidate: Candidate, truth: Truth, report: Report) -> list[Flown]:
    engines = candidate.open()
    blocks, video = len(truth.plans[0].velocities), candidate.profile.video
    window = WINDOW_S * video.fps // video.temporal_stride
    columns = np.linspace(0, blocks, SHEET_COLUMNS).round().astype(int)
    flown: list[Flown] = []
    try:
        for plan in truth.plans:
            tracks: list[Track] = []
            held: list[np.ndarray] = []
            shown: list[np.ndarray] = []
            before: np.ndarray | None = None
            for block, frame in enumerate(generated_flight(engines, candidate.profile, plan)):
                held.append(frame)
                shown += [frame] * int((columns == block).sum())
                if len(held) == CHUNK or block == blocks:
                    tracks.append(measure_frames(np.stack(held), before))
                    held, before = [], frame
            anew = (
                measure_frames(
                    np.stack(
                        list(
                            generated_flight(
                                engines, candidate.profile, _anew(plan, shown[-1], window)
                            )
                        )
                    )
                )
                if blocks > window
                else None
            )
            flown.append(
                Flown(
                    stacked(tracks), np.stack(shown), anew, f"{engines.backend}-{engines.precision}"
                )
            )
            report(f"{len(flown)} of {len(truth.plans)} flights")
    finally:
        engines.close()
    return flown


def _judge(flown: list[Flown], truth: Truth, profile: Profile) -> dict[str, Any]:
    """All figures of one bundle."""
    per_second = profile.video.fps // profile.video.temporal_stride
    size, blocks = WINDOW_S * per_second, len(truth.plans[0].velocities)
    tracks = [f.track for f in flown]
    windows = [
        _window(
            [track.rows(slice(1 + first, 1 + first + size)) for track in tracks],
            [c[first : first + size] for c in truth.commands],
            truth,
        )
        | {"from_s": round(first / per_second)}
        for first in range(0, blocks, size)
    ]
    seconds = [
        _moment(tracks, truth, second * per_second)
        for second in range(min(TRUE_SECONDS, blocks // per_second) + 1)
    ]
    result: dict[str, Any] = {"windows": windows, "seconds": seconds}
    if again := [f.again.rows(slice(1, None)) for f in flown if f.again is not None]:
        commands = [_anew(plan, plan.true[0], size).commands(profile) for plan in truth.plans]
        result["again"] = _window(again, commands, truth)
    if len(windows) > 1:
        minutes = np.arange(len(windows)) * WINDOW_S / 60
        result["drift_per_minute"] = {
            name: _rounded(np.polyfit(minutes, [window[name] for window in windows], 1)[0])
            for name in ("sharpness", "colour", "distance", "dynamics", "flow")
        }
    return result


def _window(tracks: list[Track], told: list[np.ndarray], truth: Truth) -> dict[str, Any]:
    """The figures of flights that were `told` [n, 4] each."""
    made, each = stacked(tracks), len(tracks[0].gradient)
    true = stacked([track.rows(slice(1, None)) for track in truth.tracks])
    commands = np.concatenate(told)
    drawn = Response.resampled([(c, track.motion) for c, track in zip(told, tracks, strict=True)])
    gains = np.array([list(response.against(truth.response).values()) for response in drawn])
    errors = [
        np.std(gain[np.isfinite(gain)]) if np.isfinite(gain).any() else np.nan for gain in gains.T
    ]
    starts = np.stack([track.colour[0] for track in truth.tracks]).repeat(each, axis=0)
    looks = [plan.look for plan in truth.plans for _ in range(each)]
    return {
        "sharpness": _rounded(made.gradient.mean() / true.gradient.mean()), "colour": _rounded(np.abs(made.colour - starts).mean()),
        "distance": _rounded(truth.crowd.distance(made.features)), "dynamics": _rounded(made.change.mean() / true.change.mean()),
        "flow": _rounded(made.flow.mean() / true.flow.mean()),
        "gains": _rounded(Response.fit(commands, made.motion).against(truth.response)),
        "gain_errors": _rounded(dict(zip(MOVES, errors, strict=True))),
        "correlation": _rounded(truth.response.correlation(commands, made.motion)),
        "prompt": _rounded(truth.classifier.obedience(made.features, looks)),
    }  # fmt: skip


def _moment(tracks: list[Track], truth: Truth, block: int) -> dict[str, float]:
    """The paired figures of one block."""
    made, true = (
        np.stack([track.coarse[block] for track in group]) for group in (tracks, truth.tracks)
    )
    starts = np.stack([track.coarse[0] for track in truth.tracks])
    likeness = made @ true.T  # [flights, flights]
    sharp = sum(t.gradient[block] for t in tracks) / sum(t.gradient[block] for t in truth.tracks)
    return {
        "terrain": _rounded(likeness.diagonal().mean()), "still": _rounded((starts * true).sum(1).mean()),
        "recognised": _rounded((likeness.argmax(1) == np.arange(len(tracks))).mean()), "sharpness": _rounded(sharp),
    }  # fmt: skip


def _judge_true(truth: Truth, per_second: int) -> dict[str, Any]:
    """The same figures for the true flights, at first and at last: renders, which no decoder has softened."""
    size, blocks = len(truth.tracks[0].gradient) - 1, len(truth.commands[0])
    window = _window(
        [track.rows(slice(1, None)) for track in truth.tracks],
        [c[:size] for c in truth.commands],
        truth,
    )
    result: dict[str, Any] = {"window": window | {"from_s": 0}, "seconds": size / per_second}
    if truth.late:
        result["last"] = _window(truth.late, [c[-size:] for c in truth.commands], truth) | {
            "from_s": round((blocks - size) / per_second)
        }
    return result


def _rounded(value: Any) -> Any:
    """To three digits; what is no number (nothing was asked, nothing moves) is None, which JSON can say."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return round(float(value), 3) if np.isfinite(value) else None


def _sheet(path: Path, flown: list[Flown]) -> None:
    """A row per flight, a column per moment from the start to the end."""
    rows = [np.concatenate(list(f.shown), axis=1) for f in flown[:SHEET_ROWS]]
    write_image(path, np.ascontiguousarray(np.concatenate(rows)))


def _curves(path: Path, record: dict[str, Any]) -> None:
    """The figures over time, a line per bundle, the true flights dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    reads: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "sharpness": lambda w: w["sharpness"], "colour, levels from the start frame": lambda w: w["colour"],
        "Frechet distance": lambda w: w["distance"], "dynamics": lambda w: w["dynamics"],
        "gain: yaw": lambda w: w["gains"]["yaw"], "prompt obedience": lambda w: float(np.mean(list(w["prompt"].values()))),
    }  # fmt: skip
    for axes, (title, read) in zip(figure.subplots(2, 3).ravel(), reads.items(), strict=True):
        for name, result in record["made"].items():
            figures = np.array([read(w) for w in result["windows"]], float)  # a None is a gap
            axes.plot(
                [w["from_s"] + WINDOW_S / 2 for w in result["windows"]],
                figures,
                marker=".",
                label=name,
            )
        true = np.array(
            [read(record["true"][name]) for name in ("window", "last") if name in record["true"]],
            float,
        )
        ends = [WINDOW_S / 2, record["seconds"] - WINDOW_S / 2]
        axes.plot(
            ends,
            [true[0], true[-1]],
            color="grey",
            linestyle="--",
            linewidth=1,
            label="true flights",
        )
        axes.set(title=title, xlabel="seconds")
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    figure.axes[0].legend()
    figure.savefig(path)
