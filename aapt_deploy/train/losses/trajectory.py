"""Distillation by regression: in one pass the student says where the teacher's whole sampler ends, and heals worn histories on the way.

Teacher and student start from the same noise, so that nothing is averaged which noise decides, and texture survives. A student's answers are still
a little too smooth, and in a rollout that compounds: within seconds the channels of fine detail sink to a third of their deviation (docs/log.md).
So the student may be shown the past as a long rollout wears it, each channel at another gain and off in level, while the teacher sees the true past:
to give the teacher's answer the student has to restore what was lost. How far its channels sink is measured first, on rollouts of its own.

An addition to AAPT's recipe, whose answer to drift is the discriminator (adversarial.py): that stage now starts from a generator without decay.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.rope import temporal_rope
from aapt_deploy.rollout.loop import denoise
from aapt_deploy.train.losses.flow import Batch, Latents, blemishes
from aapt_deploy.train.losses.student_forcing import Streams
from aapt_deploy.train.recipe import TrajectoryStage

FURTHEST = 1.2  # times the measured fading, at most
OVER = 0.28  # share of worn histories with too much contrast instead of too little: more, and rollouts turn grey; less, and colours run away
LEVEL, TINT = (
    0.14,
    0.08,
)  # deviation of errors in a channel's level, for the whole picture and in places; stronger ones, too, teach grey
BEND = 0.1  # where the loss goes from square to linear, in deviations of a step
GRID = (3, 4)  # of a tint that varies over the picture


def trajectory_loss(
    student: Generator,
    teacher: Generator,
    batch: Batch,
    stage: TrajectoryStage,
    fade: Tensor,
    rng: torch.Generator,
) -> Tensor:
    """Distance of the student's one pass to the end of the teacher's sampler, in deviations of a step, a scalar. fade [C] as in `measure_fade`."""
    device, (b, n) = batch.clean.device, batch.clean.shape[:2]
    noise = torch.randn(batch.clean.shape, generator=rng).to(device)
    fixed = (batch.text, batch.rope_time)

    def end(x: Tensor, t: float) -> Tensor:
        found: Tensor = teacher(
            x, batch.previous, batch.condition, torch.full((b, n), t, device=device), *fixed
        ).float()
        return found

    with torch.no_grad():
        target: Tensor = denoise(end, noise, teacher.profile.sampler.timesteps)
    seen = worn(batch.previous, fade, stage.worn, rng) + stage.previous_noise * blemishes(
        batch.previous.shape, rng
    ).to(device)
    answer = student(noise, seen, batch.condition, torch.ones(b, n, device=device), *fixed).float()
    return rounded((answer - target) / student.step_spread)


def rounded(error: Tensor) -> Tensor:
    """Mean of a loss that is square below BEND and linear above, a scalar."""
    loss: Tensor = ((error**2 + BEND**2).sqrt() - BEND).mean()
    return loss


def worn(previous: Tensor, fade: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Recycled latents [B, n, C, h, w] as they are after a long rollout, in `share` of the clips; fade [C], what is left of each channel.

    A clip's blocks are worn alike. The first block, the sink, keeps its own, which is true in every rollout.
    """
    b, n, c, h, w = previous.shape
    clip = (b, 1, c)
    far = (
        FURTHEST * torch.rand(b, 1, 1, generator=rng) * (torch.rand(b, 1, 1, generator=rng) < share)
    )
    faded = fade.cpu().log() * far * (0.3 + 1.1 * torch.rand(clip, generator=rng))
    raised = far * (
        0.05
        + 0.55 * torch.rand(b, 1, 1, generator=rng) * (0.4 + 1.2 * torch.rand(clip, generator=rng))
    )
    gain = torch.where(
        torch.rand(b, 1, 1, generator=rng) < OVER, raised, faded
    ) + 0.08 * torch.sign(far) * torch.randn(b, n, c, generator=rng)
    coarse = far * torch.linspace(1, 0.1, c)  # the first channels carry light and colour
    tint = F.interpolate(torch.randn(b, c, *GRID, generator=rng), size=(h, w), mode="bilinear")[
        :, None
    ]  # [B, 1, C, h, w]
    level = LEVEL * torch.randn(clip, generator=rng)[..., None, None] + TINT * tint
    mean = previous.mean((3, 4), keepdim=True)
    gain, level = (
        gain.exp()[..., None, None].to(previous),
        (coarse[..., None, None] * level).to(previous),
    )
    return torch.cat([previous[:, :1], (mean + level + gain * (previous - mean))[:, 1:]], dim=1)


@torch.no_grad()
def measure_fade(
    generator: Generator, latents: Latents, stage: TrajectoryStage, rng: torch.Generator
) -> Tensor:
    """What a one-step rollout of `stage.fade_blocks` blocks leaves of each channel's deviation around its mean: [C] in [0.05, 1].

    The rollouts start at true frames and follow the cameras of one clip after the other.
    """
    device, m = generator.step_spread.device, latents.conditions.shape[1]
    chosen = torch.randint(
        len(latents.z), (-(-stage.fade_blocks // m), stage.optimiser.batch), generator=rng
    )  # [clips, B]
    streams, previous = (
        Streams(generator, latents.tokens[chosen[0]].to(device)),
        latents.z[chosen[0], 0].float().to(device),
    )
    for block in range(stage.fade_blocks):
        condition = latents.conditions[chosen[block // m], block % m].float().to(device)
        rope_time = torch.from_numpy(
            temporal_rope(generator.profile, torch.full((len(previous),), block).numpy())
        ).to(device)
        noise = torch.randn(previous.shape, generator=rng).to(device)
        previous = streams.sample(noise, previous, condition, rope_time, (1.0,)).float()
    true = latents.z[:, 0].float().to(device)
    left = previous.std((2, 3)).pow(2).mean(0).sqrt() / true.std((2, 3)).pow(2).mean(0).sqrt()
    return left.clamp(0.05, 1.0)
