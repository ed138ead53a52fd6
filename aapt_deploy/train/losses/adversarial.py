"""Train on what the generator streams, against a discriminator.

Adversarial student forcing and long video (AAPT sections 2.2 and 3.3, App. B stage 3). The
generator gets one true frame and then its own: `Streams`, with the `step` and cache of inference.
Each recycled frame is detached, so a gradient reaches the past through keys and values alone. The
discriminator then sees the whole segment in one pass.

    generator       softplus(-(D(made) - D(real)))
    discriminator   softplus(D(made) - D(real)) + penalty (R1 + R2)
                    R of a clip = (D(clip) - D(clip + penalty_noise eps))^2

Long video continues from there. The cache is detached. A segment of `blocks`, the first `overlap`
of which are the last ones again, is judged against another real clip, whose camera path it follows.
Gradients of all segments add up to one update. No loss compares with the true next frame.

Drift shows late, so up to `unjudged` segments are streamed without gradient before the first that
is judged. This is an addition to the paper.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt_deploy.models.aapt.discriminator import Discriminator
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.rope import temporal_rope
from aapt_deploy.train.draws import coin
from aapt_deploy.train.losses.flow import FAR, Clips, Latents
from aapt_deploy.train.losses.student_forcing import Streams
from aapt_deploy.train.processes import is_sharded
from aapt_deploy.train.recipe import AdversarialStage


class ForcedRollout:
    """Stream B rollouts from one true frame each, as inference does, under autograd.

    Every recycled frame is detached. first [B, C, h, w]; text as in `Generator.prompt`. Noise and
    the place of the sink come from `rng`.
    """

    def __init__(
        self, generator: Generator, first: Tensor, text: Tensor, stage: AdversarialStage,
        rng: torch.Generator,
    ) -> None:  # fmt: skip
        self.profile, self.stage, self.rng = generator.profile, stage, rng
        self.streams, self.previous = Streams(generator, text), first
        away = torch.rand(len(first), generator=rng) < stage.far_sink
        self.away = (
            torch.randint(FAR, (len(first),), generator=rng) * away
        )  # blocks between the sink and the next one

    def extend(self, condition: Tensor) -> Tensor:
        """Return the next n blocks [B, n, C, h, w] under the camera condition [B, n, 6, h, w]."""
        made = []
        for step in condition.unbind(1):
            block = self.streams.block + (self.away if self.streams.block else 0 * self.away)
            rope_time = torch.from_numpy(temporal_rope(self.profile, block.numpy())).to(step.device)
            noise = self.profile.sampler.temperature * torch.randn(
                self.previous.shape, generator=self.rng
            ).to(step.device)
            latent = self.streams.sample(
                noise, self.previous, step, rope_time, self.stage.timesteps
            ).float()
            made.append(latent)
            self.previous = latent.detach()
        return torch.stack(made, dim=1)

    def detach(self) -> None:
        """Drop the past's graph; keep its values."""
        self.streams.detach()


def adversarial_update(
    generator: Generator, discriminator: Discriminator, latents: Latents,
    stage: AdversarialStage, rng: torch.Generator, step: int, scale: float,
) -> dict[str, Tensor]:  # fmt: skip
    """Add `scale` times one batch's gradients to both networks. Return figures.

    step: updates done; in the first `head_start` ones the generator gets no gradient. The same
    rollout serves both networks: the discriminator judges the generator as it is before this
    update.
    """
    warming = step < stage.head_start
    penalty = 0.0 if step % stage.penalty_every else stage.penalty * stage.penalty_every
    batch, segments = stage.optimiser.batch, 1 + stage.extensions
    before = int(coin(rng, 3) * (stage.unjudged + 1))  # segments; equal in an update's batches
    device = generator.step_spread.device
    real = latents.clips(batch, stage.blocks, rng).to(device)
    with torch.set_grad_enabled(not warming):
        rollout = ForcedRollout(generator, real.frames[:, 0], real.text, stage, rng)
    text, shown, conditions = real.text, real.frames[:, :1], real.condition[:, :0]
    for _ in range(before):
        with torch.no_grad():
            shown = rollout.extend(real.condition)[:, -1:]
        real = latents.clips(batch, stage.blocks, rng).to(device)
    figures: list[dict[str, Tensor]] = []
    for segment in range(segments):
        if segment:
            rollout.detach()
            real = latents.clips(batch, stage.blocks, rng).to(device)
        condition = real.condition[:, conditions.shape[1] :]
        with torch.set_grad_enabled(not warming):
            made = rollout.extend(condition)
        frames, path = torch.cat([shown, made], dim=1), torch.cat([conditions, condition], dim=1)
        pair, part = (Clips(frames, path, text), real), scale / segments
        figures.append(_judge(discriminator, *pair, stage, rng, penalty, warming, part))
        shown = frames[:, -1 - stage.overlap :].detach()
        conditions = path[:, path.shape[1] - stage.overlap :]
    return {name: torch.stack([each[name] for each in figures]).mean() for name in figures[0]}


def _judge(
    discriminator: Discriminator, fake: Clips, real: Clips, stage: AdversarialStage,
    rng: torch.Generator, penalty: float, warming: bool, scale: float,
) -> dict[str, Tensor]:  # fmt: skip
    """Run both losses of one segment backward."""
    device, shape = fake.frames.device, fake.frames.shape
    t = torch.rand(len(fake.text), generator=rng).to(device)
    noise = [stage.penalty_noise * torch.randn(shape, generator=rng).to(device) for _ in range(2)]
    detached = Clips(fake.frames.detach(), fake.condition, fake.text)
    figures, real_logits = discriminator_loss(discriminator, detached, real, t, noise, penalty)
    (scale * figures["discriminator"]).backward()
    if not warming:
        with frozen(discriminator):  # also in the backward pass, which may compute blocks again
            made = discriminator(fake.frames, fake.condition, t, fake.text)
            figures["loss"] = F.softplus(real_logits - made).mean()
            (scale * figures["loss"]).backward()
    else:
        figures["loss"] = F.softplus(figures["margin"])
    return {name: value.detach() for name, value in figures.items()}


def discriminator_loss(
    discriminator: Discriminator, fake: Clips, real: Clips, t: Tensor, noise: list[Tensor],
    penalty: float,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """Return the discriminator's loss and its parts, scalars, and the real clips' logits.

    The logits carry no gradient. noise: what R adds to the fake's frames and to the real's. All
    clips of a pair go through in one pass, two of them if `penalty` is 0. The given frame gets no
    noise, because no loss judges it.
    """
    clips = [fake.frames, real.frames]
    if penalty:
        pairs = zip(clips, noise, strict=True)
        clips += [torch.cat([x[:, :1], x[:, 1:] + eps[:, 1:]], dim=1) for x, eps in pairs]
    count = len(clips)
    condition = torch.cat([fake.condition, real.condition] * (count // 2))
    text = torch.cat([fake.text, real.text] * (count // 2))
    logits = discriminator(torch.cat(clips), condition, t.repeat(count), text)
    made, true, *near = logits.chunk(count)  # [B, n or 1] each
    figures = {"discriminator": F.softplus(made - true).mean(), "margin": (true - made).mean()}
    if penalty:
        figures |= {"r1": ((true - near[1]) ** 2).mean(), "r2": ((made - near[0]) ** 2).mean()}
        loss = figures["discriminator"] + penalty * (figures["r1"] + figures["r2"])
        figures["discriminator"] = loss
    return figures, true.detach()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let gradients pass through `module` without changing those of its weights."""
    weights = [p for p in module.parameters() if p.requires_grad]
    sharded, held = is_sharded(module), [p.grad for p in weights]
    for p in weights:
        if sharded:  # FSDP2 does not follow a change of requires_grad
            p.grad = None
        else:
            p.requires_grad_(False)
    try:
        yield
    finally:
        for p, grad in zip(weights, held, strict=True):
            if sharded:
                p.grad = grad
            else:
                p.requires_grad_(True)
