"""One tiny checkpoint whose frames stay in the visible range, and its rollout."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from aapt_deploy.backends.trial import Built
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.export import export
from aapt_deploy.models import checkpoint, random_weights
from aapt_deploy.models.aapt.camera import CRUISE, Velocity
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.checkpoint import Checkpoint, StartFrame
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.engine import Engines
from aapt_deploy.rollout.loop import Steering, rollout
from aapt_deploy.rollout.starts import Start, start

FEW_BLOCKS = 5  # the window holds 3 and a sink: the ring wraps at 4
PROMPTS = {"dunes": "desert at noon, clear", "woods": "forest in autumn at night, foggy"}


def picture(width: int, height: int, hue: int) -> np.ndarray:
    """A smooth picture: uint8 [H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [
        0.5 + 0.4 * np.sin(6 * x + hue + channel) * np.cos(5 * y + channel) for channel in range(3)
    ]
    return (255 * np.stack(waves, -1)).astype(np.uint8)


def tame(generator: Generator) -> None:
    """Set the linear predictor to -0.8 x the previous latent (in units of the step's deviation)."""
    profile = generator.profile
    channels, patch = profile.video.latent_channels, profile.model.patch
    with torch.no_grad():
        generator.skip.weight.zero_()  # [C * patch * patch, noisy C + previous C + 6, patch, patch]
        for channel, i, j in itertools.product(range(channels), range(patch), range(patch)):
            generator.skip.weight[
                (channel * patch + i) * patch + j, channels + channel, i, j
            ] = -0.8


def make_checkpoint(path: Path, profile: Profile, seed: int = 0) -> Checkpoint:
    """A checkpoint of random weights with two start frames."""
    random_weights.random_checkpoint(profile, path, seed)
    drawn = checkpoint.load(path)
    tame(drawn.generator)
    video = profile.video
    frames = {
        name: StartFrame(torch.from_numpy(picture(video.width, video.height, i)), prompt)
        for i, (name, prompt) in enumerate(PROMPTS.items())
    }
    checkpoint.save(path, profile, drawn.generator, drawn.vae, {"stage": "random"}, frames)
    return checkpoint.load(path)


class Made(NamedTuple):
    """The shared bundle, and what making it reported."""

    path: Path
    parity: list[export.Parity]
    built: list[Built]
    said: list[str]


class Exported(NamedTuple):
    """The FP8 bundle of `three`. Do not change it."""

    path: Path
    rows: list[export.Parity]


def turning(block: int) -> Velocity:
    return Velocity(CRUISE.forward, yaw=0.25 if block % 3 else -0.25, pitch=0.05)


def frames_of(
    engines: Engines,
    opened: Bundle,
    blocks: int,
    seed: int = 0,
    text: Callable[[int], np.ndarray] | None = None,
) -> list[np.ndarray]:
    """The start image and `blocks` blocks of a rollout that turns."""
    begin: Start = start(opened, "dunes", None)
    steer = lambda block: Steering(turning(block), begin.text if text is None else text(block))
    return list(
        itertools.islice(rollout(engines, opened.profile, begin.image, steer, seed), 1 + blocks)
    )
