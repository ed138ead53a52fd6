"""Decode and encode with Wan2.1's causal VAE, one latent frame per call.

The decoder is one graph of static shapes: a latent frame and 32 memories in, four frames and the
new memories out. A memory is the last two frames that a causal convolution saw. The first latent
frame of a stream stands for a single pixel frame, the last of the four. `seen` is 0 for it and 1
for all others. At 0 every convolution's input frames but the last count as zeros, time is doubled
by repetition, and the doubling convolutions keep no memory of it. That leaves the memories as
Wan2.1's own streaming decoder leaves them (`cached_decode` of its wan/modules/vae.py).

The encoder takes a single picture. Before it there are only zeros, so each 3x3x3 kernel acts with
its last slice alone, and the encoder is two-dimensional.

Letters: C channels, T frames at the layer's own rate, h x w pixels at the layer's own size.
"""

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt_deploy.profiles import PIXEL_CHANNELS, Profile
from aapt_deploy.sections import TIME_DOUBLINGS

# The latent's channels are normalised by these (Wan2.1's constants of its VAE).
MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
DEVIATION = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
MEMORY_FRAMES = 2  # of a causal convolution over three frames


def unit_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Scale each position of x [B, C, ...] to length sqrt(C) over its channels, times weight."""
    length = math.sqrt(x.shape[1])
    return F.normalize(x, dim=1) * length * weight.reshape(-1, *[1] * (x.dim() - 2))


class Past:
    """The memories of one call, read and replaced in the order of the convolutions."""

    def __init__(self, memory: Sequence[Tensor], seen: Tensor) -> None:
        """Take memories [1, C, 2, h, w] and `seen` [1, 1]."""
        self.old: Iterator[Tensor] = iter(memory)
        self.new: list[Tensor] = []
        self.seen = seen.reshape(())

    def before(self, x: Tensor) -> Tensor:
        """Return x [1, C, T, h, w] with the remembered frames in front, and remember its end."""
        joined = torch.cat([next(self.old), x], dim=2)
        self.new.append(joined[:, :, -MEMORY_FRAMES:])
        return joined

    def hidden(self, x: Tensor) -> Tensor:
        """Zero all frames of x but the last if no latent frame has been seen."""
        if x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :-1] * self.seen, x[:, :, -1:]], dim=2)


def causal(inputs: int, outputs: int) -> nn.Conv3d:
    """Return a convolution over three frames; `Past` puts the first two in front."""
    return nn.Conv3d(inputs, outputs, 3, padding=(0, 1, 1))


class Residual(nn.Module):
    """Two causal convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.Parameter(torch.ones(inputs)), nn.Parameter(torch.ones(outputs))
        self.conv1, self.conv2 = causal(inputs, outputs), causal(outputs, outputs)
        self.shortcut = nn.Conv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, past: Past) -> Tensor:
        y = self.conv1(past.before(past.hidden(F.silu(unit_norm(x, self.norm1)))))
        y = self.conv2(past.before(past.hidden(F.silu(unit_norm(y, self.norm2)))))
        result: Tensor = self.shortcut(x) + y
        return result


class Attention(nn.Module):
    """Attention of one head among the pixels of a frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(channels))
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, C, h, w], frame by frame."""
        qkv = self.qkv(unit_norm(x, self.norm)).flatten(2).transpose(1, 2)  # [T, h w, 3 C]
        q, k, v = (z[:, None] for z in qkv.chunk(3, dim=-1))  # [T, 1, h w, C]
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        result: Tensor = x + self.out(attended.unflatten(2, x.shape[2:]))
        return result


class Scale(nn.Module):
    """The decoder's layers at one size: residuals, then twice the frames, then twice the pixels."""

    def __init__(self, inputs: int, outputs: int, blocks: int, doubles: bool, last: bool) -> None:
        super().__init__()
        pairs = [(inputs, outputs), *[(outputs, outputs)] * (blocks - 1)]
        self.blocks = nn.ModuleList(Residual(*pair) for pair in pairs)
        self.time = nn.Conv3d(outputs, 2 * outputs, (3, 1, 1)) if doubles else None
        self.space = None if last else nn.Conv2d(outputs, outputs // 2, 3, padding=1)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """x [1, C, T, h, w]."""
        for block in self.blocks:
            x = block(x, past)
        if self.time is not None:
            x = self._doubled(self.time, x, past)
        if self.space is not None:
            frames = x[0].transpose(0, 1)  # [T, C, h, w]
            frames = self.space(F.interpolate(frames, scale_factor=2.0, mode="nearest"))
            x = frames.transpose(0, 1)[None]
        return x

    def _doubled(self, time: nn.Conv3d, x: Tensor, past: Past) -> Tensor:
        """Return twice the frames; of the first latent frame, the same ones twice."""
        made = time(past.before(x)).unflatten(1, (2, -1))  # [1, 2, C, T, h, w]
        past.new[-1] = past.new[-1] * past.seen
        pair = torch.where(past.seen > 0.5, made, x[:, None].expand_as(made))
        return pair.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)


class Decoder(nn.Module):
    def __init__(self, profile: Profile) -> None:
        super().__init__()
        vae, channels = profile.vae, profile.vae.decoder_channels
        latent, widest = profile.video.latent_channels, channels[0]
        self.latent_in = nn.Conv3d(latent, latent, 1)
        self.conv_in = causal(latent, widest)
        self.before, self.after = Residual(widest, widest), Residual(widest, widest)
        self.attention = Attention(widest)
        inputs, scales = widest, []
        for i, outputs in enumerate(channels):
            last = i == len(channels) - 1
            scales.append(Scale(inputs, outputs, vae.blocks + 1, i < TIME_DOUBLINGS, last))
            inputs = outputs // 2
        self.scales = nn.ModuleList(scales)
        self.norm_out = nn.Parameter(torch.ones(channels[-1]))
        self.conv_out = causal(channels[-1], PIXEL_CHANNELS)

    def forward(
        self, latent: Tensor, memory: Sequence[Tensor], seen: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Decode [1, C, h, w] to four frames [4, 3, H, W] in -1..1; also return the new memory.

        memory [1, C, 2, h, w] each, by `signature.wan_memory`; seen [1, 1], 0 or 1.
        """
        past = Past(memory, seen)
        mean, deviation = latent.new_tensor(MEAN), latent.new_tensor(DEVIATION)
        x = latent * deviation[:, None, None] + mean[:, None, None]
        x = self.conv_in(past.before(self.latent_in(x[:, :, None])))
        x = self.before(x, past)
        x = self.attention(x[:, :, 0])[:, :, None]
        x = self.after(x, past)
        for scale in self.scales:
            x = scale(x, past)
        x = self.conv_out(past.before(past.hidden(F.silu(unit_norm(x, self.norm_out)))))
        return x[0].transpose(0, 1), past.new


class FlatResidual(nn.Module):
    """Two convolutions of one picture beside a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.Parameter(torch.ones(inputs)), nn.Parameter(torch.ones(outputs))
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(unit_norm(x, self.norm1)))
        y = self.conv2(F.silu(unit_norm(y, self.norm2)))
        result: Tensor = self.shortcut(x) + y
        return result


class Halve(nn.Conv2d):
    """Half the pixels on each side; zeros are added right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Encoder(nn.Module):
    def __init__(self, profile: Profile) -> None:
        super().__init__()
        vae, channels = profile.vae, profile.vae.encoder_channels
        latent, widest = profile.video.latent_channels, channels[-1]
        self.conv_in = nn.Conv2d(PIXEL_CHANNELS, channels[0], 3, padding=1)
        inputs, layers = channels[0], list[nn.Module]()
        for i, outputs in enumerate(channels):
            pairs = [(inputs, outputs), *[(outputs, outputs)] * (vae.blocks - 1)]
            layers += [FlatResidual(*pair) for pair in pairs]
            layers += [Halve(outputs)] * (i < len(channels) - 1)
            inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.before, self.after = FlatResidual(widest, widest), FlatResidual(widest, widest)
        self.attention = Attention(widest)
        self.norm_out = nn.Parameter(torch.ones(widest))
        self.conv_out = nn.Conv2d(widest, 2 * latent, 3, padding=1)
        self.latent_out = nn.Conv2d(2 * latent, 2 * latent, 1)

    def forward(self, picture: Tensor) -> Tensor:
        """Encode [1, 3, H, W] in -1..1 to the mean of its latent [1, C, h, w]."""
        x = self.layers(self.conv_in(picture))
        x = self.after(self.attention(self.before(x)))
        x = self.latent_out(self.conv_out(F.silu(unit_norm(x, self.norm_out))))
        mean, deviation = x.new_tensor(MEAN), x.new_tensor(DEVIATION)
        latent: Tensor = (x.chunk(2, dim=1)[0] - mean[:, None, None]) / deviation[:, None, None]
        return latent


class WanVae(nn.Module):
    """Both halves; the encoder is missing if the profile has no encoder channels."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self.decoder = Decoder(profile)
        if profile.vae.encoder_channels:
            self.encoder = Encoder(profile)

    def encode(self, picture: Tensor) -> Tensor:
        """Encode [1, 3, H, W] in 0..1 to [1, C, h, w]."""
        return cast("Tensor", self.encoder(2 * picture - 1))

    def decode(self, latent: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode [1, C, h, w] to frames [4, 3, H, W] in 0..1. state: memories, then `seen`."""
        *memory, seen = state
        frames, new = self.decoder(latent, memory, seen)
        return frames / 2 + 0.5, [*new, torch.ones_like(seen)]
