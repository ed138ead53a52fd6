"""Encode and decode video causally: 4 frames and 8x8 pixels per latent pixel.

The first frame alone is latent 0. Time is causal, so a video can be decoded while it is generated.
Every convolution over time takes and returns its memory, the last `temporal_kernel - 1` frames. A
parallel call passes many frames and starts from empty memory. A streaming call passes one latent
frame and the memory of the call before. Both run the same code, so their outputs are the same.

The first frame is repeated to fill its group of four, and decoding drops the first three frames.
That keeps every shape static.

Both halves are a linear patch path plus a convolutional branch whose last layer starts at zero. The
linear paths have closed-form starts: PCA for the encoder, ridge regression for the decoder
(`train/losses/vae_fit.py`). So training starts from a picture instead of noise.

Letters: B batch, T frames at the layer's own rate, C channels, H x W pixels, h x w latent pixels,
n latent frames.
"""

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt_deploy.profiles import PIXEL_CHANNELS, Profile
from aapt_deploy.sections import TIME_DOUBLINGS

LINEAR_REACH = 2  # latent frames that the decoder's linear path looks at


def space_time_to_channels(x: Tensor, time: int, space: int) -> Tensor:
    """Fold [B, T*time, C, H*space, W*space] to [B, T, time*C*space*space, H, W]."""
    b, t, c, h, w = x.shape
    t, h, w = t // time, h // space, w // space
    x = x.reshape(b, t, time * c, h, space, w, space).permute(0, 1, 2, 4, 6, 3, 5)
    return x.reshape(b, t, time * c * space * space, h, w)


def channels_to_space_time(x: Tensor, time: int, space: int) -> Tensor:
    """Invert `space_time_to_channels`: the result is [B, T*time, C, H*space, W*space]."""
    b, t, c, h, w = x.shape
    c //= time * space * space
    x = x.reshape(b, t, time * c, space, space, h, w)
    return x.permute(0, 1, 2, 5, 3, 6, 4).reshape(b, t * time, c, h * space, w * space)


class CausalConv(nn.Module):
    """Causal 3-D convolution as a 2-D one over the channels of `frames` neighbouring frames.

    CPUs run and quantise a 2-D convolution faster.
    """

    def __init__(self, inputs: int, outputs: int, frames: int = 1, size: int = 3) -> None:
        super().__init__()
        self.frames, self.inputs = frames, inputs
        self.conv = nn.Conv2d(inputs * frames, outputs, size, padding=size // 2)

    def forward(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Convolve x [B, T, C, H, W]; return [B, T, outputs, H, W] and the new memory.

        memory [B, frames - 1, C, H, W]; None for a kernel of one frame.
        """
        b, t = x.shape[:2]
        if self.frames > 1:
            assert memory is not None and memory.shape[1] == self.frames - 1, f"{x.shape=}"
            seen = torch.cat([memory, x], dim=1)  # [B, frames - 1 + T, C, H, W]
            memory = seen[:, -(self.frames - 1) :]
            # [B, T, frames*C, H, W]
            x = torch.cat([seen[:, i : i + t] for i in range(self.frames)], dim=2)
        y = self.conv(x.flatten(0, 1))  # [B*T, outputs, H, W]
        return y.unflatten(0, (b, t)), memory


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, frames: int, out_frames: int = 1) -> None:
        super().__init__()
        self.mix = CausalConv(channels, channels, frames)
        self.out = CausalConv(channels, channels, out_frames)

    def forward(
        self, x: Tensor, memory: Tensor | None, out_memory: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Update x [B, T, C, H, W] and the memories of both convolutions."""
        y, memory = self.mix(F.relu(x), memory)
        y, out_memory = self.out(F.relu(y), out_memory)
        return x + y, memory, out_memory


class Rescale(nn.Module):
    """Change the resolution by a coarse convolution and a shuffle of channels and space-time."""

    def __init__(
        self, inputs: int, outputs: int, time: int, space: int, up: bool, frames: int = 1
    ) -> None:
        super().__init__()
        self.time, self.space, self.up = time, space, up
        fold = time * space * space
        shape = (inputs, outputs * fold, frames) if up else (inputs * fold, outputs, 1)
        self.conv = CausalConv(*shape)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Rescale x [B, T, C, H, W] with the convolution's memory; return the new memory too."""
        if self.up:
            y, memory = self.conv(F.relu(x), memory)
            return channels_to_space_time(y, self.time, self.space), memory
        y, _ = self.conv(space_time_to_channels(x, self.time, self.space), None)
        return y, None


def _residual_blocks(
    channels: tuple[int, ...], profile: Profile, out_frames: int = 1
) -> Sequence[Sequence[ResidualBlock]]:
    """Build the blocks of each scale, as a ModuleList of ModuleLists."""

    def scale(width: int) -> nn.ModuleList:
        shape = (width, profile.vae.temporal_kernel, out_frames)
        return nn.ModuleList(ResidualBlock(*shape) for _ in range(profile.vae.blocks))

    return cast("Sequence[Sequence[ResidualBlock]]", nn.ModuleList(map(scale, channels)))


def _rescales(
    widths: tuple[int, ...], strides: list[tuple[int, int]], up: bool, frames: int = 1
) -> Sequence[Rescale]:
    """Build the steps between neighbouring `widths`, as a ModuleList.

    The last step up makes pixels and reads no past frames.
    """
    last = len(strides) - 1
    steps = nn.ModuleList(
        Rescale(widths[i], widths[i + 1], *stride, up, 1 if i == last else frames)
        for i, stride in enumerate(strides)
    )
    return cast("Sequence[Rescale]", steps)


def _start_at_zero(layer: CausalConv) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _scales(channels: tuple[int, ...], spatial_stride: int) -> list[tuple[int, int]]:
    """Return (time, space) strides between the scales, from the latent to the pixels.

    Time doubles twice, nearest the latent.
    """
    doublings = int(math.log2(spatial_stride))
    scales = range(len(channels))
    return [(2 if i < TIME_DOUBLINGS else 1, 2 if i < doublings else 1) for i in scales]


class Decoder(nn.Module):
    """Turns latent frames into pixel frames in [-1, 1], four per latent frame."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        v, vae = profile.video, profile.vae
        self.time, self.space = v.temporal_stride, v.spatial_stride
        patch = PIXEL_CHANNELS * self.time * self.space**2
        self.linear = CausalConv(v.latent_channels, patch, LINEAR_REACH)
        widths = (*vae.decoder_channels, PIXEL_CHANNELS)
        self.inlet = CausalConv(v.latent_channels, widths[0], vae.temporal_kernel)
        everywhere = vae.temporal_kernel if vae.look_back == "all" else 1
        self.blocks = _residual_blocks(vae.decoder_channels, profile, everywhere)
        strides = _scales(vae.decoder_channels, v.spatial_stride)
        self.rescale = _rescales(widths, strides, up=True, frames=everywhere)
        _start_at_zero(self.rescale[-1].conv)

    def memory_shapes(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """Return the memories' shapes (frames, C, H, W) in `forward`'s order, by latent size."""
        return [
            (conv.frames - 1, conv.inputs, height * stride, width * stride)
            for conv, stride in self.convolutions()
            if conv.frames > 1
        ]

    def convolutions(self) -> Iterator[tuple[CausalConv, int]]:
        """Yield all convolutions in running order, each with its resolution over the latent's."""
        yield self.linear, 1
        yield self.inlet, 1
        stride = 1
        for scale, rescale in zip(self.blocks, self.rescale, strict=True):
            for block in scale:
                yield block.mix, stride
                yield block.out, stride
            yield rescale.conv, stride
            stride *= rescale.space

    def empty_memory(self, z: Tensor) -> list[Tensor]:
        return [z.new_zeros(z.shape[0], *shape) for shape in self.memory_shapes(*z.shape[-2:])]

    def forward(self, z: Tensor, memory: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode z [B, n, C, h, w] to frames [B, 4n, 3, H, W]; return the new memory too."""
        left = iter(memory)
        kept: list[Tensor | None] = []

        def take(conv: CausalConv) -> Tensor | None:
            return next(left) if conv.frames > 1 else None

        flat, m = self.linear(z, take(self.linear))
        kept.append(m)
        x, m = self.inlet(z, take(self.inlet))
        kept.append(m)
        for scale, rescale in zip(self.blocks, self.rescale, strict=True):
            for block in scale:
                x, *both = block(x, take(block.mix), take(block.out))
                kept += both
            x, m = rescale(x, take(rescale.conv))
            kept.append(m)
        frames = x + channels_to_space_time(flat, self.time, self.space)  # [B, 4n, 3, H, W]
        return frames, [m for m in kept if m is not None]


class Encoder(nn.Module):
    """Turns pixel frames in [-1, 1] into latent frames of about unit variance, one per four."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        v, vae = profile.video, profile.vae
        self.time, self.space = v.temporal_stride, v.spatial_stride
        patch = PIXEL_CHANNELS * self.time * self.space**2
        self.linear = CausalConv(patch, v.latent_channels, size=1)
        widths = (PIXEL_CHANNELS, *vae.encoder_channels)
        strides = _scales(vae.encoder_channels, v.spatial_stride)[::-1]
        self.rescale = _rescales(widths, strides, up=False)
        self.blocks = _residual_blocks(vae.encoder_channels, profile)
        if vae.encoder_channels:
            self.outlet = CausalConv(widths[-1], v.latent_channels)
            _start_at_zero(self.outlet)

    def forward(self, frames: Tensor) -> Tensor:
        """Encode frames [B, 4n, 3, H, W] to z [B, n, C, h, w]."""
        z: Tensor = self.linear(space_time_to_channels(frames, self.time, self.space), None)[0]
        if not self.rescale:
            return z
        x = frames
        for rescale, scale in zip(self.rescale, self.blocks, strict=True):
            x, _ = rescale(x)
            for block in scale:
                past = block.mix.frames - 1
                x, *_ = block(x, x.new_zeros(x.shape[0], past, *x.shape[2:]) if past else None)
        correction: Tensor = self.outlet(F.relu(x), None)[0]
        return z + correction


class Vae(nn.Module):
    """Encoder and decoder of whole clips, and `decode_step` for one latent frame of a stream."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(profile), Decoder(profile)

    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames [B, 1 + 4n, 3, H, W] in [-1, 1] to z [B, 1 + n, C, h, w]."""
        lead = frames[:, :1].expand(-1, self.encoder.time - 1, -1, -1, -1)
        z: Tensor = self.encoder(torch.cat([lead, frames], dim=1))
        return z

    def decode(self, z: Tensor) -> Tensor:
        """Decode z [B, 1 + n, C, h, w] to frames [B, 1 + 4n, 3, H, W]."""
        frames: Tensor = self.decoder(z, self.decoder.empty_memory(z))[0]
        return frames[:, self.decoder.time - 1 :]

    def decode_step(self, z: Tensor, memory: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode one latent frame z [B, C, h, w] to frames [B, 4, 3, H, W] and new memory.

        Of latent 0 only the last frame is to be shown.
        """
        step: tuple[Tensor, list[Tensor]] = self.decoder(z[:, None], memory)
        return step


def to_pixels(frames: Tensor) -> Tensor:
    """Convert [..., 3, H, W] in [-1, 1] to uint8 [..., H, W, 3].

    The conversion comes last: TensorRT takes uint8 as an input or output of a graph only.
    """
    return ((frames.clamp(-1, 1) + 1) * 127.5 + 0.5).movedim(-3, -1).to(torch.uint8)


def from_pixels(frames: Tensor) -> Tensor:
    """Convert uint8 [..., H, W, 3] to float32 [..., 3, H, W] in [-1, 1]."""
    return frames.to(torch.float32).movedim(-1, -3) / 127.5 - 1
