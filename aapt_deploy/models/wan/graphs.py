"""Wrap the networks as the graphs of a bundle, with flat tensors as in `signature`.

Export traces these modules and the torch engine runs them, so both have the same signature.
"""

from torch import Tensor, nn

from aapt_deploy.models.prompt_graph import PromptGraph
from aapt_deploy.models.wan.generator import Generator
from aapt_deploy.models.wan.taehv import Taehv
from aapt_deploy.models.wan.vae import WanVae
from aapt_deploy.profiles import Profile

Vae = WanVae | Taehv


class EncoderGraph(nn.Module):
    def __init__(self, vae: Vae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor) -> Tensor:
        """Encode uint8 [H, W, 3] to latent 0 [1, C, h, w]."""
        return self.vae.encode((image.float() / 255).permute(2, 0, 1)[None])


class GeneratorGraph(nn.Module):
    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(
        self, noisy: Tensor, time: Tensor, time_features: Tensor, rope_time: Tensor,
        cache_len: Tensor, *state: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Run a pass. state: all keys and all values of the caches, then of the text."""
        depth = len(state) // 4
        k, v, text_k, text_v = (state[i * depth : (i + 1) * depth] for i in range(4))
        caches, text = list(zip(k, v, strict=True)), list(zip(text_k, text_v, strict=True))
        velocity, keys, values = self.generator.velocity(
            noisy, time_features, rope_time, cache_len, caches, text
        )
        return (noisy - time * velocity, *keys, *values)


class DecoderGraph(nn.Module):
    def __init__(self, vae: Vae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Decode one latent frame to uint8 frames [4, H, W, 3]; return the new state as well."""
        frames, kept = self.vae.decode(latent, list(state))
        pixels = (frames.clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
        return (pixels.byte(), *kept)


def graph_modules(profile: Profile, generator: Generator, vae: Vae) -> dict[str, nn.Module]:
    """Return the graphs that `signature.signatures` lists, as modules."""
    graphs: dict[str, nn.Module] = {"encoder": EncoderGraph(vae), "prompt": PromptGraph(generator)}
    graphs |= {"generator": GeneratorGraph(generator), "decoder": DecoderGraph(vae)}
    if not profile.vae.encoder_channels:
        del graphs["encoder"]
    return {name: module.eval() for name, module in graphs.items()}
