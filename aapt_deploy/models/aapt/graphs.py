"""Wrap the networks as the graphs of a bundle, with flat tensors as in `signature`.

Export traces these modules and the torch engine runs them, so both have the same signature.
"""

from torch import Tensor, nn

from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.vae import Vae, from_pixels, to_pixels
from aapt_deploy.models.prompt_graph import PromptGraph
from aapt_deploy.profiles import Profile


class EncoderGraph(nn.Module):
    def __init__(self, vae: Vae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor) -> Tensor:
        """Encode uint8 [H, W, 3] to latent 0 [1, C, h, w]."""
        return self.vae.encode(from_pixels(image)[None, None])[:, 0]


class GeneratorGraph(nn.Module):
    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(
        self, noisy: Tensor, previous: Tensor, condition: Tensor, time: Tensor, rope_time: Tensor,
        cache_len: Tensor, *caches: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Run `Generator.step`. caches: every layer's keys, then every layer's values."""
        depth = len(caches) // 2
        k, v = list(caches[:depth]), list(caches[depth:])
        inputs = (noisy, previous, condition, time, rope_time)
        clean, keys, values = self.generator.step(*inputs, k, v, cache_len)
        return (clean, *keys, *values)


class DecoderGraph(nn.Module):
    def __init__(self, vae: Vae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent: Tensor, *memory: Tensor) -> tuple[Tensor, ...]:
        """Decode one latent frame to uint8 frames [4, H, W, 3]; return the new memory as well."""
        frames, kept = self.vae.decode_step(latent, list(memory))
        return (to_pixels(frames[0]), *kept)


def graph_modules(profile: Profile, generator: Generator, vae: Vae) -> dict[str, nn.Module]:
    """Return the graphs that `signature.signatures` lists, as modules."""
    graphs: dict[str, nn.Module] = {"encoder": EncoderGraph(vae)}
    if profile.text.tokens:
        graphs["prompt"] = PromptGraph(generator)
    graphs |= {"generator": GeneratorGraph(generator), "decoder": DecoderGraph(vae)}
    return {name: module.eval() for name, module in graphs.items()}
