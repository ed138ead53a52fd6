"""Distil the teacher's path into one pass, by consistency (AAPT App. B, stage 2).

Times 0 = t_0 < t_1 < ... < t_K = 1 are fixed. For a random i, data and noise are mixed to x at
t_{i+1}. The teacher, which is the diffusion-adapted generator, takes one straight step to t_i. The
student's answer at t_{i+1} is pulled to its own answer at t_i, which carries no gradient. At t_0
the answer is x itself: `layers.posterior` gives the network no weight there.

No guidance and no averaged target, one time per clip, true previous frames. The result is blurry,
and only the start of the adversarial stage.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.train.losses.flow import Batch, blemishes, shifted
from aapt_deploy.train.recipe import ConsistencyStage


def times(stage: ConsistencyStage) -> Tensor:
    """Return the K + 1 fixed times, from 0 to 1: evenly spaced, then shifted."""
    return shifted(torch.arange(stage.intervals + 1) / stage.intervals, stage.shift)


def consistency_loss(
    student: Generator,
    teacher: Generator,
    batch: Batch,
    stage: ConsistencyStage,
    rng: torch.Generator,
) -> Tensor:
    """Return the mean squared distance of answers at neighbouring times of a path, a scalar."""
    clean = batch.clean
    b, n = clean.shape[:2]
    previous = batch.previous + stage.previous_noise * blemishes(batch.previous.shape, rng).to(
        clean.device
    )
    i = torch.randint(stage.intervals, (b, 1), generator=rng)  # one for the whole clip
    now, after = (times(stage)[j].expand(b, n).to(clean.device) for j in (i + 1, i))
    now_, after_ = now[..., None, None, None], after[..., None, None, None]
    x = (1 - now_) * clean + now_ * torch.randn(clean.shape, generator=rng).to(clean.device)
    fixed = (batch.text, batch.rope_time)
    with torch.no_grad():
        end = teacher(x, previous, batch.condition, now, *fixed).float()
        nearer = end + (x - end) * (after_ / now_)
        target = student(nearer, previous, batch.condition, after, *fixed).float()
    answer: Tensor = student(x, previous, batch.condition, now, *fixed).float()
    return F.mse_loss(answer, target)
