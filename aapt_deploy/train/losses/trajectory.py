"""Distil by regression: one pass of the student ends where the teacher's sampler ends.

Teacher and student start from the same noise. So the loss averages nothing that noise decides, and
texture survives. A student's answers are still a little too smooth, and in a rollout that
compounds. Within seconds the channels of fine detail sink to a third of their deviation
(docs/log.md).

So the student may see the past as a long rollout wears it: each channel at another gain and off in
level. The teacher sees the true past. To give the teacher's answer the student has to restore what
was lost. How far its channels sink is measured first, on rollouts of its own.

An addition to AAPT's recipe, whose answer to drift is the discriminator (adversarial.py). That
stage now starts from a generator without decay.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.rope import temporal_rope
from aapt_deploy.models.sampler import denoise
from aapt_deploy.train.losses.flow import Batch, Latents, blemishes
from aapt_deploy.train.losses.student_forcing import Streams
from aapt_deploy.train.recipe import TrajectoryStage

FURTHEST = 1.2  # times the measured fading, at most
# Share of worn histories with too much contrast instead of too little. More: rollouts turn grey.
# Less: colours run away.
OVER = 0.28
# Deviation of errors in a channel's level, for the whole picture and in places. Stronger ones teach
# grey, too.
LEVEL, TINT = 0.14, 0.08
BEND = 0.1  # where the loss goes from square to linear, in deviations of a step
GRID = (3, 4)  # of a tint that varies over the picture


def trajectory_loss(
    student: Generator, teacher: Generator, batch: Batch, stage: TrajectoryStage, fade: Tensor,
    rng: torch.Generator,
) -> Tensor:  # fmt: skip
    """Return the distance of the student's one pass to the end of the teacher's sampler.

    It is in deviations of a step, a scalar. fade [C] as in `measure_fade`.
    """
    device, (b, n) = batch.clean.device, batch.clean.shape[:2]
    noise = torch.randn(batch.clean.shape, generator=rng).to(device)
    fixed = (batch.text, batch.rope_time)

    def end(x: Tensor, t: float) -> Tensor:
        times = torch.full((b, n), t, device=device)
        found: Tensor = teacher(x, batch.previous, batch.condition, times, *fixed).float()
        return found

    with torch.no_grad():
        target: Tensor = denoise(end, noise, teacher.profile.sampler.timesteps)
    seen = worn(batch.previous, fade, stage.worn, rng)
    seen = seen + stage.previous_noise * blemishes(batch.previous.shape, rng).to(device)
    answer = student(noise, seen, batch.condition, torch.ones(b, n, device=device), *fixed).float()
    return rounded((answer - target) / student.step_spread)


def rounded(error: Tensor) -> Tensor:
    """Return the mean of a loss, a scalar: square below BEND and linear above."""
    loss: Tensor = ((error**2 + BEND**2).sqrt() - BEND).mean()
    return loss


def worn(previous: Tensor, fade: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Wear recycled latents [B, n, C, h, w] as a long rollout does, in `share` of the clips.

    fade [C]: what is left of each channel. A clip's blocks are worn alike. The first block, the
    sink, keeps its own, which is true in every rollout.
    """
    b, n, c, h, w = previous.shape
    clip = (b, 1, c)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng)

    far = FURTHEST * rand(b, 1, 1) * (rand(b, 1, 1) < share)
    faded = fade.cpu().log() * far * (0.3 + 1.1 * rand(*clip))
    raised = far * (0.05 + 0.55 * rand(b, 1, 1) * (0.4 + 1.2 * rand(*clip)))
    gain = torch.where(rand(b, 1, 1) < OVER, raised, faded)
    gain = gain + 0.08 * torch.sign(far) * torch.randn(b, n, c, generator=rng)
    coarse = far * torch.linspace(1, 0.1, c)  # the first channels carry light and colour
    tints = torch.randn(b, c, *GRID, generator=rng)
    tint = F.interpolate(tints, size=(h, w), mode="bilinear")[:, None]  # [B, 1, C, h, w]
    level = LEVEL * torch.randn(clip, generator=rng)[..., None, None] + TINT * tint
    level = (coarse[..., None, None] * level).to(previous)
    mean, gain = previous.mean((3, 4), keepdim=True), gain.exp()[..., None, None].to(previous)
    return torch.cat([previous[:, :1], (mean + level + gain * (previous - mean))[:, 1:]], dim=1)


@torch.no_grad()
def measure_fade(
    generator: Generator, latents: Latents, stage: TrajectoryStage, rng: torch.Generator
) -> Tensor:
    """Measure what a rollout leaves of each channel's deviation: [C] in [0.05, 1].

    The rollouts take one step a block, `stage.fade_blocks` blocks. They start at true frames and
    follow the cameras of one clip after the other.
    """
    device, m = generator.step_spread.device, latents.conditions.shape[1]
    shape = -(-stage.fade_blocks // m), stage.optimiser.batch
    chosen = torch.randint(len(latents.z), shape, generator=rng)  # [clips, B]
    streams = Streams(generator, latents.tokens[chosen[0]].to(device))
    previous = latents.z[chosen[0], 0].float().to(device)
    for block in range(stage.fade_blocks):
        condition = latents.conditions[chosen[block // m], block % m].float().to(device)
        blocks = torch.full((len(previous),), block).numpy()
        rope_time = torch.from_numpy(temporal_rope(generator.profile, blocks)).to(device)
        noise = torch.randn(previous.shape, generator=rng).to(device)
        previous = streams.sample(noise, previous, condition, rope_time, (1.0,)).float()
    true = latents.z[:, 0].float().to(device)
    left = previous.std((2, 3)).pow(2).mean(0).sqrt() / true.std((2, 3)).pow(2).mean(0).sqrt()
    return left.clamp(0.05, 1.0)
