"""Adversarial student forcing and long video (AAPT sections 2.2 and 3.3, App. B stage 3): the generator learns from what it streams.

The generator is given one true frame and then nothing but its own: `Streams`, the same `step` and the same cache as in inference. Each recycled frame
is detached, so that a gradient reaches the past through keys and values alone. The discriminator then sees the whole segment in one pass.

    generator       softplus(-(D(made) - D(real)))
    discriminator   softplus(D(made) - D(real)) + penalty (R1 + R2),  R of a clip = (D(clip) - D(clip + penalty_noise eps))^2

Long video goes on from there: the cache is detached, a segment of `blocks` of which `overlap` are the last ones again is made and judged against
another real clip, whose camera path it follows; gradients of all segments add up to one update. Nothing here asks for the true next frame.
Drift shows late, so up to `unjudged` segments may be streamed without gradient before the first that is judged: an addition to the paper.
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
    """B streams, from one true frame each, as inference runs them; under autograd, with every recycled frame detached.

    first [B, C, h, w]; text as in `Generator.prompt`. Noise and the place of the sink come from `rng`.
    """

    def __init__(
        self,
        generator: Generator,
        first: Tensor,
        text: Tensor,
        stage: AdversarialStage,
        rng: torch.Generator,
    ) -> None:
        self.profile, self.stage, self.rng = generator.profile, stage, rng
        self.streams, self.previous = Streams(generator, text), first
        away = torch.rand(len(first), generator=rng) < stage.far_sink
        self.away = (
            torch.randint(FAR, (len(first),), generator=rng) * away
        )  # blocks between the sink and the next one

    def extend(self, condition: Tensor) -> Tensor:
        """The next n blocks under the camera condition [B, n, 6, h, w]: latents [B, n, C, h, w]."""
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
        """Let go of the past's graph; keep its values."""
        self.streams.detach()


def adversarial_update(
    generator: Generator,
    discriminator: Discriminator,
    latents: Latents,
    stage: AdversarialStage,
    rng: torch.Generator,
    step: int,
    scale: float,
) -> dict[str, Tensor]:
    """One batch: leaves `scale` times the losses' gradients in both networks, and returns figures.

    step: updates done; in the first `head_start` ones the generator gets no gradient. The same rollout serves both networks: the generator is judged
    by the discriminator as it is before this update.
    """
    warming = step < stage.head_start
    penalty = 0.0 if step % stage.penalty_every else stage.penalty * stage.penalty_every
    batch, segments = stage.optimiser.batch, 1 + stage.extensions
    before = int(
        coin(rng, 3) * (stage.unjudged + 1)
    )  # segments; as many in all batches of the update
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
        fake = Clips(
            torch.cat([shown, made], dim=1), torch.cat([conditions, condition], dim=1), text
        )
        figures.append(
            _judge(discriminator, fake, real, stage, rng, penalty, warming, scale / segments)
        )
        kept = stage.overlap
        shown, conditions = (
            fake.frames[:, -1 - kept :].detach(),
            fake.condition[:, fake.condition.shape[1] - kept :],
        )
    return {name: torch.stack([each[name] for each in figures]).mean() for name in figures[0]}


def _judge(discriminator: Discriminator, fake: Clips, real: Clips, stage: AdversarialStage, rng: torch.Generator, penalty: float,
           warming: bool, scale: float) -> dict[str, Tensor]:  # fmt: skip
    """Backward through both losses of one segment."""
    t = torch.rand(len(fake.text), generator=rng).to(fake.frames.device)
    noise = [
        stage.penalty_noise * torch.randn(fake.frames.shape, generator=rng).to(fake.frames.device)
        for _ in range(2)
    ]
    figures, real_logits = discriminator_loss(
        discriminator,
        Clips(fake.frames.detach(), fake.condition, fake.text),
        real,
        t,
        noise,
        penalty,
    )
    (scale * figures["discriminator"]).backward()
    if not warming:
        with frozen(
            discriminator
        ):  # until the backward pass is over, which may compute blocks again
            made = discriminator(fake.frames, fake.condition, t, fake.text)
            figures["loss"] = F.softplus(real_logits - made).mean()
            (scale * figures["loss"]).backward()
    else:
        figures["loss"] = F.softplus(figures["margin"])
    return {name: value.detach() for name, value in figures.items()}


def discriminator_loss(discriminator: Discriminator, fake: Clips, real: Clips, t: Tensor, noise: list[Tensor],
                       penalty: float) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """The discriminator's loss and its parts, scalars, and the logits of the real clips, which carry no gradient.

    noise: what R adds to the fake's frames and to the real's. All clips of a pair go through in one pass, two of them where `penalty` is 0. The given
    frame, which is judged nowhere, gets no noise.
    """
    clips = [fake.frames, real.frames]
    if penalty:
        clips += [
            torch.cat([x[:, :1], x[:, 1:] + eps[:, 1:]], dim=1)
            for x, eps in zip(clips, noise, strict=True)
        ]
    count = len(clips)
    condition, text = (
        torch.cat([a, b] * (count // 2))
        for a, b in ((fake.condition, real.condition), (fake.text, real.text))
    )
    made, true, *near = discriminator(torch.cat(clips), condition, t.repeat(count), text).chunk(
        count
    )  # [B, n or 1] each
    figures = {"discriminator": F.softplus(made - true).mean(), "margin": (true - made).mean()}
    if penalty:
        figures |= {"r1": ((true - near[1]) ** 2).mean(), "r2": ((made - near[0]) ** 2).mean()}
        figures["discriminator"] = figures["discriminator"] + penalty * (
            figures["r1"] + figures["r2"]
        )
    return figures, true.detach()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Gradients pass through `module` and leave those of its weights as they are."""
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
