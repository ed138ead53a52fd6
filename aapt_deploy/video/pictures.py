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
from aapt_deploy.video.packets import EXACT
from aapt_deploy.video.sinks import unwritable

_LARGEST_IMAGE_BYTES = 256 << 20  # read of an endless "file" such as a device
_LARGEST_IMAGE_PIXELS = 100_000_000
_DECODERS = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "mjpeg"), (b"RIFF", "webp"))
_STRICT = "explode+crccheck+bitstream+buffer"  # FFmpeg's err_detect


def _covering(frame: av.VideoFrame, width: int, height: int, pixel_aspect: Fraction) -> np.ndarray:
    """Return `frame` upright, scaled to cover the size and cut to it: uint8 [height, width, 3]."""
    turns = frame.rotation // 90 % 4  # phones store pictures turned
    across, down = (height, width) if turns % 2 else (width, height)
    shown = float(frame.width * pixel_aspect)
    scale = max(across / shown, down / frame.height)
    wide, high = max(across, round(shown * scale)), max(down, round(frame.height * scale))
    method = (Interpolation.AREA if scale < 1 else Interpolation.BICUBIC) | EXACT
    scaled = frame.reformat(wide, high, "rgb24", interpolation=method, threads=1).to_ndarray()
    left, top = (wide - across) // 2, (high - down) // 2
    cut = scaled[top : top + down, left : left + across]
    return np.ascontiguousarray(np.rot90(cut, turns))  # [H, W, 3]


def read_image(path: str | Path, width: int, height: int) -> np.ndarray:
    """Read a PNG, JPEG or WebP picture as uint8 [height, width, 3], resized if needed.

    Raises InputError if the file cannot be read or is not a whole picture, or if its aspect ratio
    is more than 1 % off.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST_IMAGE_BYTES)
    except OSError as error:
        hint = "name a PNG, JPEG or WebP picture"
        raise InputError(f"image {path}: {error.strerror or error}", hint) from None
    frame = _decoded(path, data)
    found = (frame.width, frame.height)
    if frame.rotation % 180:
        found = found[::-1]
    if abs(found[0] * height / (found[1] * width) - 1) > 0.01:
        size = f"{width}:{height}"
        scale = f"scale={size}:force_original_aspect_ratio=increase,crop={size}"
        crop = f"ffmpeg -i {shlex.quote(str(path))} -vf {scale} start.png"
        shape = f"{found[0]}x{found[1]}, which is not the shape of {width}x{height}"
        raise InputError(f"image {path} is {shape}", f"crop it to {width}x{height}: {crop}")
    return _covering(frame, width, height, Fraction(1))


def _decoded(path: str | Path, data: bytes) -> av.VideoFrame:
    """Decode `data`, the picture of `path`. Raises InputError if it is not a whole picture."""
    names = [name for start, name in _DECODERS if data.startswith(start)]
    if not names or (names[0] == "webp" and data[8:12] != b"WEBP"):
        hint = "convert it: ffmpeg -i PICTURE start.png"
        raise InputError(f"image {path}: not a PNG, JPEG or WebP picture", hint)
    context = av.CodecContext.create(names[0], "r")
    assert isinstance(context, VideoCodecContext)
    context.options = {"err_detect": _STRICT, "max_pixels": str(_LARGEST_IMAGE_PIXELS)}
    frames: list[av.VideoFrame] = []
    with contextlib.suppress(FFmpegError):
        frames = [frame for packet in (av.Packet(data), None) for frame in context.decode(packet)]
    if not frames:
        what = f"damaged, cut off or larger than {_LARGEST_IMAGE_PIXELS:,} pixels"
        raise InputError(f"image {path}: {what}", "open it in a viewer and save it again")
    return frames[0]


def read_video(path: str | Path, width: int, height: int, fps: int) -> Iterator[np.ndarray]:
    """Yield the frames of a video at `fps`: uint8 [height, width, 3].

    Each is the frame nearest in time, cut at the centre to the wanted shape and resized. The file
    is opened at the first frame. Raises InputError if it is not a video or is damaged.
    """
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise InputError(f"video {path}: has no picture", "name a video file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            stream.codec_context.options = {"err_detect": "explode"}
            rate, aspect = stream.average_rate or Fraction(fps), stream.sample_aspect_ratio
            shown = 0  # frames yielded
            times = _display_times(path, container.decode(stream), rate, Fraction(fps))
            for frame, until in times:
                picture = None  # converted only if it is shown, and once
                while Fraction(shown, fps) < until:
                    if picture is None:
                        picture = _covering(frame, width, height, aspect or Fraction(1))
                    yield picture
                    shown += 1
    except (FFmpegError, OSError) as error:
        hint = "name a video file that plays to its end"
        raise InputError(f"video {path}: {error.strerror or error}", hint) from None


def _display_times(
    path: str | Path, frames: Iterator[av.VideoFrame], rate: Fraction, fps: Fraction
) -> Iterator[tuple[av.VideoFrame, Fraction]]:
    """Yield each frame and the time until which it is the nearest, in seconds after the first.

    The last one ends half a frame of `fps` early. So the number of frames becomes the integer
    nearest to duration x fps.
    """
    previous, start, last = None, Fraction(0), Fraction(0)
    for number, frame in enumerate(frames):
        if frame.is_corrupt:
            hint = "leave the file out, or repair it by encoding it again"
            raise InputError(f"video {path}: frame {number} is damaged", hint)
        at = Fraction(number) / rate
        if frame.pts is not None and frame.time_base is not None:
            at = frame.pts * frame.time_base
        if previous is None:
            start = at
        else:
            yield previous, (last + at) / 2 - start
        previous, last = frame, at
    if previous is None:
        raise InputError(f"video {path}: holds no frame", "name a video file that plays")
    yield previous, last - start + 1 / rate - 1 / (2 * fps)


def write_image(path: str | Path, frame: np.ndarray) -> None:
    """Write `frame`, uint8 [H, W, 3], as a PNG. Raises OutputError if that fails."""
    assert (frame.dtype.name, frame.shape[2:]) == ("uint8", (3,)), f"{frame.dtype=} {frame.shape=}"
    context = av.CodecContext.create("png", "w")
    (context.height, context.width), context.pix_fmt = frame.shape[:2], "rgb24"
    context.time_base = Fraction(1)
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    packets = [packet for frames in (picture, None) for packet in context.encode(frames)]
    try:
        Path(path).write_bytes(b"".join(map(bytes, packets)))
    except OSError as error:
        raise unwritable(str(path), error) from None
