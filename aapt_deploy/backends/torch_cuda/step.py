"""One pass of the generator: the visual stream alone, over caches that stay in place.

    commit of the block before   to `slot`, on the device; a slot below 0 commits nothing
    embed                        patches of the noisy latent, the previous one and the rays, float32
    36 x                         [norm, modulate, quantise] qkv [QK-norm, rotate] [pack, attend]
                                 [quantise] out [gate, residual, norm, modulate, quantise] w1
                                 [GELU, quantise] w2 [gate, residual, next norm ...]
    clean latent                 in float32

Each pair of brackets is one kernel (pack and attend: two). They are passed as a set
(kernels.Kernels), so the same step runs on a CPU with plain ones. Layers with scales run in FP8.

A block is committed at the start of the next pass. So a pass leaves no trace until an engine's
`commit`, which only sets a number. The step can be captured: it allocates from torch's allocator,
never waits, and reads nothing on the host but shapes.

Letters: F tokens of a block, H heads, D head_dim, L text tokens, S tokens of a cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt_deploy.backends.torch_cuda.kernels import AttentionScales, Kernels
from aapt_deploy.bundle.scales import Scales
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.layers import EPS, join_rope, posterior
from aapt_deploy.ops.block_causal_attention import Ring, hopper_fp8
from aapt_deploy.ops.fused import FP8, quantised
from aapt_deploy.profiles import Profile

NOWHERE = -1  # slot of a block that is not kept
LINEARS = ("qkv", "out", "w1", "w2")


class Linear(Protocol):
    """A linear layer. It takes codes if it has a `step`, else activations."""

    step: Tensor | None

    def __call__(self, x: Tensor) -> Tensor: ...


class Wide:
    """A linear layer in the activations' own type."""

    step: Tensor | None = None

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        self.weight = layer.weight.detach().to(dtype)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Narrow:
    """A linear layer in FP8, with static scales.

    The input has one scale. The weights have one for each row, or one for all.
    """

    def __init__(
        self, layer: nn.Linear, input_scale: Tensor, weight_scale: Tensor, rows: int,
        kernels: Kernels, dtype: torch.dtype, by_row: bool,
    ) -> None:  # fmt: skip
        """Take input_scale [1], weight_scale [out], and `rows` tokens of every call."""
        self.kernels, self.dtype = kernels, dtype
        self.step: Tensor | None = input_scale
        if not by_row:
            weight_scale = weight_scale.max().expand(len(weight_scale))
        # [out, in]: the product reads it as a column-major [in, out].
        self.weight = quantised(layer.weight.detach(), weight_scale[:, None])
        # PyTorch requires one for each row of both or of none.
        self.x_scale = input_scale.expand(rows, 1).contiguous() if by_row else input_scale
        self.weight_scale = (weight_scale[None] if by_row else weight_scale[:1]).contiguous()
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        assert x.dtype == FP8, f"{x.dtype=}"
        scales = self.x_scale, self.weight_scale
        return self.kernels.product(x, self.weight, *scales, self.bias, self.dtype)


class Cache(Protocol):
    """The keys and values of every layer."""

    def commit(self, layer: int, slot: Tensor) -> None:
        """Move the block of the last pass to token slot[0]; skip a slot below 0."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cache_len: Tensor) -> Tensor:
        """Attend with q, k, v [1, F, H, D] and cache_len int32 [1]; return [1, F, H, D].

        k and v are kept as the block of this pass.
        """
        ...

    def write_text(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write k, v [1, L, H, D] to the front."""
        ...

    def clear(self) -> None: ...


class Tokens:
    """Caches [1, S, H, D] in the activations' type, with room behind for a skipped block."""

    def __init__(
        self, profile: Profile, kernels: Kernels, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.kernels, tokens, frame = kernels, profile.cache_tokens, profile.frame_tokens
        # On the device, because a number of the host cannot be captured.
        self.nowhere = torch.tensor([tokens], dtype=torch.int32, device=device)
        shape, depth = (profile.model.heads, profile.head_dim), range(profile.model.depth)
        self.caches, self.blocks = (
            [torch.zeros((2, 1, n, *shape), dtype=dtype, device=device) for _ in depth]
            for n in (tokens + frame, frame)
        )
        self.rows = torch.arange(profile.frame_tokens, device=device)

    def commit(self, layer: int, slot: Tensor) -> None:
        first = torch.where(slot < 0, self.nowhere, slot)
        self.caches[layer].index_copy_(2, first + self.rows, self.blocks[layer])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cache_len: Tensor) -> Tensor:
        for kept, new in zip(self.blocks[layer], (k, v), strict=True):
            kept.copy_(new)
        k_cache, v_cache = self.caches[layer]
        return self.kernels.attend_tokens(q, k, v, k_cache, v_cache, cache_len)

    def write_text(self, layer: int, k: Tensor, v: Tensor) -> None:
        for cache, text in zip(self.caches[layer], (k, v), strict=True):
            cache[:, : text.shape[1]] = text

    def clear(self) -> None:
        for held in (*self.caches, *self.blocks):
            held.zero_()


class Tiles:
    """Caches of e4m3 tiles (hopper_fp8)."""

    def __init__(
        self, profile: Profile, kernels: Kernels, scales: Sequence[hopper_fp8.Scales],
        device: torch.device,
    ) -> None:  # fmt: skip
        self.kernels, self.tokens, self.device = kernels, profile.frame_tokens, device
        self.scales = [AttentionScales.of(layer, device) for layer in scales]
        self.heads = profile.model.heads, profile.head_dim
        self.caches = [self._image(Ring.of(profile).tokens) for _ in scales]
        self.blocks = [self._image(profile.frame_tokens) for _ in scales]
        self.front = torch.zeros(1, dtype=torch.int32, device=device)

    def commit(self, layer: int, slot: Tensor) -> None:
        (k_block, v_block), (k_cache, v_cache) = self.blocks[layer], self.caches[layer]
        self.kernels.commit_tiles(k_block, v_block, slot, k_cache, v_cache, self.tokens)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cache_len: Tensor) -> Tensor:
        (k_block, v_block), (k_cache, v_cache) = self.blocks[layer], self.caches[layer]
        scales = self.scales[layer]
        self.kernels.pack(k, v, scales, k_block, v_block)
        return self.kernels.attend_tiles(q, k_block, v_block, k_cache, v_cache, cache_len, scales)

    def _image(self, tokens: int) -> Tensor:
        """Allocate tiles of keys and of values for `tokens` tokens."""
        shape = hopper_fp8.image_shape(self.heads[0], tokens, self.heads[1])
        return torch.zeros((2, *shape), dtype=torch.uint8, device=self.device)

    def write_text(self, layer: int, k: Tensor, v: Tensor) -> None:
        (k_image, v_image), (k_cache, v_cache) = self._image(k.shape[1]), self.caches[layer]
        self.kernels.pack(k, v, self.scales[layer], k_image, v_image)
        self.kernels.commit_tiles(k_image, v_image, self.front, k_cache, v_cache, k.shape[1])

    def clear(self) -> None:
        for held in (*self.caches, *self.blocks):
            held.zero_()


@dataclass(frozen=True)
class StepLayer:
    """The visual half of one MMDiT block."""

    linears: dict[str, Linear]
    norm_q: Tensor  # float32 [D]
    norm_k: Tensor


class Step:
    """One pass: the generator's inputs on the device to `clean`.

    The inputs are those of `signature.generator`, and slot int32 [1].
    """

    def __init__(
        self, generator: Generator, layers: Sequence[StepLayer], cache: Cache, kernels: Kernels,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.generator, self.layers, self.cache = generator, layers, cache
        self.kernels, self.dtype = kernels, dtype
        tables = [layer.modulation.detach().float() for layer in generator.step_blocks]
        self.tables = torch.stack(tables)  # [depth, 6, dim]

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        g, kernels = self.generator, self.kernels
        time, previous = inputs["time"], inputs["previous"]
        at = time[:, None, None, None]
        innovation, base, spread = posterior(inputs["noisy"], previous, at, g.step_spread)
        given = torch.cat([innovation, previous, inputs["condition"]], dim=1)
        tokens, direct = g.embed(given)  # [1, F, dim], [1, C, h, w]
        shared, head = (torch.cat(group) for group in g.times(time))  # [6, dim], [2, dim]
        tables = self.tables + shared  # [depth, 6, dim]
        rope = join_rope(inputs["rope_time"], g.spatial_rope)[0].contiguous()  # [2, F, P]
        x = tokens[0].to(self.dtype).contiguous()  # [F, dim]
        step = self.layers[0].linears["qkv"].step
        y = kernels.modulated(x, tables[0, 0], tables[0, 1], EPS, step)
        for i, layer in enumerate(self.layers):
            qkv, out, w1, w2 = (layer.linears[name] for name in LINEARS)
            self.cache.commit(i, inputs["slot"])
            q, k, v = kernels.heads(qkv(y), layer.norm_q, layer.norm_k, rope, EPS)  # [1, F, H, D]
            attended = self.cache.attend(i, q, k, v, inputs["cache_len"])
            attended = attended.view(len(x), -1)  # [F, dim]
            attended = attended if out.step is None else kernels.quantised(attended, out.step)
            _, _, gate, shift, scale, gate_mlp = tables[i]
            x, y = kernels.gated(x, out(attended), gate, shift, scale, EPS, w1.step)
            mlp = w2(kernels.activated(w1(y), w2.step))
            shift, scale, step = *head, None
            if i + 1 < len(self.layers):
                shift, scale, step = *tables[i + 1, :2], self.layers[i + 1].linears["qkv"].step
            x, y = kernels.gated(x, mlp, gate_mlp, shift, scale, EPS, step)
        clean: Tensor = base + spread * (g.latent(y.float()[None]) + direct)
        return clean


def wide_layers(generator: Generator, dtype: torch.dtype) -> list[StepLayer]:
    """Return the visual stream in `dtype`."""

    def linears(stream: nn.Module) -> dict[str, Linear]:
        return {name: Wide(getattr(stream, name), dtype) for name in LINEARS}

    return [_layer(stream, linears(stream)) for stream in generator.step_blocks]


def fp8_layers(
    generator: Generator, scales: Scales, kernels: Kernels, dtype: torch.dtype,
    device: torch.device, by_row: bool,
) -> list[StepLayer]:  # fmt: skip
    """Return the visual stream with the layers that have scales in FP8, others in `dtype`."""
    tokens, layers = generator.profile.frame_tokens, []
    for i, stream in enumerate(generator.step_blocks):
        linears: dict[str, Linear] = {}
        for name in LINEARS:
            layer, found = getattr(stream, name), scales.linear.get(f"{generator.STEP}.{i}.{name}")
            if found is None:
                linears[name] = Wide(layer, dtype)
                continue
            arrays = found.input_scale, found.weight_scale
            of_input, of_weight = (torch.from_numpy(array).to(device) for array in arrays)
            linears[name] = Narrow(layer, of_input, of_weight, tokens, kernels, dtype, by_row)
        layers.append(_layer(stream, linears))
    return layers


def _layer(stream: nn.Module, linears: dict[str, Linear]) -> StepLayer:
    norms: list[Any] = [stream.norm_q, stream.norm_k]
    return StepLayer(linears, *(norm.detach().float() for norm in norms))
