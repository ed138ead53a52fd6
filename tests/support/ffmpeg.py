"""ffmpeg for the tests: the binary that the package imageio-ffmpeg brings, so no system needs one.

The package has no ffprobe. `probed` reads what ffmpeg itself says about a file while decoding it.
"""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg

FFMPEG: str = imageio_ffmpeg.get_ffmpeg_exe()


class Probed(NamedTuple):
    """The first video stream of a file."""

    frames: int  # decoded, not read from an index
    width: int
    height: int
    fps: str  # "24"
    pixels: str  # "yuv420p"
    colour: tuple[str, ...]  # what the stream is tagged with: ("tv", "bt709", "progressive")


def ffmpeg(*arguments: str, data: bytes | None = None) -> bytes:
    """Run ffmpeg, give it `data` on stdin, and return its stdout. Fails the test if ffmpeg does."""
    command = [FFMPEG, "-v", "error", "-y", *arguments]
    done = subprocess.run(command, input=data, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def probed(path: Path, *options: str) -> Probed:
    """Decode every frame of `path`; `options` describe a file that does not describe itself."""
    command = [FFMPEG, "-hide_banner", "-nostdin", *options, "-i", str(path)]
    command += ["-map", "0:v:0", "-fps_mode", "passthrough", "-f", "null", "-"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    said = done.stderr.decode()
    assert done.returncode == 0, said
    form = r"Stream #0:0.*?: Video: .*?, (\w+)(?:\(([^)]*)\))?, (\d+)x(\d+).*?, ([\d.]+) "
    found = re.search(form + "(?:fps|tbr)", said)
    counted = re.findall(r"frame=\s*(\d+)", said)
    assert found and counted, said
    pixels, colour, width, height, fps = found.groups()
    tags = tuple(re.split(r"[,/] ?", colour)) if colour else ()
    return Probed(int(counted[-1]), int(width), int(height), fps, pixels, tags)
