"""Small data that more than one test file learns from."""

import torch

from aapt_deploy.profiles import CONDITION_CHANNELS, load
from aapt_deploy.train.flow import Latents

TINY = load("tiny-cpu")


def toy_latents(clips: int = 3, blocks: int = 6) -> Latents:
    """Clips whose latents hold still: the next frame is the recycled one."""
    rng = torch.Generator().manual_seed(1)
    still = torch.randn(clips, 1, TINY.video.latent_channels, TINY.latent_height, TINY.latent_width, generator=rng)
    return Latents(
        still.repeat(1, 1 + blocks, 1, 1, 1).half(),
        torch.zeros(clips, blocks, CONDITION_CHANNELS, TINY.latent_height, TINY.latent_width),
        torch.zeros(clips, TINY.text.tokens, dtype=torch.long),
    )
