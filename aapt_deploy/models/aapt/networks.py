"""AAPT's networks as models/family.py asks for them: built, drawn, cut into graphs."""

from typing import Any

from torch import Tensor, nn

from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.graphs import graph_modules as graph_modules
from aapt_deploy.models.aapt.layers import spatial_rope
from aapt_deploy.models.aapt.vae import Vae
from aapt_deploy.profiles import Profile


def build(profile: Profile) -> tuple[Generator, Vae]:
    """Generator and VAE of a profile with fresh weights, in evaluation mode."""
    return Generator(profile).eval(), Vae(profile).eval()


def computed(profile: Profile) -> dict[str, Tensor]:
    """The spatial half of RoPE."""
    return {"spatial_rope": spatial_rope(profile)}


def zero_at_first(module: str) -> bool:
    """The linear predictor feeds a latent back into itself: random, it would double it block by block."""
    return module == "skip"


def parameters(graph: str, module: Any) -> list[nn.Parameter]:
    """Generator and prompt share a network, encoder and decoder another."""
    if graph in ("encoder", "decoder"):
        return list(getattr(module.vae, graph).parameters())
    text = module.generator.prompt_parameters()
    return [p for name, p in module.generator.named_parameters() if (name in text) == (graph == "prompt")]
