"""Student forcing: the generator is trained on what it will meet, its own rollout (AAPT section 3.3), through the same `step` and the same cache.

Here it serves flow matching: at every block of a rollout the generator is asked for the true next block, given its own frames so far. Teacher
forcing never shows a picture that has lost its texture, and self-resampling shows one whose past still leaks the truth; a rollout of some blocks
shows both as they are, and the loss asks for the texture back. Not here: losses without a ground truth.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from aapt_deploy.models.generator import Generator
from aapt_deploy.models.layers import posterior
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.rollout import denoise
from aapt_deploy.train.flow import SMALLEST_T, Batch, shifted
from aapt_deploy.train.recipe import FlowStage


class Streams:
    """B rollouts in lockstep. The caches are replaced, never written into, so gradients may flow through them.

    text: ids [B, L] or embeddings [B, L, text.dim], as in `Generator.prompt`.
    """

    def __init__(self, generator: Generator, text: Tensor) -> None:
        self.generator, self.ring, self.block = generator, Ring.of(generator.profile), 0
        keys, values = generator.prompt(text)
        self.k_cache, self.v_cache = ([_room(x, self.ring.tokens) for x in tensors] for tensors in (keys, values))

    def step(self, noisy: Tensor, previous: Tensor, condition: Tensor, t: Tensor, rope_time: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """One pass over the next block of every stream; shapes as in `Generator.step` with B in front. Commits nothing."""
        cache_len = torch.tensor([self.ring.place(self.block).cache_len], dtype=torch.int32)
        caches = list(self.k_cache), list(self.v_cache)  # as they are now: a recomputed block looks at them again in the backward pass
        return self.generator.step(noisy, previous, condition, t, rope_time, *caches, cache_len)

    def commit(self, k_blocks: Sequence[Tensor], v_blocks: Sequence[Tensor]) -> None:
        """Put the block's keys and values, per layer [B, F, H, D], into its slot and go on to the next block."""
        slot = self.ring.place(self.block).slot
        end = slot + self.ring.frame_tokens
        for caches, blocks in ((self.k_cache, k_blocks), (self.v_cache, v_blocks)):
            for layer, block in enumerate(blocks):
                caches[layer] = caches[layer].slice_scatter(block.to(caches[layer].dtype), dim=1, start=slot, end=end)
        self.block += 1

    def detach(self) -> None:
        """Let go of the graph behind the caches; keep their values."""
        self.k_cache, self.v_cache = ([x.detach() for x in caches] for caches in (self.k_cache, self.v_cache))

    def sample(self, noise: Tensor, previous: Tensor, condition: Tensor, rope_time: Tensor, timesteps: Sequence[float]) -> Tensor:
        """The next latent of every stream [B, C, h, w], committed: the loop of `aapt_deploy.rollout` on tensors."""
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def clean(noisy: Tensor, t: float) -> Tensor:
            nonlocal keys, values
            found, keys, values = self.step(noisy, previous, condition, torch.full((len(noisy),), t, device=noisy.device), rope_time)
            return found

        latent: Tensor = denoise(clean, noise, timesteps)
        self.commit(keys, values)
        return latent


def _room(text: Tensor, tokens: int) -> Tensor:
    """text [B, L, H, D] in front of an empty cache: [B, S, H, D]."""
    b, length, heads, dim = text.shape
    return torch.cat([text.float(), torch.zeros(b, tokens - length, heads, dim, device=text.device)], dim=1)


def forced_flow_loss(generator: Generator, batch: Batch, stage: FlowStage, rng: torch.Generator) -> Tensor:
    """`flow_loss` with the rollout's own past: mean squared error in posterior deviations, a scalar.

    The first block of the batch is the sink, made from its true predecessor. The second one starts from a true latent again, because what lies
    between them is not in the batch; from there on every recycled latent and every key and value is the generator's own, without gradient.
    """
    sampler = generator.profile.sampler
    streams = Streams(generator, batch.text)
    previous, losses = batch.previous[:, 0], []
    for j in range(batch.clean.shape[1]):
        if j == 1:
            previous = batch.previous[:, 1]
        clean, condition, rope_time = batch.clean[:, j], batch.condition[:, j], batch.rope_time[:, j]
        t = shifted(torch.rand(len(clean), generator=rng), stage.shift).clamp_min(SMALLEST_T).to(clean.device)
        t_ = t[:, None, None, None]
        noisy = (1 - t_) * clean + t_ * torch.randn(clean.shape, generator=rng).to(clean.device)
        predicted = streams.step(noisy, previous, condition, t, rope_time)[0].float()
        _, _, spread = posterior(noisy, previous, t_, generator.step_spread)
        losses.append((((predicted - clean) / spread) ** 2).mean())
        with torch.no_grad():
            noise = sampler.temperature * torch.randn(clean.shape, generator=rng).to(clean.device)
            previous = streams.sample(noise, previous, condition, rope_time, sampler.timesteps).float()
    return torch.stack(losses).mean()
