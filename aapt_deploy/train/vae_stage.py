"""The VAE stage: closed-form linear paths first, then the convolutions on what those leave over.

The encoder of a profile without encoder convolutions is finished after PCA and is not trained further, so latents can be cached and the
generator can train while the decoder still does. The decoder sees slightly noisy latents: the generator's are not perfect either.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from aapt_deploy.models.vae import Vae, from_pixels
from aapt_deploy.profiles import Profile
from aapt_deploy.train.data import ClipFile
from aapt_deploy.train.recipe import VaeStage
from aapt_deploy.train.vae_fit import pca_encoder, ridge_decoder

FIT_CLIPS = 120  # clips for PCA; ridge takes half of them


@dataclass(frozen=True)
class Snippets:
    """Random short pieces of clips, read from disk as they are needed. Whole frames: at a crop's edges a convolution would learn what never is."""

    clips: list[ClipFile]
    profile: Profile

    def draw(self, stage: VaeStage, rng: torch.Generator) -> Tensor:
        """Frames [B, 4 (1 + blocks), 3, H, W] in [-1, 1]; the first group of four is only there to fill the decoder's memory."""
        stride = self.profile.video.temporal_stride
        pieces = []
        for _ in range(stage.optimiser.batch):
            clip, start = (int(torch.randint(high, (), generator=rng)) for high in (len(self.clips), 1 << 30))
            with safe_open(self.clips[clip].path, framework="pt") as file:
                held = file.get_slice("frames")
                groups = (held.get_shape()[0] - 1) // stride - stage.blocks
                first = 1 + stride * (start % max(groups, 1))
                pieces.append(held[first : first + stride * (1 + stage.blocks)])
        return from_pixels(torch.stack(pieces))


def fit_linear(vae: Vae, clips: list[ClipFile], profile: Profile, seed: int) -> float:
    """Set both linear paths in closed form. Returns the share of pixel variance that the latent keeps."""
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed))[:FIT_CLIPS].tolist()
    loaded = []
    for index in order:
        arrays = clips[index].read(profile)
        if arrays is not None:
            frames = from_pixels(torch.from_numpy(arrays["frames"]))
            loaded.append(torch.cat([frames[:1].expand(profile.video.temporal_stride - 1, -1, -1, -1), frames]))
    kept = pca_encoder(vae, loaded)
    ridge_decoder(vae, loaded[: max(1, len(loaded) // 2)])
    return kept


def vae_loss(vae: Vae, stage: VaeStage, draw: Callable[[torch.Generator], Tensor], rng: torch.Generator) -> Tensor:
    """L1 on pixels and on their gradients, over the frames after the first group; a scalar."""
    frames = draw(rng)
    z = vae.encoder(frames)
    z = z + stage.latent_noise * torch.rand(len(z), 1, 1, 1, 1, generator=rng) * torch.randn(z.shape, generator=rng)
    decoded, _ = vae.decoder(z, vae.decoder.empty_memory(z))
    skip = vae.decoder.time
    error = (decoded - frames)[:, skip:].float()
    loss = error.abs().mean()
    for axis in (-1, -2):
        loss = loss + stage.gradient_weight * error.diff(dim=axis).abs().mean()
    return loss


def psnr_db(vae: Vae, frames: Tensor) -> float:
    """Reconstruction quality of frames [1 + 4n, 3, H, W]."""
    with torch.no_grad():
        decoded = vae.decode(vae.encode(frames[None]))[0].clamp(-1, 1)
    return float(-10 * torch.log10(F.mse_loss(decoded, frames) / 4))
