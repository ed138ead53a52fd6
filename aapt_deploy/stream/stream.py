"""Frames to a file, a pipe or another program, steered live: the job behind `aapt stream`.

It ties a rollout to a sink and a source of controls, and ends well: a signal finishes the block in hand and closes the file; a reader that has
gone away ends the stream quietly.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from aapt_deploy.backends.table import open_engines
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import UsageError
from aapt_deploy.models.aapt.camera import CRUISE
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.loop import Steer, Steering, rollout
from aapt_deploy.rollout.starts import Start, start, text_of
from aapt_deploy.stream.controls import Control, open_controls
from aapt_deploy.video.sinks import ReaderGone, open_sink

GRACE_S = 3.0  # for the block in hand, once a signal has come


@dataclass(frozen=True)
class Request:
    """What to stream."""

    output: str  # path, or "-" for stdout
    format: str | None = None  # None: from the suffix
    seconds: float | None = None  # None: until somebody stops it
    seed: int = 0
    image: str | None = None  # picture file or name of a start frame; None: the first start frame that fits the prompt
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


def stream(bundle: Bundle, request: Request, warn: Callable[[str], None], progress: Callable[[str], None]) -> Streamed:
    """Stream until `request.seconds`, a signal, or the reader's end. `warn` hears of bad controls and of an engine that is not for this CPU,
    `progress` one line per block.

    Raises the errors of the bundle, the prompt, the image, the controls and the sink; an existing output file survives them.
    """
    profile, began = bundle.profile, time.perf_counter()
    video = profile.video
    begin = start(bundle, request.image, request.prompt)
    wanted = frame_count(profile, request.seconds)
    controls = open_controls(request.controls, CRUISE, warn)
    block_s = video.temporal_stride / video.fps
    steer = _steering(profile, begin, lambda block: controls.at(block, block * block_s), warn)
    made, first, ended = 0, 0.0, "done"
    with _signals() as caught, open_sink(request.output, request.format, video.width, video.height, video.fps) as sink:
        engines = open_engines(bundle, request.backend, request.precision, warn)
        try:
            started = time.perf_counter()
            for frames in rollout(engines, profile, begin.image, steer, request.seed):
                if made and not first:
                    first = time.perf_counter() - began
                if request.realtime and made:
                    time.sleep(max(0.0, started + made / video.fps - time.perf_counter()))
                shown = frames if wanted is None else frames[: wanted - made]
                sink.write(shown)
                made += len(shown)
                progress(_line(made, video.fps, made / (time.perf_counter() - started), wanted))
                if caught or (wanted is not None and made >= wanted):
                    ended = "signal" if caught else "done"
                    break
        except ReaderGone:
            ended = "reader gone"
        finally:
            engines.close()
            controls.close()
    fps = max(made - 1, 0) / (time.perf_counter() - started)
    return Streamed(made, round(made / video.fps, 3), round(fps, 1), round(1000 * first, 1), request.output, ended, caught[0] if caught else 0)


def frame_count(profile: Profile, seconds: float | None) -> int | None:
    """Frames in `seconds` of video, at least one. Raises UsageError for a length that is no positive number."""
    if seconds is None:
        return None
    if not 0 < seconds * profile.video.fps < float("inf"):
        raise UsageError(f"--seconds {seconds} is not a positive length", "give for example --seconds 10")
    return max(1, round(seconds * profile.video.fps))


def _steering(profile: Profile, begin: Start, control_at: Callable[[int], Control], warn: Callable[[str], None]) -> Steer:
    """What holds in each block. A prompt that cannot be read is a warning here: the stream goes on."""
    text, asked = begin.text, begin.prompt

    def steer(block: int) -> Steering:
        nonlocal text, asked
        control = control_at(block)
        if begin.text is not None and control.prompt is not None and control.prompt != asked:
            asked = control.prompt
            try:
                text = text_of(profile, asked)
            except UsageError as error:
                warn(f"{error}; the last prompt stays")
        return Steering(control.velocity, text)

    return steer


def _line(frames: int, fps: int, made_per_s: float, wanted: int | None) -> str:
    length = "" if wanted is None else f" of {wanted / fps:.1f}"
    return f"{frames / fps:.1f}{length} s, {frames} frames, {made_per_s:.1f} fps"


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second one interrupts at once.

    So does the first where it is not heeded in time: a pipe that nobody opens or reads holds a write, and its writer, for ever.
    """
    caught: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)

    def insist(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)  # by way of whoever holds interrupts back: a file is not cut inside a frame

    handlers = {signal.SIGINT: handle, signal.SIGTERM: handle, signal.SIGALRM: insist}
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield caught
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in old.items():
            signal.signal(number, handler)
