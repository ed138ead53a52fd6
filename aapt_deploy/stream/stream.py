"""Frames to a file, a pipe or another program, steered live: the job behind `aapt stream`.

Ties a session to a sink and ends well. A signal finishes the current block and closes the file. A
reader that left ends the stream quietly.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from aapt_deploy.backends.table import open_engines
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import UsageError
from aapt_deploy.models.family import family_of
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.starts import start
from aapt_deploy.stream.controls import open_controls
from aapt_deploy.stream.session import Session, stop_signals
from aapt_deploy.video.sinks import ReaderGone, Sink, open_sink


@dataclass(frozen=True)
class Request:
    """What to stream."""

    output: str  # path, or "-" for stdout; only a name if `stream` gets a sink
    format: str | None = None  # None: from the suffix
    seconds: float | None = None  # None: until a signal
    seed: int = 0
    image: str | None = None  # picture file or start frame; None: the first that fits the prompt
    prompt: str | None = None  # None: the start frame's own
    controls: str | None = None  # file, "-" for stdin, None for a straight flight
    realtime: bool = False  # show each block when it is due, not as soon as it is made
    backend: str = "onnxruntime"
    precision: str | None = None


@dataclass(frozen=True)
class Streamed:
    """What was streamed."""

    frames: int
    seconds: float  # of video
    fps: float  # frames made per second of wall time, start image excluded
    first_frame_ms: float  # from the call to the first block's frames
    output: str
    ended: str  # "done", "signal" or "reader gone"
    signal: int = 0


def stream(
    bundle: Bundle,
    request: Request,
    warn: Callable[[str], None],
    progress: Callable[[str], None],
    sink: Sink | None = None,
) -> Streamed:
    """Stream until `request.seconds`, a signal, or the reader's end.

    Without a `sink`, opens the one that the request names. Calls `warn` with one line for bad
    controls and for an engine of another CPU, and `progress` with one line per block.

    Raises the errors of the bundle, the prompt, the image, the controls and the sink. An existing
    output file survives them.
    """
    profile, began = bundle.profile, time.perf_counter()
    video, family = profile.video, family_of(profile)
    begin = start(bundle, request.image, request.prompt)
    wanted = frame_count(profile, request.seconds)
    controls = open_controls(request.controls, family.cruise, family.limits, warn)
    session = Session(profile, begin, controls, warn, request.seed, wanted, request.realtime)
    made, ended = 0, "done"

    def opened() -> Sink:
        return open_sink(request.output, request.format, video.width, video.height, video.fps)

    with stop_signals() as caught, opened() if sink is None else sink as out:
        engines = open_engines(bundle, request.backend, request.precision, warn)
        try:
            started = time.perf_counter()
            for frames in session.frames(engines):
                out.write(frames)
                made += len(frames)
                progress(_line(made, video.fps, made / (time.perf_counter() - started), wanted))
                if caught:
                    ended = "signal"
                    break
        except ReaderGone:
            ended = "reader gone"
        finally:
            engines.close()
            controls.close()
    fps = round(max(made - 1, 0) / (time.perf_counter() - started), 1)
    first_ms = round(1000 * max(session.first_block_at - began, 0.0), 1)
    number = caught[0] if caught else 0
    seconds = round(made / video.fps, 3)
    return Streamed(made, seconds, fps, first_ms, request.output, ended, number)


def frame_count(profile: Profile, seconds: float | None) -> int | None:
    """Return the frames in `seconds` of video, at least one; None for None.

    Raises UsageError if the length is not a positive number.
    """
    if seconds is None:
        return None
    if not 0 < seconds * profile.video.fps < float("inf"):
        what = f"--seconds {seconds} is not a positive length"
        raise UsageError(what, "give for example --seconds 10")
    return max(1, round(seconds * profile.video.fps))


def _line(frames: int, fps: int, made_per_s: float, wanted: int | None) -> str:
    length = "" if wanted is None else f" of {wanted / fps:.1f}"
    return f"{frames / fps:.1f}{length} s, {frames} frames, {made_per_s:.1f} fps"
