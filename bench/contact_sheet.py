"""Draw frames of a rollout as one picture: a row per start frame, a column per second.

python bench/contact_sheet.py BUNDLE OUT.png [--seconds 0 1 2 3 5] [--controls FILE] [--scale 2]
"""

import argparse
from pathlib import Path

import numpy as np

from aapt_deploy import assets
from aapt_deploy.backends.table import open_engines
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.models.aapt.camera import CRUISE, LIMITS
from aapt_deploy.rollout.loop import Steering, rollout
from aapt_deploy.rollout.starts import all_starts
from aapt_deploy.stream.controls import open_controls
from aapt_deploy.video.pictures import write_image

GAP = 4  # pixels between frames


def row(
    bundle: Bundle, index: int, seconds: list[float], controls_file: str, seed: int
) -> np.ndarray:
    """The frames of one start at `seconds`, side by side: uint8 [H, W', 3]."""
    start, video = all_starts(bundle)[index], bundle.profile.video
    controls = open_controls(controls_file, CRUISE, LIMITS, print)
    engines = open_engines(bundle, "onnxruntime", None, print)
    block_s = video.temporal_stride / video.fps
    frames: list[np.ndarray] = []
    last = round(max(seconds) * video.fps)
    for made in rollout(
        engines,
        bundle.profile,
        start.image,
        lambda block: Steering(controls.at(block, block * block_s).velocity, start.text),
        seed,
    ):
        frames.extend(made)
        if len(frames) > last:
            break
    engines.close()
    controls.close()
    gap = np.full((video.height, GAP, 3), 255, np.uint8)
    return np.concatenate(
        [part for at in seconds for part in (frames[round(at * video.fps)], gap)][:-1], axis=1
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, nargs="+", default=[0, 1, 2, 3, 5])
    parser.add_argument("--controls", default=str(assets.demo_controls()))
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    rows = [
        row(bundle, i, options.seconds, options.controls, options.seed)
        for i in range(len(all_starts(bundle)))
    ]
    gap = np.full((GAP, rows[0].shape[1], 3), 255, np.uint8)
    sheet = np.concatenate([part for r in rows for part in (r, gap)][:-1], axis=0)
    write_image(
        options.out,
        np.ascontiguousarray(sheet.repeat(options.scale, axis=0).repeat(options.scale, axis=1)),
    )


if __name__ == "__main__":
    main()
