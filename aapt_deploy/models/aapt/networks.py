"""Implement the torch half of the family: build the networks, cut them into graphs."""

from typing import Any

from torch import Tensor, nn

from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.graphs import graph_modules as graph_modules
from aapt_deploy.models.aapt.layers import spatial_rope
from aapt_deploy.models.aapt.vae import Vae
from aapt_deploy.models.sources import Part
from aapt_deploy.profiles import Profile


def build(profile: Profile) -> tuple[Generator, Vae]:
    """Build generator and VAE with fresh weights, in evaluation mode."""
    return Generator(profile).eval(), Vae(profile).eval()


def computed(profile: Profile) -> dict[str, Tensor]:
    """Compute the spatial half of RoPE."""
    return {"spatial_rope": spatial_rope(profile)}


def zero_at_first(module: str) -> bool:
    """Return True for the linear predictor, which would double the latent block by block."""
    return module == "skip"


def parts(profile: Profile) -> list[Part]:
    """Return nothing: no other format of these weights is published."""
    return []


def parameters(graph: str, module: Any) -> list[nn.Parameter]:
    """Return one graph's parameters of the network that it shares with another graph."""
    if graph in ("encoder", "decoder"):
        return list(getattr(module.vae, graph).parameters())
    text, named = module.generator.prompt_parameters(), module.generator.named_parameters()
    return [p for name, p in named if (name in text) == (graph == "prompt")]
