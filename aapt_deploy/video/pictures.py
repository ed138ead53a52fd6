"""Read and write single pictures, and read the frames of a video file.

Pictures from people are untrusted: sizes and decoders are bounded before a byte is decoded.
"""

import contextlib
import shlex
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import Interpolation

from aapt_deploy.errors import InputError
from aapt_deploy.video.sinks import _EXACT, _unwritable

_LARGEST_IMAGE_BYTES = 256 << 20  # of an endless "file" such as a device no more is read


_LARGEST_IMAGE_PIXELS = 100_000_000


_IMAGE_DECODERS = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "mjpeg"), (b"RIFF", "webp"))  # first bytes, decoder


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
