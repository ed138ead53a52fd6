"""Implement the torch half of the family: build the networks, cut them into graphs."""

from typing import Any

from torch import Tensor, nn

from aapt_deploy.models.wan.generator import Generator, spatial_rope
from aapt_deploy.models.wan.graphs import Vae
from aapt_deploy.models.wan.graphs import graph_modules as graph_modules
from aapt_deploy.models.wan.keys import parts as parts
from aapt_deploy.models.wan.taehv import Taehv
from aapt_deploy.models.wan.vae import WanVae
from aapt_deploy.profiles import Profile

VAES: dict[str, type[WanVae] | type[Taehv]] = {"wan": WanVae, "taehv": Taehv}


def build(profile: Profile) -> tuple[Generator, Vae]:
    """Build generator and VAE with fresh weights, in evaluation mode."""
    return Generator(profile).eval(), VAES[profile.vae.kind](profile).eval()


def computed(profile: Profile) -> dict[str, Tensor]:
    """Compute the spatial half of RoPE."""
    return {"spatial_rope": spatial_rope(profile)}


def zero_at_first(module: str) -> bool:
    """Return False: no layer needs to start at zero."""
    return False


def parameters(graph: str, module: Any) -> list[nn.Parameter]:
    """Return one graph's parameters of the network that it shares with another graph."""
    if graph in ("encoder", "decoder"):
        return list(getattr(module.vae, graph).parameters())
    text, named = module.generator.prompt_parameters(), module.generator.named_parameters()
    return [p for name, p in named if (name in text) == (graph == "prompt")]
