"""The streaming decoder in a GPU's form: one latent frame per call, in fixed memory.

It computes one latent frame of a stream as the Decoder of models/aapt/vae.py does, from that
module's weights. Only the form differs:

    channels last   every tensor is [T, C, H, W] with channels innermost, as tensor cores read it
    time            a convolution over `frames` frames runs as one 2-D convolution over their
                    stacked channels, or as a 3-D one; `choose` times both on the device
    up              output channels are sorted, so the shuffle from channels to space and time
                    moves whole runs of channels
    memory          each convolution keeps its last frames in a buffer of its own, overwritten in
                    the pass, so a captured graph needs no second set

Letters: T frames at the layer's own rate, C channels, H x W pixels, h x w latent pixels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from aapt_deploy.models.aapt.vae import (
    CausalConv,
    Decoder,
    Rescale,
    channels_to_space_time,
    to_pixels,
)

Timer = Callable[[Callable[[], object]], float]  # seconds of a call


class Conv:
    """One causal convolution with its memory."""

    def __init__(
        self, conv: CausalConv, height: int, width: int, dtype: torch.dtype,
        order: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Take `conv` for height x width pixels; `order` sorts the output channels."""
        weight, bias = conv.conv.weight.detach().to(dtype), conv.conv.bias
        assert bias is not None
        bias = bias.detach().to(dtype)
        if order is not None:
            weight, bias = weight[order], bias[order]
        self.frames, self.inputs, self.bias = conv.frames, conv.inputs, bias
        # [outputs, frames * C, size, size] and [outputs, C, frames, size, size].
        self.flat = weight.to(memory_format=torch.channels_last)
        volume = weight.unflatten(1, (conv.frames, conv.inputs)).transpose(1, 2)
        self.volume = volume.contiguous(memory_format=torch.channels_last_3d)
        self.padding, self.shape = weight.shape[-1] // 2, (height, width)
        shape = (conv.frames - 1, conv.inputs, height, width)
        memory = torch.zeros(shape, dtype=dtype, device=weight.device)
        self.memory = memory.to(memory_format=torch.channels_last)
        self.as_volume = False

    def __call__(self, x: Tensor) -> Tensor:
        """Convolve x [T, C, H, W] to [T, outputs, H, W]."""
        if self.frames == 1:
            return F.conv2d(x, self.flat, self.bias, padding=self.padding)
        seen = torch.cat([self.memory, x])  # [frames - 1 + T, C, H, W]
        self.memory.copy_(seen[1 - self.frames :])
        return self.over_volume(seen) if self.as_volume else self.over_stack(seen)

    def over_stack(self, seen: Tensor) -> Tensor:
        count = len(seen) - self.frames + 1
        shifted = [seen[i : i + count] for i in range(self.frames)]
        stacked = torch.cat(shifted, dim=1)  # [T, frames * C, H, W]
        return F.conv2d(stacked, self.flat, self.bias, padding=self.padding)

    def over_volume(self, seen: Tensor) -> Tensor:
        # [1, C, frames - 1 + T, H, W], channels innermost in memory -> [1, outputs, T, H, W].
        video, padding = seen.transpose(0, 1)[None], (0, self.padding, self.padding)
        made = F.conv3d(video, self.volume, self.bias, padding=padding)
        return made[0].transpose(0, 1).contiguous(memory_format=torch.channels_last)

    def choose(self, frames: int, timer: Timer) -> None:
        """Choose the faster form for `frames` new frames; the weights of both stay."""
        if self.frames > 1:
            shape = (self.frames - 1 + frames, self.inputs, *self.shape)
            seen = torch.randn(shape, dtype=self.flat.dtype, device=self.flat.device)
            seen = seen.to(memory_format=torch.channels_last)
            volume_s = timer(lambda: self.over_volume(seen))
            self.as_volume = volume_s < timer(lambda: self.over_stack(seen))


def sorted_outputs(rescale: Rescale) -> Tensor:
    """Return the order that sorts output channels (time, C, i, j) to (time, i, j, C)."""
    outputs, fold = rescale.conv.conv.out_channels, rescale.time * rescale.space**2
    order = torch.arange(outputs).view(rescale.time, outputs // fold, rescale.space, rescale.space)
    return order.permute(0, 2, 3, 1).reshape(-1)


def unfold(y: Tensor, time: int, space: int) -> Tensor:
    """Move channels, sorted as above, to time and space.

    [T, time * space * space * C, H, W] -> [T * time, C, H * space, W * space]
    """
    t, folded, height, width = y.shape
    c = folded // (time * space * space)
    y = y.permute(0, 2, 3, 1).reshape(t, height, width, time, space, space, c)
    y = y.permute(0, 3, 1, 4, 2, 5, 6).reshape(t * time, height * space, width * space, c)
    return y.permute(0, 3, 1, 2)


class StreamDecoder:
    """Latent [1, C, h, w] to uint8 frames [4, H, W, 3], with memory from call to call."""

    def __init__(self, decoder: Decoder, height: int, width: int, dtype: torch.dtype) -> None:
        """Take `decoder`, on its device, for latents of height x width."""
        self.decoder, self.dtype = decoder, dtype
        self.linear = Conv(decoder.linear, height, width, dtype)
        self.inlet = Conv(decoder.inlet, height, width, dtype)
        self.scales: list[list[tuple[Conv, Conv]]] = []
        self.ups: list[Conv] = []
        # With the new frames of a call.
        self.rates: list[tuple[Conv, int]] = [(self.linear, 1), (self.inlet, 1)]
        frames, device = 1, decoder.linear.conv.weight.device
        for blocks, rescale in zip(decoder.blocks, decoder.rescale, strict=True):
            pairs = [
                (Conv(block.mix, height, width, dtype), Conv(block.out, height, width, dtype))
                for block in blocks
            ]
            up = Conv(rescale.conv, height, width, dtype, sorted_outputs(rescale).to(device))
            self.rates += [(conv, frames) for pair in pairs for conv in pair] + [(up, frames)]
            self.scales.append(pairs)
            self.ups.append(up)
            height, width = height * rescale.space, width * rescale.space
            frames *= rescale.time

    def choose(self, timer: Timer) -> None:
        """Choose the form of every convolution on this device."""
        for conv, frames in self.rates:
            conv.choose(frames, timer)

    def clear(self) -> None:
        for conv, _ in self.rates:
            conv.memory.zero_()

    def __call__(self, latent: Tensor) -> Tensor:
        z = latent.to(self.dtype).contiguous(memory_format=torch.channels_last)
        by = self.decoder.time, self.decoder.space
        flat = channels_to_space_time(self.linear(z)[None], *by)[0]  # [4, 3, H, W]
        x = self.inlet(z)
        for pairs, up, rescale in zip(self.scales, self.ups, self.decoder.rescale, strict=True):
            for mix, out in pairs:
                x = x + out(F.relu(mix(F.relu(x))))
            x = unfold(up(F.relu(x)), rescale.time, rescale.space)
        return to_pixels(x.float() + flat.float()).contiguous()
