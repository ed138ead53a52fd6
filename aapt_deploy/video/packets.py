"""Frames to encoded packets: everything that codecs and containers need, whatever takes the bytes.

Two rules apply to all formats. The same frames give the same bytes: no dates, no random ids, a
fixed number of encoder threads. The output is tagged with its colours: BT.709, limited range. (y4m
has no such tag and gets what its readers assume, see `_matrix`.)
"""

from typing import Protocol

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from av.video.stream import VideoStream

from aapt_deploy.errors import MachineError
from aapt_deploy.video.formats import Format

# libx264, by use. One-thread `zerolatency` returns every frame at once; a file may look ahead and
# use B frames. Thread counts are fixed because the bytes depend on them. `mbtree` is off: x264's
# SIMD version of it gave seven different files in eight runs at 192x112.
_H264_LIVE = {"preset": "veryfast", "tune": "zerolatency", "crf": "18", "threads": "1"}
_H264_FILE = {"preset": "veryfast", "crf": "17", "threads": "4", "x264-params": "mbtree=0"}

# Equal on every CPU, chroma from all its pixels. Without FULL_CHR_H_INT pictures that are read come
# out 1.6 grey levels too dark.
_CHROMA = Interpolation.FULL_CHR_H_INP | Interpolation.FULL_CHR_H_INT
EXACT = Interpolation.ACCURATE_RND | Interpolation.BITEXACT | _CHROMA


class Target(Protocol):
    """Where the bytes go. FFmpeg calls it from C, so no method may raise."""

    def write(self, data: bytes) -> int: ...
    def seek(self, offset: int, whence: int) -> int: ...
    def tell(self) -> int: ...
    def seekable(self) -> bool: ...


class Encoder:
    """Encodes frames of `size` (width, height) and writes their packets to `target`.

    `live` asks for packets at once, for a pipe; else the encoder may look ahead.
    """

    def __init__(
        self, target: Target, chosen: Format, size: tuple[int, int], fps: int, live: bool
    ) -> None:
        self._format, self._size, self._frames = chosen, size, 0
        words = f"fflags=+bitexact {chosen.options} {chosen.live_options if live else ''}".split()
        options = dict(word.split("=") for word in words)
        self._container = av.open(target, "w", format=chosen.muxer, options=options)
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

    def write(self, pixels: np.ndarray) -> None:
        """Encode one frame, uint8 [H, W, 3], and write the packets that are ready."""
        for packet in self._stream.encode(self._picture(pixels)):
            self._container.mux(packet)
        self._frames += 1

    def finish(self) -> None:
        """Write the packets that are still inside the encoder."""
        for packet in self._stream.encode(None):
            self._container.mux(packet)

    def close(self) -> None:
        """Write the container's end and free everything."""
        self._container.close()

    def _picture(self, pixels: np.ndarray) -> av.VideoFrame:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        if self._format.pixels != "rgb24":
            frame = frame.reformat(
                format=self._format.pixels,
                interpolation=Interpolation.AREA | EXACT,
                threads=1,
                dst_colorspace=_matrix(self._format, self._size),
                dst_color_range=ColorRange.MPEG,
            )
        frame.pts = self._frames
        return frame


def refuse_missing(key: str, chosen: Format) -> None:
    """Raise MachineError if PyAV has no encoder for the format `chosen`, named `key`."""
    if chosen.codec not in av.codecs_available:
        what = f"{key} needs the encoder {chosen.codec}, which this PyAV lacks"
        raise MachineError(what, "pip install --force-reinstall --only-binary av av")


def _matrix(chosen: Format, size: tuple[int, int]) -> Colorspace:
    """Return BT.709, but BT.601 for y4m up to PAL size: it has no tag, and readers assume that."""
    untagged_sd = chosen.muxer == "yuv4mpegpipe" and size[0] <= 1024 and size[1] <= 576
    return Colorspace.ITU601 if untagged_sd else Colorspace.ITU709
