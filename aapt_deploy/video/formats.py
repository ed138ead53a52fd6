"""The output formats, one row each.

`--help` is made from them, so nothing heavy is imported here.
"""

from dataclasses import dataclass
from pathlib import Path

from aapt_deploy.errors import UsageError


@dataclass(frozen=True)
class Format:
    """One output format: FFmpeg's names, and where it can go."""

    muxer: str
    codec: str
    pixels: str  # pixel format inside the container
    names: tuple[str, ...] = ()  # file suffixes and --format values that mean it, besides its key
    to_pipe: bool = True  # False: the muxer must seek back to finish
    options: str = ""  # the muxer's, "key=value key=value"
    live_options: str = ""  # the muxer's, added for a pipe


# Plain mp4 is `hybrid_fragmented`: fragments while it is written, an ordinary mp4 once closed.
# After a kill -9 the .part file still plays up to its last full second (71 of 96 frames; an mp4
# without fragments: none). Fragmented mp4 for pipes ends a fragment at each frame, for latency.
_FMP4 = "movflags=frag_every_frame+empty_moov+default_base_moof"
_MKV_LIVE = "live=1 cluster_time_limit=0"
FORMATS: dict[str, Format] = {
    "mp4": Format("mp4", "libx264", "yuv420p", (), False, "movflags=hybrid_fragmented"),
    "mkv": Format("matroska", "libx264", "yuv420p", ("matroska",), live_options=_MKV_LIVE),
    "y4m": Format("yuv4mpegpipe", "rawvideo", "yuv420p"),
    "nut": Format("nut", "rawvideo", "rgb24"),
    "mpegts": Format("mpegts", "libx264", "yuv420p", ("ts",)),
    "fmp4": Format("mp4", "libx264", "yuv420p", options=_FMP4),
    "rawvideo": Format("rawvideo", "rawvideo", "rgb24", ("rgb",)),
}
PIPE_FORMATS = tuple(name for name, known in FORMATS.items() if known.to_pipe)
DEFAULT_PIPE_FORMAT = "y4m"  # every video tool reads it without options
SUFFIXES = tuple(f".{min((key, *row.names), key=len)}" for key, row in FORMATS.items())


def choose(output: str, name: str | None) -> str:
    """Return the key in FORMATS for `name`, or for the suffix of `output` if it is None.

    Raises UsageError if there is none.
    """
    if name is None and output == "-":
        return DEFAULT_PIPE_FORMAT
    known = {alias: key for key, chosen in FORMATS.items() for alias in (key, *chosen.names)}
    wanted = (name if name is not None else Path(output).suffix.removeprefix(".")).lower()
    if wanted in known:
        return known[wanted]
    every, suffix = ", ".join(sorted(known)), f".{wanted}" if wanted else ""
    hint = f"formats: {every}; give one with --format or as the file's suffix"
    if name is not None:
        raise UsageError(f"format {name!r} is not known", hint)
    raise UsageError(f"{output}: the suffix {suffix!r} names no video format", hint)
