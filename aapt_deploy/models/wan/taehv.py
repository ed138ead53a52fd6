"""Decode and encode with TAEHV, a small VAE for Wan2.1's latents (madebyollin/taehv, MIT).

Each block looks at the frame before, which is its memory between calls. The decoder doubles the
frames twice, so a latent frame becomes four. Its latents are as the generator makes them.

Letters: T frames at the layer's own rate, C channels, h x w pixels at the layer's own size.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt_deploy.profiles import PIXEL_CHANNELS, Profile
from aapt_deploy.sections import TIME_DOUBLINGS

RANGE = 3.0  # latents are bent into -3..3 before the decoder


def conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


class Block(nn.Module):
    """Three convolutions over a frame and the one before, beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(2 * channels, channels), conv(channels, channels)
        self.conv3 = conv(channels, channels)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x [T, C, h, w]; memory [1, C, h, w], the frame before x."""
        before = torch.cat([memory, x[:-1]])
        y = F.relu(self.conv1(torch.cat([x, before], dim=1)))
        return F.relu(self.conv3(F.relu(self.conv2(y))) + x)


class Decoder(nn.Module):
    def __init__(self, profile: Profile) -> None:
        super().__init__()
        channels, blocks = profile.vae.decoder_channels, profile.vae.blocks
        self.conv_in = conv(profile.video.latent_channels, channels[0])
        pairs = list(itertools.pairwise(channels))
        self.blocks = nn.ModuleList(Block(c) for c, _ in pairs for _ in range(blocks))
        last = range(len(pairs) - TIME_DOUBLINGS, len(pairs))  # the scales that double the frames
        self.times = nn.ModuleList(
            nn.Conv2d(c, c * (2 if i in last else 1), 1, bias=False)
            for i, (c, _) in enumerate(pairs)
        )
        self.narrow = nn.ModuleList(conv(c, d, bias=False) for c, d in pairs)
        self.conv_out = conv(channels[-1], PIXEL_CHANNELS)

    def forward(self, latent: Tensor, memory: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode [1, C, h, w] to four frames [4, 3, H, W] in 0..1; also return the new memory.

        memory [1, C, h, w] each, by `signature.taehv_memory`.
        """
        x = F.relu(self.conv_in(torch.tanh(latent / RANGE) * RANGE))
        kept, blocks, old = list[Tensor](), iter(self.blocks), iter(memory)
        each = len(self.blocks) // len(self.times)
        for time, narrow in zip(self.times, self.narrow, strict=True):
            for _ in range(each):
                kept.append(x[-1:])
                x = next(blocks)(x, next(old))
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = narrow(time(x).reshape(-1, x.shape[1], *x.shape[2:]))  # [T or 2 T, C, h, w]
        return self.conv_out(F.relu(x)).clamp(0, 1), kept


class Encoder(nn.Module):
    def __init__(self, profile: Profile) -> None:
        super().__init__()
        channels, blocks = profile.vae.encoder_channels, profile.vae.blocks
        self.conv_in = conv(PIXEL_CHANNELS, channels[0])
        scales = channels[1:]
        self.times = nn.ModuleList(
            nn.Conv2d(c * (2 if i < TIME_DOUBLINGS else 1), c, 1, bias=False)
            for i, c in enumerate(scales)
        )
        self.halve = nn.ModuleList(conv(c, c, stride=2, bias=False) for c in scales)
        self.blocks = nn.ModuleList(Block(c) for c in scales for _ in range(blocks))
        self.conv_out = conv(channels[-1], profile.video.latent_channels)

    def forward(self, picture: Tensor) -> Tensor:
        """Encode [1, 3, H, W] in 0..1, shown for four frames, to [1, C, h, w]."""
        x = F.relu(self.conv_in(picture.expand(2**TIME_DOUBLINGS, -1, -1, -1)))
        blocks: Iterator[nn.Module] = iter(self.blocks)
        each = len(self.blocks) // len(self.times)
        for time, halve in zip(self.times, self.halve, strict=True):
            joined = cast("nn.Conv2d", time).in_channels // x.shape[1]
            x = halve(time(x.reshape(-1, joined * x.shape[1], *x.shape[2:])))
            for _ in range(each):
                x = next(blocks)(x, torch.zeros_like(x[:1]))
        result: Tensor = self.conv_out(x)
        return result


class Taehv(nn.Module):
    """Both halves; the encoder is missing if the profile has no encoder channels."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self.decoder = Decoder(profile)
        if profile.vae.encoder_channels:
            self.encoder = Encoder(profile)

    def encode(self, picture: Tensor) -> Tensor:
        """Encode [1, 3, H, W] in 0..1 to [1, C, h, w]."""
        latent: Tensor = self.encoder(picture)
        return latent

    def decode(self, latent: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode [1, C, h, w] to frames [4, 3, H, W] in 0..1. state: the memories."""
        frames, kept = self.decoder(latent, state)
        return frames, kept
