"""Frames out to files and pipes, pictures and videos in: everything that speaks to FFmpeg (through PyAV).

A `Sink` takes uint8 RGB frames. A regular file is written under `NAME.part.SUFFIX` beside its final name and renamed when it is closed, so the
final name never holds half a video and an older file survives a failed stream. Pipes and devices are written frame by frame, unbuffered.

Two rules hold everywhere. The same frames give the same bytes: no dates, no random ids, a fixed number of encoder threads. And what is
written is tagged with the colours it has: BT.709, limited range (y4m cannot say so and gets what its readers assume, see `_matrix`).

Deliberately not here: pacing to real time, progress, Ctrl-C policy (the command line's) and network addresses (pipe through ffmpeg).
"""

import contextlib
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from av.video.stream import VideoStream

from aapt_deploy.errors import MachineError, OutputError, UsageError

# libx264, by use. One-thread `zerolatency` hands every frame out as it comes in; a file may look ahead and use B frames. Thread counts are fixed
# because the bytes depend on them. `mbtree` is off: x264's SIMD version of it gave seven different files in eight runs at 192x112.
_H264_LIVE = {"preset": "veryfast", "tune": "zerolatency", "crf": "18", "threads": "1"}
_H264_FILE = {"preset": "veryfast", "crf": "17", "threads": "4", "x264-params": "mbtree=0"}


@dataclass(frozen=True)
class Format:
    """One output format: FFmpeg's names, and where it can go."""

    muxer: str
    codec: str
    pixels: str  # pixel format inside the container
    names: tuple[str, ...] = ()  # file suffixes and `format` values that mean it, besides its key
    to_pipe: bool = True  # False: the muxer must seek back to finish
    options: str = ""  # the muxer's, "key=value key=value"
    live_options: str = ""  # the muxer's, added for a pipe


# Plain mp4 is `hybrid_fragmented`: fragments while it is written, an ordinary mp4 once closed. After a kill -9 the .part file still plays up to
# its last full second (71 of 96 frames; an mp4 without fragments: none). Fragmented mp4 for pipes ends a fragment at each frame, for latency.
FORMATS: dict[str, Format] = {
    "mp4": Format("mp4", "libx264", "yuv420p", to_pipe=False, options="movflags=hybrid_fragmented"),
    "mkv": Format("matroska", "libx264", "yuv420p", ("matroska",), live_options="live=1 cluster_time_limit=0"),
    "y4m": Format("yuv4mpegpipe", "rawvideo", "yuv420p"),
    "nut": Format("nut", "rawvideo", "rgb24"),
    "mpegts": Format("mpegts", "libx264", "yuv420p", ("ts",)),
    "fmp4": Format("mp4", "libx264", "yuv420p", options="movflags=frag_every_frame+empty_moov+default_base_moof"),
    "rawvideo": Format("rawvideo", "rawvideo", "rgb24", ("rgb",)),
}
PIPE_FORMATS = tuple(name for name, known in FORMATS.items() if known.to_pipe)
DEFAULT_PIPE_FORMAT = "y4m"  # what every video tool reads without being told anything

_STDOUT = 1
# Alike on every CPU, chroma from all its pixels; without FULL_CHR_H_INT what is read comes out 1.6 grey levels too dark.
_EXACT = Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INP | Interpolation.FULL_CHR_H_INT


class ReaderGone(Exception):
    """The program that reads our pipe has closed it (`| head -c 1M`). Nothing is wrong: end quietly, with exit code 0."""


class _Target:
    """The file descriptor that FFmpeg writes to, unbuffered.

    FFmpeg calls `write` from C, so it never raises: the first failure is kept in `failure` and all later bytes are dropped. The muxer can
    then always be closed, and the sink raises `failure` when it is back in Python.
    """

    def __init__(self, fd: int, name: str, seekable: bool) -> None:
        self.fd, self.name, self._seekable = fd, name, seekable
        self.failure: BaseException | None = None

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        try:
            while len(rest) and self.failure is None:
                try:
                    rest = rest[os.write(self.fd, rest) :]
                except BlockingIOError:  # somebody made our stdout non-blocking
                    select.select([], [self.fd], [])
        except (OSError, KeyboardInterrupt, SystemExit) as error:  # the last two come from signal handlers
            self.failure = error
        return len(data)

    def seek(self, offset: int, whence: int) -> int:
        return os.lseek(self.fd, offset, whence)

    def tell(self) -> int:
        return self.seek(0, os.SEEK_CUR)

    def seekable(self) -> bool:
        return self._seekable


class Sink:
    """An open output. Use as a context manager: a normal end, Ctrl-C and `ReaderGone` close it (the file is complete and playable), any other
    exception aborts it (the unfinished file is dropped). `name` is for messages, `frames` counts what was written.

    Raises OutputError where the output fails, ReaderGone where a reader left; each once, so that a `close` on the way out stays silent.
    """

    def __init__(self, target: _Target, chosen: Format, size: tuple[int, int], fps: int, part: Path | None = None, final: Path | None = None) -> None:
        live = final is None
        self.name = str(final or target.name)
        self.frames = 0
        self._target, self._format, self._size = target, chosen, size
        self._part, self._final, self._closed = part, final, False
        words = f"fflags=+bitexact {chosen.options} {chosen.live_options if live else ''}"
        self._container = av.open(target, "w", format=chosen.muxer, options=dict(word.split("=") for word in words.split()))
        codec_options = (_H264_LIVE if live else _H264_FILE) if chosen.codec == "libx264" else {}
        stream = self._container.add_stream(chosen.codec, rate=fps, options=codec_options)
        assert isinstance(stream, VideoStream)
        self._stream = stream
        (stream.width, stream.height), stream.pix_fmt = size, chosen.pixels
        if chosen.pixels != "rgb24":
            context = stream.codec_context
            context.colorspace, context.color_range = _matrix(chosen, size), ColorRange.MPEG
            context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
            context.gop_size = fps  # a viewer can join, and a killed file ends, at any second

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        whole = error is None or isinstance(error, KeyboardInterrupt | SystemExit | ReaderGone)
        (self.close if whole else self.abort)()

    def write(self, frames: np.ndarray) -> None:
        """Append `frames`, uint8 [T, H, W, 3]. They are with the reader of a pipe when this returns."""
        assert (frames.dtype.name, frames.shape[1:]) == ("uint8", (*self._size[::-1], 3)), f"{frames.dtype=} {frames.shape=} {self._size=}"
        assert not self._closed, f"{self.name} is closed"
        for pixels in frames:
            with self._uninterrupted():
                for packet in self._stream.encode(self._picture(pixels)):
                    self._container.mux(packet)
                self.frames += 1
            self._check()

    def close(self) -> None:
        """Finish the output and give the file its final name. A stream without a frame leaves an older file of that name alone."""
        if self._closed or self._target.failure is not None or not self.frames:
            self.abort()
            return
        with self._uninterrupted():
            for packet in self._stream.encode(None):
                self._container.mux(packet)
            self._release()
        self._check()

    def abort(self) -> None:
        """Give up: nothing more is written, and the unfinished file is removed."""
        with self._uninterrupted():
            if not self._closed:
                self._target.failure = self._target.failure or BrokenPipeError()  # from here on bytes are dropped
                self._release()
            if self._part is not None:
                self._part.unlink(missing_ok=True)
                self._part = None

    def _picture(self, pixels: np.ndarray) -> av.VideoFrame:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")  # [H, W, 3]
        if self._format.pixels != "rgb24":
            colours = {"dst_colorspace": _matrix(self._format, self._size), "dst_color_range": ColorRange.MPEG}
            frame = frame.reformat(format=self._format.pixels, interpolation=Interpolation.AREA | _EXACT, threads=1, **colours)
        frame.pts = self.frames
        return frame

    def _release(self) -> None:
        self._closed = True
        self._container.close()
        try:
            os.close(self._target.fd)  # a network file system reports a full disk only here
            if self._target.failure is None and self._part is not None and self._final is not None:
                os.replace(self._part, self._final)
                self._part = None
        except OSError as error:
            self._target.failure = self._target.failure or error

    def _check(self) -> None:
        failure = self._target.failure
        if failure is not None:
            self.abort()
        if isinstance(failure, ConnectionError):
            raise ReaderGone(f"the reader of {self.name} is gone") from None
        if isinstance(failure, OSError):
            raise _unwritable(self.name, failure) from None
        if failure is not None:
            raise failure

    @contextlib.contextmanager
    def _uninterrupted(self) -> Iterator[None]:
        """Hold Ctrl-C back for one frame or one close, so that a file is never cut inside. A pipe stays interruptible: its reader may stall."""
        handler = signal.getsignal(signal.SIGINT)
        if self._final is None or not callable(handler) or threading.current_thread() is not threading.main_thread():
            yield
            return
        held: list[FrameType | None] = []
        signal.signal(signal.SIGINT, lambda _, frame: held.append(frame))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)
            if held:
                handler(signal.SIGINT, held[0])


def _matrix(chosen: Format, size: tuple[int, int]) -> Colorspace:
    """BT.709, except in y4m up to PAL size: it has no tag for the matrix, and there readers take BT.601 for granted."""
    untagged_sd = chosen.muxer == "yuv4mpegpipe" and size[0] <= 1024 and size[1] <= 576
    return Colorspace.ITU601 if untagged_sd else Colorspace.ITU709


def _unwritable(name: str, error: OSError) -> OutputError:
    return OutputError(f"{name}: cannot be written: {error.strerror or error}", "free some space or choose another place with -o")


def _choose(output: str, name: str | None) -> str:
    """The key in FORMATS that `name`, or without it the suffix of `output`, stands for."""
    if name is None and output == "-":
        return DEFAULT_PIPE_FORMAT
    known = {alias: key for key, chosen in FORMATS.items() for alias in (key, *chosen.names)}
    wanted = (name if name is not None else Path(output).suffix.removeprefix(".")).lower()
    if wanted in known:
        return known[wanted]
    what = f"format {name!r} is not known" if name is not None else f"{output}: the suffix {'.' + wanted if wanted else ''!r} names no video format"
    raise UsageError(what, f"formats: {', '.join(sorted(known))}; give one with --format or as the file's suffix")


def open_sink(output: str, format: str | None, width: int, height: int, fps: int) -> Sink:
    """Open `output`, a path or "-" for stdout, for frames of `width` x `height` pixels at `fps`.

    `format` is a key or alias of FORMATS; None takes the path's suffix, or y4m for stdout. Raises UsageError for a choice that cannot work,
    OutputError for a place that cannot be written, MachineError where the encoder is missing.
    """
    if not output:
        raise UsageError("the name of the output is empty", "name a file with -o, or - for stdout")
    if "://" in output:
        pipe = f"aapt stream ... -o - --format mpegts | ffmpeg -i - -c copy -f mpegts {shlex.quote(output)}"
        raise UsageError(f"{output} is an address; frames go to a file or to stdout", f"pipe them there: {pipe}")
    key = _choose(output, format)
    chosen = FORMATS[key]
    if chosen.pixels == "yuv420p" and (width % 2 or height % 2):
        raise UsageError(f"{key} cannot hold {width}x{height}: its colours need even sizes", "take nut or rawvideo, or a profile of even size")
    name, path = "stdout" if output == "-" else output, Path(os.path.realpath(output))  # a symbolic link stays one: what it points to is replaced
    if output != "-" and os.path.isdir(path):  # os.path, because pathlib raises for a name that is too long
        raise OutputError(f"{output} is a folder", f"name a file in it: -o {shlex.quote(str(Path(output) / 'stream.mkv'))}")
    is_file = output != "-" and (os.path.isfile(path) or not os.path.exists(path))
    if not is_file and not chosen.to_pipe:
        hint = f"formats that can: {', '.join(PIPE_FORMATS)} (fmp4 is fragmented mp4)"
        raise UsageError(f"{key} cannot go to {name}: it is finished by seeking back to its start", hint)
    if chosen.codec not in av.codecs_available:
        raise MachineError(f"{key} needs the encoder {chosen.codec}, which this PyAV lacks", "pip install --force-reinstall --only-binary av av")
    try:
        if not is_file:
            fd = _stdout() if output == "-" else os.open(path, os.O_WRONLY)
            return Sink(_Target(fd, name, seekable=False), chosen, (width, height), fps)
        there = next(parent for parent in path.parents if os.path.exists(parent))
        if not os.path.isdir(there):
            raise OutputError(f"{output}: {there} is not a folder", "name a file in a folder that exists")
        if there != path.parent:
            raise OutputError(f"{output}: there is no folder {path.parent}", f"make it first: mkdir -p {shlex.quote(str(path.parent))}")
        fd, part = _open_part(path)
    except OSError as error:
        raise _unwritable(name, error) from None
    return Sink(_Target(fd, output, seekable=True), chosen, (width, height), fps, part, path)


def _stdout() -> int:
    if sys.stdout is None:
        raise OutputError("stdout is closed", "redirect it to a file or a pipe, or name a file with -o")
    if os.isatty(_STDOUT):
        raise UsageError("stdout is a terminal, which cannot show video", "pipe it (aapt stream ... -o - | ffplay -) or name a file with -o")
    return os.dup(_STDOUT)


def _open_part(final: Path) -> tuple[int, Path]:
    """A new file beside `final`; numbered, as one may be left by a killed stream or belong to one that still runs."""
    taken = ""
    while True:
        part = final.with_name(f"{final.stem}.part{taken}{final.suffix}")
        try:
            return os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), part
        except FileExistsError:
            taken = str(int(taken or 1) + 1)
