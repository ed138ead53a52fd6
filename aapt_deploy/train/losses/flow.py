"""Match flows in a block-causal generator on histories like its own (App. B, stage 1).

x_t = (1 - t) x0 + t eps. The network predicts x0. The loss is its squared error in units of the
posterior deviation given the previous frame (`layers.posterior`). At small t that is the squared
error of the velocity, as in the paper; at t = 1 it does not vanish against it. Times may differ
from block to block (`one_time` is off): at inference the cache of a block's neighbours was written
at the sampler's last time.

A generator trained on true histories alone drifts within seconds when it reads its own frames.
Self-resampling shows it its own errors without a rollout. A true frame is noised part of the way,
finished by the generator, and used as the history of the next block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aapt_deploy.errors import InputError
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.layers import posterior
from aapt_deploy.models.aapt.rope import temporal_rope
from aapt_deploy.profiles import Profile
from aapt_deploy.train.draws import coin
from aapt_deploy.train.recipe import AnchoredStage, ConsistencyStage, FlowStage, TrajectoryStage

SMALLEST_T = 0.05  # the sampler stops above it
SMALLEST_SPREAD = 1e-3  # latent units
FAR = 20_000  # blocks by which a sink may lie in the past: 55 minutes at 24 fps


@dataclass(frozen=True)
class Batch:
    """Blocks of a few clips, the sink block first. Shapes as in `Generator.forward`."""

    clean: Tensor  # [B, n, C, h, w] what each block should become
    previous: Tensor  # [B, n, C, h, w] the latent before it
    condition: Tensor  # [B, n, 6, h, w]
    text: Tensor  # [B, L]
    rope_time: Tensor  # [B, n, 2, P_time]

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))


@dataclass(frozen=True)
class Latents:
    """All clips as latents.

    z [N, 1 + m, C, h, w] (any float type), conditions [N, m, 6, h, w], tokens [N, L].
    """

    z: Tensor
    conditions: Tensor
    tokens: Tensor

    def step_spread(self) -> Tensor:
        """Return the deviation of each channel around the latent before it, [C, 1, 1].

        A channel that never moves gets a small one, because losses divide by it.
        """
        steps = self.z[:, 1:].float() - self.z[:, :-1].float()
        return steps.std(dim=(0, 1, 3, 4)).clamp_min(SMALLEST_SPREAD)[:, None, None]

    def draw(
        self,
        profile: Profile,
        stage: FlowStage | ConsistencyStage | TrajectoryStage | AnchoredStage,
        rng: torch.Generator,
    ) -> Batch:
        """Draw block 0 and `stage.blocks` consecutive later blocks of random clips.

        Raises InputError if the clips are too short.
        """
        clips, m = self.z.shape[0], self.conditions.shape[1]
        b, n = stage.optimiser.batch, stage.blocks
        if n >= m:
            raise InputError(
                f"a stage wants {1 + n} blocks of a clip, the clips have {m}",
                "make longer ones, as those were made, with: "
                f"aapt train data FOLDER --blocks {1 + n}",
            )
        chosen = torch.randint(clips, (b,), generator=rng)
        first = torch.randint(1, m - n + 1, (b,), generator=rng)
        sink, later = torch.zeros(b, 1, dtype=torch.long), first[:, None] + torch.arange(n)
        blocks = torch.cat([sink, later], dim=1)  # [B, 1 + n]
        rows = chosen[:, None]
        distance = torch.randint(1, FAR, (b, 1), generator=rng)
        away = distance * (torch.rand(b, 1, generator=rng) < stage.far_sink)
        index = torch.cat([blocks[:, :1], blocks[:, 1:] + away], dim=1)
        rope = torch.from_numpy(temporal_rope(profile, index.numpy()))
        return Batch(
            self.z[rows, blocks + 1].float(),
            self.z[rows, blocks].float(),
            self.conditions[rows, blocks].float(),
            self.tokens[chosen],
            rope,
        )

    def clips(self, count: int, blocks: int, rng: torch.Generator) -> "Clips":
        """Draw `count` pieces of random clips: a frame and the `blocks` blocks after it."""
        m = self.conditions.shape[1]
        assert blocks <= m, f"{blocks=} of a clip that has {m}"
        chosen = torch.randint(len(self.z), (count, 1), generator=rng)
        first = torch.randint(m - blocks + 1, (count, 1), generator=rng)
        rows = first + torch.arange(1 + blocks)  # [B, 1 + n]
        return Clips(
            self.z[chosen, rows].float(),
            self.conditions[chosen, rows[:, :-1]].float(),
            self.tokens[chosen[:, 0]],
        )


@dataclass(frozen=True)
class Clips:
    """Pieces of clips as a stream starts: a frame, and what follows it."""

    frames: Tensor  # [B, 1 + n, C, h, w], the given frame first
    condition: Tensor  # [B, n, 6, h, w] of the steps between them
    text: Tensor  # [B, L]

    def to(self, device: torch.device) -> "Clips":
        return Clips(*(tensor.to(device) for tensor in vars(self).values()))


def shifted(t: Tensor, shift: float) -> Tensor:
    """Shift times as in App. B: s t / (1 + (s - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def flow_loss(generator: Generator, batch: Batch, stage: FlowStage, rng: torch.Generator) -> Tensor:
    """Return the mean squared error over a batch, in posterior deviations, a scalar."""
    clean, previous = batch.clean, batch.previous
    b, n = clean.shape[:2]
    if coin(rng, 1) < stage.resampled:
        previous = resample_history(generator, batch, rng)
    previous = previous + stage.previous_noise * blemishes(previous.shape, rng).to(clean.device)
    drawn = torch.rand(b, 1 if stage.one_time else n, generator=rng)
    t = shifted(drawn, stage.shift).clamp_min(SMALLEST_T).expand(b, n).to(clean.device)
    noise = torch.randn(clean.shape, generator=rng).to(clean.device)
    t_ = t[..., None, None, None]  # [B, n, 1, 1, 1]
    noisy = (1 - t_) * clean + t_ * noise
    fixed = (batch.text, batch.rope_time)
    predicted: Tensor = generator(noisy, previous, batch.condition, t, *fixed).float()
    spread = t_ if stage.velocity else posterior(noisy, previous, t_, generator.step_spread)[2]
    return (((predicted - clean) / spread) ** 2).mean()


def blemishes(shape: torch.Size, rng: torch.Generator) -> Tensor:
    """Draw errors of random strength, of the two kinds that a generator makes.

    They are pixel by pixel, and constant over a token's patch.
    """
    b, n, c, h, w = shape
    fine = torch.rand(b, n, 1, 1, 1, generator=rng) * torch.randn(shape, generator=rng)
    coarse = torch.randn(b, n, c, -(-h // 2), -(-w // 2), generator=rng)
    coarse = coarse.repeat_interleave(2, -2).repeat_interleave(2, -1)[..., :h, :w]
    return fine + torch.rand(b, n, 1, 1, 1, generator=rng) * coarse


@torch.no_grad()
def resample_history(generator: Generator, batch: Batch, rng: torch.Generator) -> Tensor:
    """Return recycled latents as the generator itself would have made them: [B, n, C, h, w].

    Each block's true latent is noised to a random time and denoised by the generator in one or two
    passes. Block i's result replaces the recycled latent of block i + 1. The sink and the first
    block after it keep theirs, because their predecessors are not in the batch.
    """
    clean = batch.clean
    b = clean.shape[0]
    t = 0.35 + 0.65 * torch.rand(b, 1, generator=rng).expand(b, clean.shape[1]).to(clean.device)
    single = coin(rng, 2) < 0.5
    t_, noise = t[..., None, None, None], torch.randn(clean.shape, generator=rng).to(clean.device)
    x = (1 - t_) * clean + t_ * noise
    previous, fixed, zero = batch.previous, (batch.text, batch.rope_time), torch.zeros_like(t)
    for now, after in [(t, zero)] if single else [(t, t / 2), (t / 2, zero)]:
        predicted = generator(x, previous, batch.condition, now, *fixed).float()
        x = predicted + (x - predicted) * (after / now)[..., None, None, None]
    return torch.cat([batch.previous[:, :2], x[:, 1:-1]], dim=1)
