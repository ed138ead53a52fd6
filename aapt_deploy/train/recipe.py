"""The numbers of the training stages, one frozen dataclass per kind of stage.

A run is a list of stages; `aapt train` resumes at the stage and step where it stopped. The demo
checkpoint's values were chosen on two CPU cores (docs/log.md). The paper's own values are in
`docs/design.md`.
"""

import math
from dataclasses import dataclass, replace

from aapt_deploy.errors import UsageError


@dataclass(frozen=True)
class Optimiser:
    steps: int  # updates of the stage
    batch: int  # clips per update
    learning_rate: float  # peak; linear warm-up, then a cosine
    warmup: int = 100  # updates
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    ema: float = 0.998  # decay of the averaged weights, which are what ships
    floor: float = 0.01  # part of the peak that the cosine ends at; 1 keeps the rate
    accumulate: int = 1  # batches per update; data-parallel processes share them


@dataclass(frozen=True)
class VaeStage:
    """Train the decoder's convolutions on top of the closed-form linear paths.

    The encoder stays as PCA left it if it has no convolutions.
    """

    optimiser: Optimiser
    blocks: int = 2  # latent frames per training snippet
    latent_noise: float = 0.06  # deviation of noise on the latents: a generator's are not clean
    gradient_weight: float = 1.0  # weight of the L1 on image gradients, which keeps edges


@dataclass(frozen=True)
class FlowStage:
    """Diffusion adaptation (AAPT App. B, stage 1).

    Flow matching with recycled input under the block-causal mask.
    """

    optimiser: Optimiser
    blocks: int  # blocks per sample after the sink
    shift: float = 1.5  # t -> shift t / (1 + (shift - 1) t)
    previous_noise: float = 0.15  # largest deviation of noise on the recycled latent
    # Share of the other updates whose history the generator made from noised truth
    # (self-resampling).
    resampled: float = 0.0
    forced: float = 0.0  # share of updates along a rollout of the generator's own (student forcing)
    # Share of samples whose sink is moved far into the past, for streams longer than a clip.
    far_sink: float = 0.3
    one_time: bool = (
        False  # the whole clip at one time, as in the paper; else each block at its own
    )
    # The plain squared error of the velocity, as in the paper; else one in posterior deviations.
    velocity: bool = False


@dataclass(frozen=True)
class ConsistencyStage:
    """Discrete consistency distillation to one step (App. B, stage 2).

    No guidance, no averaged target, teacher forcing.
    """

    optimiser: Optimiser
    blocks: int  # blocks per sample after the sink
    intervals: int = 32  # fixed steps from noise to data
    shift: float = 1.5  # of the steps' times
    previous_noise: float = 0.0  # as in FlowStage
    far_sink: float = 0.3  # as in FlowStage


@dataclass(frozen=True)
class TrajectoryStage:
    """Distillation to one step by regression on the teacher's samples (trajectory.py).

    Histories may be worn as by long rollouts.
    """

    optimiser: Optimiser
    blocks: int  # blocks per sample after the sink
    worn: float = 0.0  # share of clips whose history the student sees worn
    fade_blocks: int = 72  # length of the rollouts on which wear is measured; only used with `worn`
    previous_noise: float = 0.0  # as in FlowStage, for the student alone
    far_sink: float = 0.3  # as in FlowStage


@dataclass(frozen=True)
class AnchoredStage:
    """Self-distillation that pulls strayed light and colour back (anchored.py)."""

    optimiser: Optimiser  # of whose batch there are two: true clips and own flights
    blocks: int  # blocks per sample after the sink
    flights: int = 24  # own ones, streamed once at the start of the stage
    flight_blocks: int = 240
    restored: float = 0.2  # part of an error of the levels that a block takes back
    pull: float = 0.25  # part of what is beyond the natural band that a block takes back
    band: float = 1.2  # half of the band, in deviations of true frames
    far_sink: float = 0.6  # as in FlowStage


@dataclass(frozen=True)
class AdversarialStage:
    """Student forcing under a discriminator (App. B, stage 3).

    With `extensions`, long video in segments.
    """

    optimiser: Optimiser  # of the generator; the discriminator's differs in its rate alone
    blocks: int  # blocks of a segment, which is what the discriminator sees
    discriminator_rate: float  # peak learning rate
    # Segments after the first: extended camera paths, compared with other real clips.
    extensions: int = 0
    overlap: int = 6  # blocks of the segment before that the discriminator sees again
    # Largest number of segments that are streamed before these, without gradient: the discriminator
    # meets streams of any age.
    unjudged: int = 0
    timesteps: tuple[float, ...] = (1.0,)  # the sampler under training, and of the checkpoint
    penalty: float = 1000.0  # weight of the approximated R1 and R2
    penalty_noise: float = 0.1  # deviation of their noise, in latent units
    penalty_every: int = 1  # updates between them, with as much more weight: half of the work
    attention: str = "causal"  # of the discriminator: "causal" or "bidirectional"
    logits: str = "frame"  # a logit per "frame" or per "clip"
    head_start: int = 0  # first updates, in which the discriminator alone learns
    far_sink: float = 0.0  # as in FlowStage


def gan(
    steps: int, batch: int, learning_rate: float, accumulate: int = 1, clip_norm: float = math.inf
) -> Optimiser:
    """Return the paper's RMSProp: alpha 0.9, as Adam without momentum, a constant rate."""
    fixed = (1, 0.0, (0.0, 0.9), clip_norm, 0.995, 1.0)  # warmup to floor
    return Optimiser(steps, batch, learning_rate, *fixed, accumulate)


def _demo_game(steps: int, unjudged: int) -> AdversarialStage:
    """Return a stage whose discriminator learns faster than the generator.

    It seldom sees a stream's first segments: it has to find drift, not the first blur.
    """
    optimiser = gan(steps, 4, 2e-6, clip_norm=5.0)
    return AdversarialStage(
        optimiser, 6, 1e-4, unjudged=unjudged, attention="bidirectional", head_start=40,
        far_sink=0.2,
    )  # fmt: skip


def _demo_anchored(steps: int, learning_rate: float) -> AnchoredStage:
    return AnchoredStage(Optimiser(steps, 3, learning_rate, 30, ema=0.995), blocks=5)


@dataclass(frozen=True)
class Recipe:
    vae: VaeStage
    flow: tuple[FlowStage, ...]
    consistency: tuple[ConsistencyStage, ...] = ()
    trajectory: tuple[TrajectoryStage, ...] = ()
    adversarial: tuple[AdversarialStage, ...] = ()
    anchored: tuple[AnchoredStage, ...] = ()
    seed: int = 0
    sample_seconds: int = 10  # of sample video after each stage; 0 for none


DEMO = Recipe(
    vae=VaeStage(Optimiser(steps=900, batch=2, learning_rate=6e-4, weight_decay=0.0)),
    flow=(
        FlowStage(Optimiser(6000, batch=6, learning_rate=1.2e-3), blocks=2, previous_noise=0.08),
        FlowStage(Optimiser(12000, batch=4, learning_rate=1e-3), blocks=5, shift=2.5,
                  previous_noise=0.12, resampled=0.5),
        FlowStage(Optimiser(3000, batch=4, learning_rate=4e-4), blocks=5, shift=2.5,
                  previous_noise=0.12, resampled=0.5, forced=0.5),
    ),
    trajectory=(
        TrajectoryStage(Optimiser(900, batch=4, learning_rate=3e-4), blocks=5,
                        previous_noise=0.12),
        TrajectoryStage(Optimiser(600, batch=4, learning_rate=3e-4), blocks=5,
                        previous_noise=0.12, worn=0.75),
    ),
    adversarial=(_demo_game(150, 0), _demo_game(350, 30)),
    # each streams its own flights
    anchored=(_demo_anchored(600, 2e-4), _demo_anchored(600, 2e-4), _demo_anchored(600, 1e-4)),
)  # fmt: skip


def _judged(recipe: Recipe, attention: str, logits: str) -> Recipe:
    games = (replace(game, attention=attention, logits=logits) for game in recipe.adversarial)
    return replace(recipe, adversarial=tuple(games))


def _adamw(steps: int, batch: int) -> Optimiser:
    return Optimiser(steps, 1, 1e-5, betas=(0.9, 0.95), ema=0.0, floor=1.0, accumulate=batch)


def _paper_flow(steps: int, batch: int, blocks: int) -> FlowStage:
    return FlowStage(_adamw(steps, batch), blocks, shift=24.0, previous_noise=0.0, far_sink=0.0,
                     one_time=True, velocity=True)  # fmt: skip


def _paper_game(rate: float, accumulate: int, extensions: int) -> AdversarialStage:
    optimiser = gan(500, 1, rate, accumulate=accumulate)
    return AdversarialStage(optimiser, 60, discriminator_rate=rate, extensions=extensions)


# The paper's own numbers, for models of its size and hundreds of GPUs (App. B). What it leaves open
# is the demo's.
PAPER = Recipe(
    vae=DEMO.vae,
    flow=(_paper_flow(20_000, 256, blocks=29), _paper_flow(4_000, 32, blocks=89)),
    consistency=(ConsistencyStage(_adamw(5_000, 32), blocks=89, shift=24.0, far_sink=0.0),),
    adversarial=(_paper_game(3e-6, 256, 0), _paper_game(1e-5, 64, 1), _paper_game(1e-5, 64, 5)),
)

_DISTILLED = ConsistencyStage(
    Optimiser(steps=2000, batch=4, learning_rate=2e-4), blocks=5, shift=2.5, previous_noise=0.12
)
RECIPES = {
    "demo": DEMO,
    "demo-causal": _judged(DEMO, "causal", "frame"),
    "demo-clip": _judged(DEMO, "causal", "clip"),
    "demo-consistency": replace(DEMO, consistency=(_DISTILLED,), trajectory=DEMO.trajectory[1:]),
    # with --distilled: colour that holds, for any one-step generator
    "demo-anchored": replace(DEMO, adversarial=()),
    "demo-bidirectional-clip": _judged(DEMO, "bidirectional", "clip"),
    "paper": PAPER,
}


def named(name: str) -> Recipe:
    """Return a recipe by its name. Raises UsageError if it does not exist."""
    if name not in RECIPES:
        raise UsageError(f"recipe {name!r} does not exist", f"recipes: {', '.join(RECIPES)}")
    return RECIPES[name]
