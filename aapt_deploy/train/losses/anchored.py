"""Distil the generator into itself; pull strayed light and colour back, block by block.

After the adversarial stages a rollout is sharp and keeps moving, but the level of every channel
walks at random (docs/log.md). Nothing compares a frame with what it should look like, and a segment
of a second is too short for a discriminator to see it. The generator before the first of these
stages is the teacher. The student learns the same, but for the levels, from two kinds of history:

    true clips    the teacher sees them as they are; the student sees another clip's levels mixed
                  in, and keeps 1 - `restored` of the error
    own flights   minutes long, streamed once at the start of the stage; both see them as they are,
                  and what is outside the natural band around what prompt and first frame predict
                  (anchor.py) is pulled back by the part `pull`

Not here: detail and contrast that fade within seconds (trajectory.py), motion and content
(adversarial.py). An addition to AAPT's recipe.
"""

import torch
from torch import Tensor

from aapt_deploy.errors import TrainingError
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.rope import temporal_rope
from aapt_deploy.train.losses.anchor import Anchor, coarse
from aapt_deploy.train.losses.flow import Batch, Latents
from aapt_deploy.train.losses.student_forcing import Streams
from aapt_deploy.train.losses.trajectory import rounded
from aapt_deploy.train.recipe import AnchoredStage

MIXED = 0.85  # share of clips with another clip's levels; the others have small errors alone
LEVELS, PLACES = (
    (-0.5, 0.9),
    (-0.4, 0.5),
)  # how far towards the other clip: channel means, and what differs over the picture
OWN = 0.15  # deviation of small errors, in latent units; a fifth of it in the last channel
LARGEST = 30.0  # of a latent that has not run away


def anchored_loss(
    student: Generator, teacher: Generator, true: Batch, errors: Tensor, own: Batch,
    anchor: Anchor, stage: AnchoredStage, rng: torch.Generator,
) -> Tensor:  # fmt: skip
    """Return the distance of the student's pass to the teacher's with its levels pulled back.

    It is in deviations of a step, a scalar. errors [B, 1, C, h, w]: what is wrong with the levels
    that the student sees of `true`. The sink block is true in both kinds of history, and stays.
    """
    device, (b, n) = true.clean.device, true.clean.shape[:2]
    pairs = zip(vars(true).values(), vars(own).values(), strict=True)
    both = Batch(*(torch.cat(pair) for pair in pairs))
    noise = torch.randn(both.clean.shape, generator=rng).to(device)
    ones = torch.ones(2 * b, n, device=device)
    fixed = (both.condition, ones, both.text, both.rope_time)
    with torch.no_grad():
        target = teacher(noise, both.previous, *fixed).float()
        target[:b, 1:] += (1 - stage.restored) * errors
        seen = both.previous.clone()
        seen[:b, 1:] += errors
        flat = own.previous[:, 1:].flatten(0, 1)  # [B (n - 1), C, h, w]
        text, first = (x.repeat_interleave(n - 1, 0) for x in (own.text, own.previous[:, 0]))
        excess = anchor.excess(flat, text, first, stage.band)
        pulled = anchor.pulled(target[b:, 1:].flatten(0, 1), *excess, stage.pull)
        target[b:, 1:] = pulled.unflatten(0, (b, n - 1))
    answer = student(noise, seen, *fixed).float()
    return rounded((answer - target) / student.step_spread)


def level_errors(latents: Latents, previous: Tensor, rng: torch.Generator) -> Tensor:
    """Draw an error of the levels [B, 1, C, h, w] for each of the histories [B, n, C, h, w].

    It leads towards another clip's frame.
    """
    b, _, c = previous.shape[:3]
    clips, frames = (torch.randint(size, (b,), generator=rng) for size in latents.z.shape[:2])
    this, other = previous[:, 1], latents.z[clips, frames].float().to(previous)
    mean = (other - this).mean((2, 3), keepdim=True)
    places = coarse(other) - coarse(this) - mean

    def part(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(b, 1, 1, 1, generator=rng)).to(previous)

    mixed = (part(0, 1) < MIXED).to(previous)
    small = OWN * torch.linspace(1, 0.2, c)[:, None, None] * torch.randn(b, c, 1, 1, generator=rng)
    return (mixed * (part(*LEVELS) * mean + part(*PLACES) * places) + small.to(previous))[:, None]


@torch.no_grad()
def own_flights(
    generator: Generator, latents: Latents, stage: AnchoredStage, rng: torch.Generator
) -> Latents:
    """Stream `stage.flights` rollouts of `stage.flight_blocks` blocks, one pass a block.

    They start at true first frames and follow the cameras of one clip after the other. Those that
    run away are left out. Raises TrainingError if all do.
    """
    device, m = generator.step_spread.device, latents.conditions.shape[1]
    shape = -(-stage.flight_blocks // m), stage.flights
    clips = torch.randint(len(latents.z), shape, generator=rng)
    tokens, previous = latents.tokens[clips[0]], latents.z[clips[0], 0].float().to(device)
    streams, made, conditions = Streams(generator, tokens.to(device)), [previous], []
    for block in range(stage.flight_blocks):
        condition = latents.conditions[clips[block // m], block % m]
        condition = condition.float()  # autocast stacks no float16 on a CPU
        blocks = torch.full((stage.flights,), block).numpy()
        rope_time = torch.from_numpy(temporal_rope(generator.profile, blocks)).to(device)
        noise = torch.randn(previous.shape, generator=rng).to(device)
        previous = streams.sample(noise, previous, condition.to(device), rope_time, (1.0,)).float()
        made.append(previous)
        conditions.append(condition)
    z = torch.stack(made, dim=1).cpu()  # [N, 1 + m, C, h, w]
    kept = z.abs().flatten(1).amax(1) < LARGEST  # false for what is not a number
    if not kept.any():
        raise TrainingError(
            f"all {stage.flights} flights of {stage.flight_blocks} blocks run away",
            "anchor a generator that holds for a while: train the stages before it longer",
        )
    return Latents(z[kept].half(), torch.stack(conditions, dim=1)[kept].half(), tokens[kept])
