"""FP8 scales from the largest magnitudes of a few passes of the engine's own step.

They are for random weights, so that a size can be timed before it has a checkpoint. For a
checkpoint, `aapt export --precision fp8` calibrates on rollouts. Format and rule are the same: a
scale maps the largest magnitude to 448. The first and the last block stay wide.
"""

import numpy as np
import torch
from torch import Tensor

from aapt_deploy.backends.torch_cuda.kernels import Kernels
from aapt_deploy.backends.torch_cuda.step import LINEARS, NOWHERE, Linear, Step, StepLayer, Wide
from aapt_deploy.bundle.scales import LinearScales, Scales
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.rope import temporal_rope
from aapt_deploy.models.aapt.signature import generator as generator_signature
from aapt_deploy.ops.block_causal_attention import hopper_fp8
from aapt_deploy.ops.fused import E4M3_MAX
from aapt_deploy.profiles import Profile


class Watched:
    """A wide linear layer that records the magnitude of its largest input."""

    step: Tensor | None = None

    def __init__(self, layer: Wide) -> None:
        self.layer, self.largest = layer, torch.zeros((), device=layer.weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        self.largest = torch.maximum(self.largest, x.abs().max().float())
        return self.layer(x)


class WatchedCache:
    """An empty cache that records the magnitudes of q and k per head and of v per channel."""

    def __init__(self, kernels: Kernels, depth: int) -> None:
        self.kernels = kernels
        # By layer: q [H], k [H], v [H, D].
        self.seen: list[list[Tensor]] = [[] for _ in range(depth)]

    def commit(self, layer: int, slot: Tensor) -> None:
        pass

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cache_len: Tensor) -> Tensor:
        self.note(layer, q, k, v)
        return self.kernels.attend_tokens(q, k, v, k[:, :1], v[:, :1], torch.zeros_like(cache_len))

    def note(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        per_head = [x.abs().amax((0, 1, 3)).float() for x in (q, k)]
        now = [*per_head, v.abs().amax((0, 1)).float()]
        if before := self.seen[layer]:
            now = [torch.maximum(a, b) for a, b in zip(before, now, strict=True)]
        self.seen[layer] = now

    def write_text(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.note(layer, k, k, v)

    def clear(self) -> None:
        pass


def calibrate(
    generator: Generator, wide: list[StepLayer], kernels: Kernels, dtype: torch.dtype,
    text: tuple[list[Tensor], list[Tensor]] | None, blocks: int = 3,
) -> Scales:  # fmt: skip
    """Compute scales from `blocks` blocks of noise, and from the `text` of one prompt."""
    profile, watched, cache = generator.profile, [], WatchedCache(kernels, len(wide))
    for layer in wide:
        wides = ((name, x) for name, x in layer.linears.items() if isinstance(x, Wide))
        linears: dict[str, Linear] = {name: Watched(x) for name, x in wides}
        watched.append(StepLayer(linears, layer.norm_q, layer.norm_k))
    step, device = Step(generator, watched, cache, kernels, dtype), generator.step_spread.device
    if text:
        for i, (k, v) in enumerate(zip(*text, strict=True)):
            cache.write_text(i, k, v)
    for block in range(blocks):
        step(noise_inputs(profile, block, device))
    linear = {}
    for i in range(1, len(wide) - 1):
        for name in LINEARS:
            seen = watched[i].linears[name]
            assert isinstance(seen, Watched)
            weights = _scale(seen.layer.weight.abs().amax(1).float())
            key = f"{generator.STEP}.{i}.{name}"
            linear[key] = LinearScales(_scale(seen.largest[None]), weights)
    attention = []
    for q, k, v in cache.seen:
        k_mean = np.zeros(tuple(v.shape), np.float32)
        attention.append(hopper_fp8.Scales(_scale(q), _scale(k), k_mean, _scale(v)))
    return Scales(linear, attention)


def _scale(largest: Tensor) -> np.ndarray:
    found: np.ndarray = (largest.clamp(min=1e-6) / E4M3_MAX).cpu().numpy().astype(np.float32)
    return found


def noise_inputs(profile: Profile, block: int, device: torch.device) -> dict[str, Tensor]:
    """Draw the inputs of `Step` from unit noise, for the first timestep of `block`.

    They read nothing from a cache and keep nothing.
    """
    rng = torch.Generator(device).manual_seed(block)
    made = {}
    for spec in generator_signature(profile).inputs[:3]:
        made[spec.name] = torch.randn(spec.shape, generator=rng, device=device)
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    rope = torch.from_numpy(temporal_rope(profile, block)[None]).to(device)
    made |= {"time": torch.ones(1, device=device), "rope_time": rope}
    return made | {"cache_len": nothing, "slot": nothing + NOWHERE}
