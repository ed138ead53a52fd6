"""Compare the choices of the adversarial stage: one generator trained with each.

They are judged side by side. Resumable; writes a record at the end.

    python bench/ablations.py LATENTS OUT --from ADAPTED --distilled ONE_STEP
    python bench/ablations.py LATENTS OUT --from ADAPTED --distilled ONE_STEP \\
        --variants horizon-0 --train-only     # to be judged later

    heads       what a logit sees, causal or bidirectional, and what it is about, a frame or the
                clip; the paper's is causal, about a frame
    horizons    streams of up to 0, 6 or 24 segments of a second before the one that is judged
    recycling   a generator that gets no recycled latent after its first block, as in the paper's
                ablation, and one that does; both are first taught by regression along their own
                rollouts, because without its input the one-step generator knows nothing

LATENTS is the cache of a training run (`latents.safetensors`). The checkpoints are those before
its adversarial stages: `checkpoint-adapted` and the last `checkpoint-trajectory`. A CPU does best
with several processes of one thread each (OMP_NUM_THREADS=1) and variants of their own.
"""

import argparse
import dataclasses
import datetime
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from aapt_deploy.backends.torch_eager import EagerEngines
from aapt_deploy.models import checkpoint
from aapt_deploy.models.aapt.discriminator import Discriminator
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.train.judge import evaluate
from aapt_deploy.train.loop import Learner, StepProgress, fit, fit_together
from aapt_deploy.train.losses.adversarial import ForcedRollout, adversarial_update
from aapt_deploy.train.losses.flow import Latents
from aapt_deploy.train.losses.trajectory import rounded
from aapt_deploy.train.processes import Setup, has_bf16
from aapt_deploy.train.recipe import DEMO, AdversarialStage, Optimiser, gan

ROOT = Path(__file__).parent.parent
SETUP = Setup(bf16=has_bf16("cpu"))
SEED = 11


@dataclass(frozen=True)
class Variant:
    attention: str = "bidirectional"
    logits: str = "frame"
    horizon: int = 6  # largest number of segments before the one that is judged
    recycles: bool = True
    taught: bool = False  # by regression first


VARIANTS = {
    "bidirectional-frame": Variant(),
    "causal-frame": Variant(attention="causal"),
    "bidirectional-clip": Variant(logits="clip"),
    "causal-clip": Variant(attention="causal", logits="clip"),
    "horizon-0": Variant(horizon=0),
    "horizon-24": Variant(horizon=24),
    "recycled": Variant(taught=True),
    "unrecycled": Variant(taught=True, recycles=False),
}


class Unrecycled(Generator):
    """A generator without the recycled latent after the first block.

    The past reaches it through the cache alone.
    """

    def step(self, noisy: Tensor, previous: Tensor, condition: Tensor, t: Tensor,
             rope_time: Tensor, k_cache: list[Tensor], v_cache: list[Tensor],
             cache_len: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
        if int(cache_len[0]) > self.profile.text.tokens:
            previous = torch.zeros_like(previous)
        return super().step(noisy, previous, condition, t, rope_time, k_cache, v_cache, cache_len)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def generator_of(path: Path, variant: Variant) -> Generator:
    held = checkpoint.load(path).generator
    generator = Generator(held.profile) if variant.recycles else Unrecycled(held.profile)
    generator.load_state_dict(held.state_dict())
    return generator


def stage_of(variant: Variant, options: argparse.Namespace) -> AdversarialStage:
    stage = replace(
        DEMO.adversarial[-1],
        optimiser=gan(options.updates, 4, options.rate, clip_norm=5.0),
        head_start=options.head_start,
    )
    return replace(
        stage,
        attention=variant.attention,
        logits=variant.logits,
        unjudged=variant.horizon,
        penalty_every=options.penalty_every,
    )


def teach(
    generator: Generator,
    latents: Latents,
    stage: AdversarialStage,
    state: Path,
    told: StepProgress,
    updates: int,
) -> None:
    """Regress the generator's own rollouts onto true clips, with gradient through the cache."""

    def loss(rng: torch.Generator) -> Tensor:
        real = latents.clips(stage.optimiser.batch, stage.blocks, rng)
        made = ForcedRollout(generator, real.frames[:, 0], real.text, stage, rng).extend(
            real.condition
        )
        return rounded((made - real.frames[:, 1:]) / generator.step_spread)

    optimiser = Optimiser(updates, stage.optimiser.batch, 3e-4, 30, ema=0.99)
    generator.load_state_dict(
        fit(generator, loss, optimiser, state, SEED, told, SETUP), strict=False
    )


def play(
    generator: Generator,
    adapted: Generator,
    latents: Latents,
    stage: AdversarialStage,
    state: Path,
    told: Callable[[int, float], None],
) -> None:
    """The adversarial stage."""
    torch.manual_seed(SEED)  # of the discriminator's heads
    discriminator = Discriminator(generator.profile, stage.attention, stage.logits)
    discriminator.start_from(adapted)
    learners = [Learner("generator", generator, stage.optimiser)]
    learners.append(
        Learner(
            "discriminator",
            discriminator,
            replace(stage.optimiser, learning_rate=stage.discriminator_rate),
        )
    )

    def update(rng: torch.Generator, step: int, scale: float) -> dict[str, Tensor]:
        return adversarial_update(generator, discriminator, latents, stage, rng, step, scale)

    fit_together(learners, update, stage.optimiser, state, SEED, told, SETUP)
    generator.load_state_dict(learners[0].averaged(), strict=False)


def how(variant: Variant, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that a variant is made from, as the record says it."""
    made = {
        "variant": dataclasses.asdict(variant),
        "stage": dataclasses.asdict(stage_of(variant, options)), "seed": SEED,
        "regression_updates": options.regression if variant.taught else 0,
        "from": {name: checkpoint.stored(getattr(options, name)).sha256
                 for name in ("adapted", "distilled")},
    }  # fmt: skip
    same: dict[str, Any] = json.loads(json.dumps(made))
    return same


def trained(name: str, variant: Variant, latents: Latents, options: argparse.Namespace) -> Path:
    """Return the checkpoint of one variant, made now unless it is there.

    Exit if `options.out` has one that was made otherwise.
    """
    path, told_how = options.out / f"{name}.safetensors", options.out / f"{name}.json"
    wanted = how(variant, options)
    if told_how.exists() and json.loads(told_how.read_text()) != wanted:
        sys.exit(
            f"error: {name} in {options.out} was made, or begun, otherwise than these options say\n"
            f"hint: {told_how} tells how; or give another OUT"
        )
    told_how.write_text(json.dumps(wanted, indent=1))
    if path.exists():
        return path
    told: Callable[[str], StepProgress] = lambda what: (
        lambda step, loss: say(f"{name}, {what}: {step} updates, loss {loss:.4f}")
    )
    held, generator, stage = (
        checkpoint.load(options.distilled),
        generator_of(options.distilled, variant),
        stage_of(variant, options),
    )
    if variant.taught:
        teach(
            generator,
            latents,
            stage,
            options.out / f"{name}-taught.state",
            told("regression"),
            options.regression,
        )
    play(
        generator,
        checkpoint.load(options.adapted).generator,
        latents,
        stage,
        options.out / f"{name}-played.state",
        told("adversarial"),
    )
    checkpoint.save(
        path, held.profile, generator.eval(), held.vae, {"stage": name}, held.start_frames
    )
    return path


def candidate(path: Path, variant: Variant) -> evaluate.Candidate:
    held = checkpoint.load(path)
    held = replace(held, generator=generator_of(path, variant))
    return evaluate.Candidate(
        held.profile, held.sha256, lambda: EagerEngines(held, torch.get_num_threads(), "fp32")
    )


def curve(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("latents", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--from", dest="adapted", type=Path, required=True)
    parser.add_argument("--distilled", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--train-only", action="store_true", help="train, and stop")
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument(
        "--rate",
        type=float,
        default=DEMO.adversarial[-1].optimiser.learning_rate,
        help="of the generator",
    )
    parser.add_argument("--head-start", type=int, default=40)
    parser.add_argument("--penalty-every", type=int, default=1)
    parser.add_argument(
        "--regression",
        type=int,
        default=400,
        help="updates of the two variants that are taught first",
    )
    parser.add_argument("--flights", type=int, default=12)
    parser.add_argument("--seconds", type=int, default=60)
    today = datetime.date.today().isoformat()
    parser.add_argument(
        "--record", type=Path, default=ROOT / "docs" / "measurements" / f"ablations-{today}.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    options.out.mkdir(parents=True, exist_ok=True)
    held = load_file(options.latents)
    latents = Latents(held["z"], held["conditions"], held["tokens"])
    chosen = {name: VARIANTS[name] for name in options.variants}
    paths = {name: trained(name, variant, latents, options) for name, variant in chosen.items()}
    if options.train_only:
        return
    candidates = {"distilled": candidate(options.distilled, Variant())} | {
        name: candidate(path, VARIANTS[name]) for name, path in paths.items()
    }
    judged = evaluate.judge(
        candidates, options.out / "evaluation", options.flights, options.seconds, say
    )
    record = {
        "what": "heads and horizons of the adversarial stage, and input recycling, "
                "from one generator",
        "date": today,
        "versions": {"torch": torch.__version__.split("+")[0]},
        "clips": len(latents.z),
        "variants": {name: json.loads((options.out / f"{name}.json").read_text())
                     for name in chosen},
        "curves": {path.stem: curve(path) for path in sorted(options.out.glob("*.jsonl"))},
        "evaluation": judged,
    }  # fmt: skip
    options.record.write_text(json.dumps(record, indent=1) + "\n")
    say(f"record: {options.record}")
    windows: dict[str, list[dict[str, Any]]] = {
        name: [result["windows"][i] for i in (0, -1)] for name, result in judged["made"].items()
    }
    print(
        json.dumps(
            {
                n: {
                    key: [w[key] for w in pair]
                    for key in ("sharpness", "dynamics", "colour", "distance")
                }
                for n, pair in windows.items()
            }
        )
    )


if __name__ == "__main__":
    main()
