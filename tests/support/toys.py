"""Small data that more than one test file learns from."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.prompts import VOCABULARY_SIZE
from aapt_deploy.models.aapt.rope import temporal_rope
from aapt_deploy.profiles import CONDITION_CHANNELS, load
from aapt_deploy.train.losses.flow import Batch, Latents, flow_loss
from aapt_deploy.train.recipe import FlowStage, Optimiser, Recipe, VaeStage
from aapt_deploy.train.world.data import render_world

TINY = load("tiny-cpu")


def toy_latents(clips: int = 3, blocks: int = 6) -> Latents:
    """Clips whose latents hold still: the next frame is the recycled one."""
    rng = torch.Generator().manual_seed(1)
    still = torch.randn(
        clips, 1, TINY.video.latent_channels, TINY.latent_height, TINY.latent_width, generator=rng
    )
    return Latents(
        still.repeat(1, 1 + blocks, 1, 1, 1).half(),
        torch.zeros(clips, blocks, CONDITION_CHANNELS, TINY.latent_height, TINY.latent_width),
        torch.zeros(clips, TINY.text.tokens, dtype=torch.long),
    )


STAGE = FlowStage(Optimiser(steps=6, batch=4, learning_rate=1e-2, warmup=2), blocks=3)


def batch_of(blocks: int = 4, batch: int = 2, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    shape = (batch, blocks, TINY.video.latent_channels, TINY.latent_height, TINY.latent_width)
    return Batch(
        torch.randn(shape, generator=rng),
        torch.randn(shape, generator=rng),
        torch.randn(*shape[:2], CONDITION_CHANNELS, *shape[3:], generator=rng),
        torch.randint(VOCABULARY_SIZE, (batch, TINY.text.tokens), generator=rng),
        torch.from_numpy(temporal_rope(TINY, np.tile(np.arange(blocks), (batch, 1)))),
    )


def drawn_generator(seed: int = 0) -> Generator:
    """Random weights that depend on everything: heads that start at zero would hide a mistake."""
    torch.manual_seed(seed)
    generator = Generator(TINY)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return generator


def trainee() -> tuple[Generator, Callable[[torch.Generator], Tensor]]:
    torch.manual_seed(0)
    generator, latents = Generator(TINY), toy_latents()
    return generator, lambda rng: flow_loss(
        generator, latents.draw(TINY, STAGE, rng), dataclasses.replace(STAGE, resampled=0.5), rng
    )


def quiet(step: int, loss: float) -> None:
    """Progress for nobody."""


RECIPE = Recipe(
    vae=VaeStage(Optimiser(steps=3, batch=2, learning_rate=1e-3, warmup=1), blocks=1),
    sample_seconds=1,
    flow=(
        FlowStage(Optimiser(4, 2, 1e-3, 1), blocks=2),
        FlowStage(Optimiser(3, 2, 1e-3, 1), blocks=3, resampled=1.0, forced=0.5),
    ),
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rendered clips, one cut off, one of another size."""
    folder = tmp_path_factory.mktemp("clips")
    render_world(folder, TINY, 0, 4)
    whole = (folder / "clip-00000000-0.safetensors").read_bytes()
    (folder / "clip-cut.safetensors").write_bytes(whole[:-50])
    short = {
        "frames": torch.zeros(9, 8, 8, 3, dtype=torch.uint8),
        "poses": torch.zeros(3, 5),
        "tokens": torch.zeros(4, dtype=torch.long),
    }
    save_file(short, folder / "clip-small.safetensors")
    return folder
