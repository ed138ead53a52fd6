"""The numbers of the training stages, one frozen dataclass per kind of stage.

A run is a list of stages; `aapt train` resumes at the stage and step where it stopped. The demo checkpoint's values were chosen on two CPU
cores (docs/log.md); the paper's own values are in `docs/design.md`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Optimiser:
    steps: int  # updates of the stage
    batch: int  # clips per update
    learning_rate: float  # peak; linear warm-up, then a cosine to a hundredth
    warmup: int = 100  # updates
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    ema: float = 0.998  # decay of the averaged weights, which are what ships


@dataclass(frozen=True)
class VaeStage:
    """Train the decoder's convolutions on top of the closed-form linear paths; the encoder stays as PCA left it when it has no convolutions."""

    optimiser: Optimiser
    blocks: int = 2  # latent frames per training snippet
    latent_noise: float = 0.06  # deviation of noise on the latents: the generator's latents are not clean either
    gradient_weight: float = 1.0  # weight of the L1 on image gradients, which keeps edges


@dataclass(frozen=True)
class FlowStage:
    """Diffusion adaptation: flow matching with recycled input under the block-causal mask (AAPT App. B, stage 1)."""

    optimiser: Optimiser
    blocks: int  # blocks per sample after the sink
    shift: float = 1.5  # t -> shift t / (1 + (shift - 1) t)
    previous_noise: float = 0.15  # largest deviation of noise on the recycled latent
    resampled: float = 0.0  # share of the other updates whose history the generator made from noised truth (self-resampling)
    forced: float = 0.0  # share of updates along a rollout of the generator's own (student forcing)
    far_sink: float = 0.3  # share of samples whose sink is moved far into the past, for streams longer than a clip


@dataclass(frozen=True)
class Recipe:
    vae: VaeStage
    flow: tuple[FlowStage, ...]
    seed: int = 0


DEMO = Recipe(
    vae=VaeStage(Optimiser(steps=900, batch=2, learning_rate=6e-4, weight_decay=0.0)),
    flow=(
        FlowStage(Optimiser(steps=6000, batch=6, learning_rate=1.2e-3), blocks=2, previous_noise=0.08),
        FlowStage(Optimiser(steps=12000, batch=4, learning_rate=1e-3), blocks=5, shift=2.5, previous_noise=0.12, resampled=0.5),
        FlowStage(Optimiser(steps=3000, batch=4, learning_rate=4e-4), blocks=5, shift=2.5, previous_noise=0.12, resampled=0.5, forced=0.5),
    ),
)
