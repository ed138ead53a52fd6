"""Stream four flights from a bundle and write them as one animated WebP: the README's picture.

python bench/flight_webp.py BUNDLE OUT.webp [--images NAME NAME NAME NAME] [--seconds 7] [--scale 2]

Every flight is what `aapt stream` writes for that start frame and the demo's controls; only the
size is changed. Needs Pillow, which comes with `make test`.
"""

import argparse
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
from PIL import Image

CONTROLS = Path(__file__).parent.parent / "aapt_deploy" / "assets" / "demo-flight.jsonl"
IMAGES = ("mountains-dawn", "forest-noon", "islands-noon", "desert-dusk")
GAP = 4  # pixels between flights
MOST_BYTES = 3_000_000  # a README picture has to load at once


def video_of(bundle: Path) -> dict[str, int]:
    """Return the video section of the bundle's profile."""
    return tomllib.loads((bundle / "profile.toml").read_text(encoding="utf-8"))["video"]


def flight(bundle: Path, image: str, seconds: float, controls: Path) -> np.ndarray:
    """Return the frames of one flight: uint8 [frames, H, W, 3]."""
    command = [sys.executable, "-m", "aapt_deploy", "stream", str(bundle), "-o", "-"]
    command += ["--format", "rawvideo", "--image", image, "--seconds", str(seconds)]
    command += ["--controls", str(controls)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    video = video_of(bundle)
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, video["height"], video["width"], 3)


def enlarged(frames: np.ndarray, scale: float) -> np.ndarray:
    """Return the frames at `scale` times their size, by bicubic interpolation."""
    size = (round(frames.shape[2] * scale), round(frames.shape[1] * scale))
    pictures = [Image.fromarray(frame) for frame in frames]
    return np.stack([picture.resize(size, Image.Resampling.BICUBIC) for picture in pictures])


def beside(parts: list[np.ndarray], axis: int) -> np.ndarray:
    """Join flights along `axis` with a white gap between them."""
    shape = list(parts[0].shape)
    shape[axis] = GAP
    gap = np.full(shape, 255, np.uint8)
    return np.concatenate([piece for part in parts for piece in (gap, part)][1:], axis=axis)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", nargs="+", default=list(IMAGES), help="start frames, two a row")
    parser.add_argument("--seconds", type=float, default=7.0)
    parser.add_argument("--controls", type=Path, default=CONTROLS)
    parser.add_argument("--scale", type=float, default=2.0)
    parser.add_argument("--quality", type=int, default=80, help="WebP's, 0 to 100")
    options = parser.parse_args()
    flights = []
    for image in options.images:
        frames = flight(options.bundle, image, options.seconds, options.controls)
        flights.append(enlarged(frames, options.scale))
    rows = [beside(flights[i : i + 2], axis=2) for i in range(0, len(flights), 2)]
    pictures = [Image.fromarray(frame) for frame in beside(rows, axis=1)]
    fps = video_of(options.bundle)["fps"]
    ends = [round(1000 * (i + 1) / fps) for i in range(len(pictures))]  # ms
    durations = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    how = {"duration": durations, "loop": 0, "quality": options.quality, "method": 4}
    pictures[0].save(options.out, save_all=True, append_images=pictures[1:], **how)
    size, (width, height) = options.out.stat().st_size, pictures[0].size
    print(f"{options.out}: {len(pictures)} frames, {width}x{height}, {size / 1e6:.2f} MB")
    if size > MOST_BYTES:
        sys.exit(f"more than {MOST_BYTES / 1e6:.0f} MB: lower --quality or --scale")


if __name__ == "__main__":
    main()
