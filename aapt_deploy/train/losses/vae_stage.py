"""Train the VAE: linear paths in closed form, then convolutions on what those leave over.

The encoder of a profile without encoder convolutions is final after PCA. So latents can be cached
and the generator can train while the decoder still does. The decoder sees slightly noisy latents,
because the generator's are not perfect either.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aapt_deploy.errors import InputError
from aapt_deploy.models.aapt.vae import Vae, from_pixels
from aapt_deploy.profiles import PIXEL_CHANNELS, Profile
from aapt_deploy.train.losses.vae_fit import pca_encoder, ridge_decoder
from aapt_deploy.train.recipe import VaeStage
from aapt_deploy.train.world.data import ClipFile

FIT_CLIPS = 120  # clips for PCA; ridge takes half of them
BROKEN_DRAWS = 100  # broken clips that one update passes over before it gives up


@dataclass(frozen=True)
class Snippets:
    """Random short pieces of clips, read from disk when they are needed.

    Frames are whole: at a crop's edges a convolution would learn what never is.
    """

    clips: list[ClipFile]
    profile: Profile

    def draw(self, stage: VaeStage, rng: torch.Generator) -> Tensor:
        """Draw frames [B, 4 (1 + blocks), 3, H, W] in [-1, 1].

        The first group of four only fills the decoder's memory. Raises InputError if clips are
        broken.
        """
        pieces: list[Tensor] = []
        for _ in range(stage.optimiser.batch + BROKEN_DRAWS):
            clip = int(torch.randint(len(self.clips), (), generator=rng))
            start = int(torch.randint(1 << 30, (), generator=rng))
            piece = self._piece(self.clips[clip], 1 + stage.blocks, start)
            if piece is not None:
                pieces.append(piece)
            if len(pieces) == stage.optimiser.batch:
                return from_pixels(torch.stack(pieces))
        raise InputError(
            f"of {BROKEN_DRAWS} clips drawn for one update none can be read",
            "make the data again: aapt train data FOLDER",
        )

    def _piece(self, clip: ClipFile, groups: int, start: int) -> Tensor | None:
        """Read `groups` groups of four frames from a random `start`.

        Return None if the clip is damaged, too short or of another size.
        """
        v = self.profile.video
        try:
            with safe_open(clip.path, framework="pt") as file:
                held = file.get_slice("frames")
                count, *size = held.get_shape()
                starts = (count - 1) // v.temporal_stride - groups + 1
                if starts < 1 or size != [v.height, v.width, PIXEL_CHANNELS]:
                    raise ValueError(
                        f"frames {[count, *size]} hold no {groups} groups of {v.width}x{v.height}"
                    )
                first = 1 + v.temporal_stride * (start % starts)
                piece: Tensor = held[first : first + v.temporal_stride * groups]
                return piece
        except (OSError, SafetensorError, ValueError) as error:
            clip.skip(clip.path, f"unreadable: {error}")
            return None


def fit_linear(vae: Vae, clips: list[ClipFile], profile: Profile, seed: int) -> float:
    """Set both linear paths in closed form. Return the share of pixel variance that is kept.

    Raises InputError if no clip can be read.
    """
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(clips), generator=rng)[:FIT_CLIPS].tolist()
    loaded = []
    for index in order:
        arrays = clips[index].read(profile)
        if arrays is not None:
            frames = from_pixels(torch.from_numpy(arrays["frames"]))
            before = frames[:1].expand(profile.video.temporal_stride - 1, -1, -1, -1)
            loaded.append(torch.cat([before, frames]))
    if not loaded:
        hint = "make the data again: aapt train data FOLDER"
        raise InputError(f"none of {len(order)} clips can be read", hint)
    kept = pca_encoder(vae, loaded)
    ridge_decoder(vae, loaded[: max(1, len(loaded) // 2)])
    return kept


def vae_loss(
    vae: Vae, stage: VaeStage, draw: Callable[[torch.Generator], Tensor], rng: torch.Generator
) -> Tensor:
    """Return L1 on pixels and their gradients after the first group, a scalar."""
    frames = draw(rng)
    z = vae.encoder(frames)
    strength = stage.latent_noise * torch.rand(len(z), 1, 1, 1, 1, generator=rng)
    z = z + strength * torch.randn(z.shape, generator=rng)
    decoded, _ = vae.decoder(z, vae.decoder.empty_memory(z))
    skip = vae.decoder.time
    error = (decoded - frames)[:, skip:].float()
    loss: Tensor = error.abs().mean()
    for axis in (-1, -2):
        loss = loss + stage.gradient_weight * error.diff(dim=axis).abs().mean()
    return loss
