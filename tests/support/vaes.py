"""Shapes of VAE, each with weights that all matter."""

import pytest
import torch
from torch import Tensor

from aapt_deploy.models.aapt.vae import Vae
from aapt_deploy.profiles import Vae as VaeShape
from aapt_deploy.profiles import load

TINY = load("tiny-cpu")
SHAPES = {
    "tiny": TINY.vae,
    "memoryless": VaeShape((8, 8, 8), (8, 8, 8), 1, 1),
    "linear-encoder": VaeShape((), (8, 8, 8), 2, 2),
    "four-scales": VaeShape((8, 8, 8, 8), (8, 8, 8, 4), 1, 3),
    "paper": VaeShape((8, 8, 8, 8), (16, 8, 8, 4), 2, 3, look_back="all"),
}


shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def perturbed(shape: VaeShape, seed: int = 0) -> Vae:
    """A VAE in which every weight matters: fresh ones end in zeros."""
    torch.manual_seed(seed)
    vae = Vae(TINY.replace(vae=shape)).eval()
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(torch.randn(p.shape) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.1))
    return vae


def latents(blocks: int, batch: int = 2) -> Tensor:
    return torch.randn(
        batch,
        blocks,
        TINY.video.latent_channels,
        TINY.latent_height,
        TINY.latent_width,
        generator=torch.Generator().manual_seed(1),
    )
