"""Score generated flights, by window of five seconds and by second against the truth.

By windows, over all flights:

    sharpness    mean gradient over that of the true flights' first seconds; 1 is as sharp as a
                 render, a blur is less
    colour       distance of a picture's channel means from its own start frame's, in levels of 255
    distance     Frechet distance of the pictures, as a crowd, from true ones
    dynamics     change from block to block over that of true flights; 0 has frozen
    flow         optical flow of the whole picture, from block to block, over that of true flights:
                 the dynamic degree
    gains        answer to yaw, strafe, pitch and forward, from block to block, over that of true
                 flights; 1 obeys, 0 ignores
    gain_errors  standard errors of these, from flights drawn with repetition
    correlation  of the motion that a true flight would show with the measured one
    prompt       share of pictures in which each attribute is read as prompted

Turns are obeyed in degrees. How much a step forward or sideways moves a picture depends on how far
away the land is, in true flights as well. So each flight restarts from its own last picture, along
its last commands. This window `again` has the views of the last one, and no history; it separates
what is shown from what was forgotten.

By second for the first five, against the true picture of the same moment:

    terrain      correlation in blocks of 8 pixels
    still        terrain of the start frame, if it is simply kept
    recognised   share of flights whose picture is closer to its own truth than to any other's
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from aapt_deploy.profiles import Profile
from aapt_deploy.train.judge.figures import MOVES, Classifier, Crowd, Response, Track, stacked
from aapt_deploy.train.judge.flights import TRUE_SECONDS, FlightPlan

WINDOW_S = 5
DRIFTS = ("sharpness", "colour", "distance", "dynamics", "flow")  # figures with a slope a minute


class Flown(NamedTuple):
    """One generated flight."""

    track: Track  # row 0 is the start frame, as decoded
    shown: np.ndarray  # uint8 [columns, H, W, 3]
    # Restarted from the last picture, as many blocks as a window has. None if the flight is one
    # window long.
    again: Track | None = None
    engine: str = ""  # backend and precision


class Truth(NamedTuple):
    """What the generated flights are compared with."""

    plans: list[FlightPlan]
    tracks: list[Track]  # of plan.true
    late: list[Track]  # of plan.late, if it has any
    crowd: Crowd
    response: Response
    classifier: Classifier
    commands: list[np.ndarray]  # per plan [n, 4]


def restarted(plan: FlightPlan, picture: np.ndarray, blocks: int) -> FlightPlan:
    """Return the last `blocks` blocks of a plan, from a `picture` [H, W, 3] without history."""
    return dataclasses.replace(plan, velocities=plan.velocities[-blocks:], true=picture[None])


def score(flown: list[Flown], truth: Truth, profile: Profile) -> dict[str, Any]:
    """Return all figures of one candidate."""
    per_second = profile.video.fps // profile.video.temporal_stride
    size, blocks = WINDOW_S * per_second, len(truth.plans[0].velocities)
    tracks = [f.track for f in flown]
    windows = []
    for first in range(0, blocks, size):
        rows = [track.rows(slice(1 + first, 1 + first + size)) for track in tracks]
        figures = _window(rows, [c[first : first + size] for c in truth.commands], truth)
        windows.append(figures | {"from_s": round(first / per_second)})
    compared = range(min(TRUE_SECONDS, blocks // per_second) + 1)
    seconds = [_moment(tracks, truth, second * per_second) for second in compared]
    result: dict[str, Any] = {"windows": windows, "seconds": seconds}
    if again := [f.again.rows(slice(1, None)) for f in flown if f.again is not None]:
        ends = [restarted(plan, plan.true[0], size) for plan in truth.plans]
        result["again"] = _window(again, [plan.commands(profile) for plan in ends], truth)
    if len(windows) > 1:
        minutes = np.arange(len(windows)) * WINDOW_S / 60
        curves = {name: [window[name] for window in windows] for name in DRIFTS}
        slopes = {name: np.polyfit(minutes, curve, 1)[0] for name, curve in curves.items()}
        result["drift_per_minute"] = _rounded(slopes)
    return result


def score_true(truth: Truth, per_second: int) -> dict[str, Any]:
    """Return the same figures of the true flights' first and last seconds.

    They are renders, which no decoder has softened.
    """
    size, blocks = len(truth.tracks[0].gradient) - 1, len(truth.commands[0])
    tracks = [track.rows(slice(1, None)) for track in truth.tracks]
    window = _window(tracks, [c[:size] for c in truth.commands], truth)
    result: dict[str, Any] = {"window": window | {"from_s": 0}, "seconds": size / per_second}
    if truth.late:
        last = _window(truth.late, [c[-size:] for c in truth.commands], truth)
        result["last"] = last | {"from_s": round((blocks - size) / per_second)}
    return result


def _window(tracks: list[Track], told: list[np.ndarray], truth: Truth) -> dict[str, Any]:
    """Return the figures of flights that were commanded `told` [n, 4] each."""
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
        "sharpness": _rounded(made.gradient.mean() / true.gradient.mean()),
        "colour": _rounded(np.abs(made.colour - starts).mean()),
        "distance": _rounded(truth.crowd.distance(made.features)),
        "dynamics": _rounded(made.change.mean() / true.change.mean()),
        "flow": _rounded(made.flow.mean() / true.flow.mean()),
        "gains": _rounded(Response.fit(commands, made.motion).against(truth.response)),
        "gain_errors": _rounded(dict(zip(MOVES, errors, strict=True))),
        "correlation": _rounded(truth.response.correlation(commands, made.motion)),
        "prompt": _rounded(truth.classifier.obedience(made.features, looks)),
    }


def _moment(tracks: list[Track], truth: Truth, block: int) -> dict[str, float]:
    """Return the paired figures of one block."""
    made, true = (
        np.stack([track.coarse[block] for track in group]) for group in (tracks, truth.tracks)
    )
    starts = np.stack([track.coarse[0] for track in truth.tracks])
    likeness = made @ true.T  # [flights, flights]
    sharp = sum(t.gradient[block] for t in tracks) / sum(t.gradient[block] for t in truth.tracks)
    return {
        "terrain": _rounded(likeness.diagonal().mean()),
        "still": _rounded((starts * true).sum(1).mean()),
        "recognised": _rounded((likeness.argmax(1) == np.arange(len(tracks))).mean()),
        "sharpness": _rounded(sharp),
    }


def _rounded(value: Any) -> Any:
    """Round to three digits. Return None, which JSON has, for what is not a number.

    That is a figure of what was not commanded or does not move.
    """
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return round(float(value), 3) if np.isfinite(value) else None
