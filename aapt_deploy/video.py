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
from fractions import Fraction
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import av
import numpy as np
from av.error import FFmpegError
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from av.video.stream import VideoStream

from aapt_deploy.errors import InputError, MachineError, OutputError, UsageError

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
_LARGEST_IMAGE_BYTES = 256 << 20  # of an endless "file" such as a device no more is read
_LARGEST_IMAGE_PIXELS = 100_000_000
_IMAGE_DECODERS = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "mjpeg"), (b"RIFF", "webp"))  # first bytes, decoder


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


def _covering(frame: av.VideoFrame, width: int, height: int, pixel_aspect: Fraction) -> np.ndarray:
    """`frame` upright, scaled to cover `width` x `height` and cut to it at the centre: uint8 [H, W, 3]."""
    turns = frame.rotation // 90 % 4  # phones store pictures lying down
    across, down = (height, width) if turns % 2 else (width, height)
    shown = float(frame.width * pixel_aspect)
    scale = max(across / shown, down / frame.height)
    scaled_width, scaled_height = max(across, round(shown * scale)), max(down, round(frame.height * scale))
    method = Interpolation.AREA if scale < 1 else Interpolation.BICUBIC
    scaled = frame.reformat(width=scaled_width, height=scaled_height, format="rgb24", interpolation=method | _EXACT, threads=1).to_ndarray()
    left, top = (scaled_width - across) // 2, (scaled_height - down) // 2
    return np.ascontiguousarray(np.rot90(scaled[top : top + down, left : left + across], turns))  # [H, W, 3]


def read_image(path: str | Path, width: int, height: int) -> np.ndarray:
    """The PNG, JPEG or WebP picture in `path` as uint8 [height, width, 3], resized where needed.

    Raises InputError for a file that cannot be read or is no whole picture, and for an aspect ratio more than 1 % off.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST_IMAGE_BYTES)
    except OSError as error:
        raise InputError(f"image {path}: {error.strerror or error}", "name a PNG, JPEG or WebP picture") from None
    decoder = next((name for start, name in _IMAGE_DECODERS if data.startswith(start) and (name != "webp" or data[8:12] == b"WEBP")), None)
    if decoder is None:
        raise InputError(f"image {path}: not a PNG, JPEG or WebP picture", "convert it: ffmpeg -i PICTURE start.png")
    context = av.CodecContext.create(decoder, "r")
    assert isinstance(context, VideoCodecContext)
    context.options = {"err_detect": "explode+crccheck+bitstream+buffer", "max_pixels": str(_LARGEST_IMAGE_PIXELS)}
    frames: list[av.VideoFrame] = []
    with contextlib.suppress(FFmpegError):
        frames = [frame for packet in (av.Packet(data), None) for frame in context.decode(packet)]
    if not frames:
        raise InputError(f"image {path}: damaged, cut off or larger than {_LARGEST_IMAGE_PIXELS:,} pixels", "open it in a viewer and save it again")
    frame = frames[0]
    found = (frame.width, frame.height) if frame.rotation % 180 == 0 else (frame.height, frame.width)
    if abs(found[0] * height / (found[1] * width) - 1) > 0.01:
        crop = f"scale={width}:{height}:force_original_aspect_ratio=increase,crop={width}:{height}"
        hint = f"crop it to {width}x{height}: ffmpeg -i {shlex.quote(str(path))} -vf {crop} start.png"
        raise InputError(f"image {path} is {found[0]}x{found[1]}, which is not the shape of {width}x{height}", hint)
    return _covering(frame, width, height, Fraction(1))


def read_video(path: str | Path, width: int, height: int, fps: int) -> Iterator[np.ndarray]:
    """Frames uint8 [height, width, 3] of the video in `path` at `fps`: the frame nearest in time, cut at the centre to the wanted shape, resized.

    Lazy: the file is opened at the first frame. Raises InputError for a file that is no video or is damaged.
    """
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise InputError(f"video {path}: has no picture", "name a video file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            stream.codec_context.options = {"err_detect": "explode"}
            shown = 0  # frames handed out
            for frame, until in _display_times(path, container.decode(stream), stream.average_rate or Fraction(fps), Fraction(fps)):
                picture = None  # converted only if it is shown, and once
                while Fraction(shown, fps) < until:
                    picture = _covering(frame, width, height, stream.sample_aspect_ratio or Fraction(1)) if picture is None else picture
                    yield picture
                    shown += 1
    except (FFmpegError, OSError) as error:
        raise InputError(f"video {path}: {error.strerror or error}", "name a video file that plays to its end") from None


def _display_times(path: str | Path, frames: Iterator[av.VideoFrame], rate: Fraction, fps: Fraction) -> Iterator[tuple[av.VideoFrame, Fraction]]:
    """Each frame with the time in seconds, counted from the first frame, until which it is the nearest one. The last one ends half a frame of
    `fps` early, which makes the count that comes out the nearest integer to duration x fps."""
    previous, start, last = None, Fraction(0), Fraction(0)
    for number, frame in enumerate(frames):
        if frame.is_corrupt:
            raise InputError(f"video {path}: frame {number} is damaged", "leave the file out, or repair it by encoding it again")
        at = frame.pts * frame.time_base if frame.pts is not None and frame.time_base is not None else Fraction(number) / rate
        if previous is None:
            start = at
        else:
            yield previous, (last + at) / 2 - start
        previous, last = frame, at
    if previous is None:
        raise InputError(f"video {path}: holds no frame", "name a video file that plays")
    yield previous, last - start + 1 / rate - 1 / (2 * fps)


def write_image(path: str | Path, frame: np.ndarray) -> None:
    """Write `frame`, uint8 [H, W, 3], as a PNG. Raises OutputError."""
    assert (frame.dtype.name, frame.shape[2:]) == ("uint8", (3,)), f"{frame.dtype=} {frame.shape=}"
    context = av.CodecContext.create("png", "w")
    context.height, context.width, context.pix_fmt, context.time_base = frame.shape[0], frame.shape[1], "rgb24", Fraction(1)
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    data = b"".join(bytes(packet) for frames in (picture, None) for packet in context.encode(frames))
    try:
        Path(path).write_bytes(data)
    except OSError as error:
        raise _unwritable(str(path), error) from None
