"""Train the generator on its own rollouts, as inference runs them (AAPT section 3.3).

Here student forcing serves flow matching. At every block of a rollout the loss wants the true next
block, given the generator's own frames so far. Teacher forcing never shows a picture that has lost
its texture. Self-resampling shows one whose past still leaks the truth. A rollout of some blocks
shows both as they are, and the loss wants the texture back. Not here: losses without a truth.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.layers import posterior
from aapt_deploy.models.sampler import denoise
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.train.losses.flow import SMALLEST_T, Batch, shifted
from aapt_deploy.train.recipe import FlowStage

Kept = tuple[list[Tensor], list[Tensor]]  # keys and values per layer, each [B, tokens, H, D]


class Streams:
    """B rollouts in lockstep.

    Blocks are stored one by one and joined when they are read, so gradients may flow through them.
    text: ids [B, L] or embeddings [B, L, text.dim], as in `Generator.prompt`.
    """

    def __init__(self, generator: Generator, text: Tensor) -> None:
        self.generator, self.ring, self.block = generator, Ring.of(generator.profile), 0
        keys, values = generator.prompt(text)
        text_block = [x.float() for x in keys], [x.float() for x in values]
        self.held: dict[int, Kept] = {0: text_block}  # by slot; the text is in front
        self.cache: Kept | None = None  # all blocks joined; None after a commit

    def step(
        self, noisy: Tensor, previous: Tensor, condition: Tensor, t: Tensor, rope_time: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Pass once over the next block of every stream. Commit nothing.

        Shapes as in `Generator.step`, with B in front.
        """
        if self.cache is None:
            keys, values = zip(*(self.held[slot] for slot in sorted(self.held)), strict=True)
            self.cache = _joined(keys), _joined(values)  # per layer [B, cache_len, H, D]
        cache_len = torch.tensor([self.ring.place(self.block).cache_len], dtype=torch.int32)
        return self.generator.step(noisy, previous, condition, t, rope_time, *self.cache, cache_len)

    def commit(self, k_blocks: list[Tensor], v_blocks: list[Tensor]) -> None:
        """Put a block's keys and values, per layer [B, F, H, D], into its slot. Advance."""
        self.held[self.ring.place(self.block).slot] = (k_blocks, v_blocks)
        self.cache, self.block = None, self.block + 1

    def detach(self) -> None:
        """Drop the graph behind the cache; keep its values."""
        self.held = {
            slot: ([x.detach() for x in keys], [x.detach() for x in values])
            for slot, (keys, values) in self.held.items()
        }
        self.cache = None

    def sample(
        self, noise: Tensor, previous: Tensor, condition: Tensor, rope_time: Tensor,
        timesteps: Sequence[float],
    ) -> Tensor:  # fmt: skip
        """Return the next latent of every stream [B, C, h, w], and commit it.

        The loop of `aapt_deploy.rollout.loop` on tensors.
        """
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def clean(noisy: Tensor, t: float) -> Tensor:
            nonlocal keys, values
            time = torch.full((len(noisy),), t, device=noisy.device)
            found, keys, values = self.step(noisy, previous, condition, time, rope_time)
            return found

        latent: Tensor = denoise(clean, noise, timesteps)
        self.commit(keys, values)
        return latent


def _joined(parts: Sequence[list[Tensor]]) -> list[Tensor]:
    """Per part and layer [B, tokens, H, D] -> per layer, the parts one behind the other."""
    return [torch.cat(blocks, dim=1) for blocks in zip(*parts, strict=True)]


def forced_flow_loss(
    generator: Generator, batch: Batch, stage: FlowStage, rng: torch.Generator
) -> Tensor:
    """Return `flow_loss` on the rollout's own past.

    It is the mean squared error in posterior deviations, a scalar. The first block of the batch is
    the sink, made from its true predecessor. The second one starts from a true latent again,
    because what is between them is not in the batch. From there on every recycled latent, key and
    value is the generator's own, without gradient.
    """
    sampler = generator.profile.sampler
    streams = Streams(generator, batch.text)
    previous, losses = batch.previous[:, 0], []
    for j in range(batch.clean.shape[1]):
        if j == 1:
            previous = batch.previous[:, 1]
        clean, condition, rope_time = (
            batch.clean[:, j],
            batch.condition[:, j],
            batch.rope_time[:, j],
        )
        t = (
            shifted(torch.rand(len(clean), generator=rng), stage.shift)
            .clamp_min(SMALLEST_T)
            .to(clean.device)
        )
        t_ = t[:, None, None, None]
        noisy = (1 - t_) * clean + t_ * torch.randn(clean.shape, generator=rng).to(clean.device)
        predicted = streams.step(noisy, previous, condition, t, rope_time)[0].float()
        _, _, spread = posterior(noisy, previous, t_, generator.step_spread)
        losses.append((((predicted - clean) / spread) ** 2).mean())
        with torch.no_grad():
            noise = sampler.temperature * torch.randn(clean.shape, generator=rng).to(clean.device)
            previous = streams.sample(
                noise, previous, condition, rope_time, sampler.timesteps
            ).float()
    return torch.stack(losses).mean()
