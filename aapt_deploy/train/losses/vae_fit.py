"""Fit the VAE's linear paths in closed form: PCA for the encoder, ridge for the decoder.

Both take seconds. The encoder's components are whitened three quarters of the way. The strong ones
(colour, brightness of a patch) still settle first and cost most in the generator's loss. The fine
ones are not lost in its noise (docs/log.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt_deploy.models.aapt.vae import Vae, space_time_to_channels

WHITENING = 0.75  # exponent of the deviation that is divided out
# Least power of a component relative to the strongest: flat clips have fewer components than a
# latent
# has channels.
FAINTEST = 1e-9
RIDGE = 1e-3  # relative to the mean feature power
LATENT_NOISE = 0.05  # deviation of the noise that the ridge decoder must expect


@torch.no_grad()
def pca_encoder(vae: Vae, clips: list[Tensor]) -> float:
    """Set the encoder's linear path from clips [T, 3, H, W] (T = 4n).

    Return the share of variance that is kept.
    """
    encoder = vae.encoder
    patches = torch.cat([_patches(clip, encoder.time, encoder.space) for clip in clips])
    mean = patches.mean(dim=0)
    covariance = torch.zeros(patches.shape[1], patches.shape[1], dtype=torch.float64)
    for chunk in (patches - mean).split(65536):
        covariance += (chunk.T @ chunk).double()
    power, axes = torch.linalg.eigh(covariance / len(patches))
    channels = encoder.linear.conv.out_channels
    power, axes = power.flip(0), axes.flip(1)
    kept = power[:channels].clamp_min(FAINTEST * float(power[0]) + FAINTEST**2)
    scale = kept.sqrt() ** -WHITENING
    scale /= (kept * scale**2).mean().sqrt()  # unit variance on average
    weight = (axes[:, :channels] * scale).T.float()  # [C, patch]
    _set(encoder.linear.conv, weight[:, :, None, None], -weight @ mean)
    return 1 - float(power[channels:].clamp_min(0).sum() / power.sum().clamp_min(FAINTEST**2))


@torch.no_grad()
def ridge_decoder(vae: Vae, clips: list[Tensor]) -> None:
    """Set the decoder's linear path to the best linear map from 3x3 x 2 latents to a patch.

    Clips as in `pca_encoder`.
    """
    decoder, conv = vae.decoder, vae.decoder.linear.conv
    generator = torch.Generator().manual_seed(0)
    gram: Tensor | None = None
    cross: Tensor | None = None
    for clip in clips:
        z = vae.encoder(clip[None])[0]  # [n, C, h, w]
        z = z + LATENT_NOISE * torch.randn(z.shape, generator=generator)
        before = torch.cat([torch.zeros_like(z[:1]), z[:-1]])
        seen = torch.cat([before, z], dim=1)  # [n, 2C, h, w]: as CausalConv stacks them
        features = F.unfold(seen, 3, padding=1).transpose(1, 2).flatten(0, 1)  # [n*h*w, 2C*9]
        features = F.pad(features, (0, 1), value=1.0).double()
        target = _patches(clip, decoder.time, decoder.space).double()
        gram = features.T @ features + (0 if gram is None else gram)
        cross = features.T @ target + (0 if cross is None else cross)
    assert gram is not None and cross is not None, "ridge_decoder needs at least one clip"
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram, cross).float()  # [2C*9 + 1, patch]
    _set(conv, solution[:-1].T.unflatten(1, conv.weight.shape[1:]), solution[-1])


def _patches(clip: Tensor, time: int, space: int) -> Tensor:
    """Cut a clip [T, 3, H, W] into patches [n*h*w, patch]."""
    return space_time_to_channels(clip[None], time, space)[0].movedim(1, -1).flatten(0, -2)


def _set(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    assert conv.bias is not None
    conv.weight.copy_(weight)
    conv.bias.copy_(bias)
