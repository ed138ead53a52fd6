"""What the choices of the adversarial stage do: the same generator trained with each, judged side by side. Resumable; a record at the end.

    python bench/ablations.py CLIPS OUT --from ADAPTED --distilled ONE_STEP

    frame, clip             a logit per frame, or one per clip
    causal, bidirectional   what a logit may look at
    short, long             first segments alone, or streams of up to `--unjudged` segments before the one that is judged
    unrecycled              not a discriminator's choice: the one-step generator taught again, by regression, to do without the recycled latent

The two checkpoints are those of a run before its adversarial stages: `checkpoint-adapted` and the last `checkpoint-trajectory`.
"""

import argparse
import dataclasses
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from aapt_deploy import profiles
from aapt_deploy.models import checkpoint
from aapt_deploy.models.generator import Generator
from aapt_deploy.train import evaluate, stages
from aapt_deploy.train.flow import Latents
from aapt_deploy.train.loop import fit
from aapt_deploy.train.recipe import DEMO, AdversarialStage, Optimiser, Recipe, TrajectoryStage
from aapt_deploy.train.setup import Setup
from aapt_deploy.train.trajectory import trajectory_loss

ROOT = Path(__file__).parent.parent
VARIANTS: dict[str, dict[str, Any]] = {
    "bidirectional-frame-long": {"attention": "bidirectional", "logits": "frame"},
    "causal-frame-long": {"attention": "causal", "logits": "frame"},
    "bidirectional-clip-long": {"attention": "bidirectional", "logits": "clip"},
    "bidirectional-frame-short": {"attention": "bidirectional", "logits": "frame", "unjudged": 0},
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def trained(name: str, stage: AdversarialStage, options: argparse.Namespace) -> Path:
    """The checkpoint of one variant, made now unless it is there. Clips are encoded once for all."""
    run = options.out / name
    run.mkdir(parents=True, exist_ok=True)
    latents, shared = run / "latents.safetensors", options.out / "latents.safetensors"
    if shared.exists() and not latents.exists():
        os.link(shared, latents)
    start, recipe = stages.Start(options.adapted, options.distilled), Recipe(DEMO.vae, flow=(), adversarial=(stage,), sample_seconds=0)
    began, last = time.monotonic(), [""]

    def report(text: str) -> None:
        last[0] = text
        if not text.startswith("encoding"):
            say(f"{name}: {text}")

    path = stages.train(options.clips, run, profiles.load("demo-cpu"), recipe, report, Setup(bf16=True), start)
    if not shared.exists():
        os.link(latents, shared)
    say(f"{name}: {time.monotonic() - began:.0f} s; {last[0]}")
    return path.rename(options.out / f"{name}.safetensors")


def forget_recycled(generator: Generator) -> None:
    """Make `generator` blind to the recycled latent, for good: no weight reads it, and the skip takes it off the answer, which starts from it.

    At time 1, the only one of a one-step generator, nothing else depends on it.
    """
    c, patch, halo = generator.profile.video.latent_channels, generator.profile.model.patch, generator.profile.model.halo
    with torch.no_grad():
        generator.visual_in.weight[:, c : 2 * c] = 0
        generator.skip.weight[:, c : 2 * c] = 0
        for channel in range(c):
            for y in range(patch):
                for x in range(patch):
                    out = channel * patch**2 + y * patch + x
                    generator.skip.weight[out, c + channel, halo + y, halo + x] = -1 / generator.step_spread[channel, 0, 0]
    mask = torch.ones(2 * c + 6)
    mask[c : 2 * c] = 0
    for weight in (generator.visual_in.weight, generator.skip.weight):
        weight.register_hook(lambda grad: grad * mask[:, None, None])


def unrecycled(options: argparse.Namespace) -> Path:
    """The one-step generator without input recycling; past frames still reach it through the cache."""
    path = options.out / "unrecycled.safetensors"
    if path.exists():
        return path
    held, teacher = checkpoint.load(options.distilled), checkpoint.load(options.adapted).generator
    latents = load_file(options.out / "latents.safetensors")
    clips = Latents(latents["z"], latents["conditions"], latents["tokens"])
    stage = TrajectoryStage(Optimiser(options.regression, 4, 3e-4, 30, weight_decay=0.0, ema=0.995), blocks=5)
    forget_recycled(held.generator.train())

    def loss(rng: torch.Generator) -> torch.Tensor:
        batch = clips.draw(held.profile, stage, rng)
        return trajectory_loss(held.generator, teacher, batch, stage, torch.ones(held.profile.video.latent_channels), rng)

    told = lambda step, value: say(f"unrecycled: {step} of {options.regression} updates, loss {value:.4f}")
    state = options.out / "unrecycled.state"
    held.generator.load_state_dict(fit(held.generator, loss, stage.optimiser, state, 7, told, Setup(bf16=True)), strict=False)
    checkpoint.save(path, held.profile, held.generator.eval(), held.vae, {"stage": "unrecycled"}, held.start_frames)
    return path


def curve(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("clips", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--from", dest="adapted", type=Path, required=True)
    parser.add_argument("--distilled", type=Path, required=True)
    parser.add_argument(
        "--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="of the adversarial stage; the rest is made in any case"
    )
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--regression", type=int, default=400, help="updates of the generator without recycling")
    parser.add_argument("--head-start", type=int, default=40)
    parser.add_argument("--unjudged", type=int, default=24)
    parser.add_argument("--flights", type=int, default=12)
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    base = dataclasses.replace(DEMO.adversarial[-1], head_start=options.head_start, unjudged=options.unjudged)
    base = dataclasses.replace(base, optimiser=dataclasses.replace(base.optimiser, steps=options.updates))
    made = {name: dataclasses.replace(base, **VARIANTS[name]) for name in options.variants}
    paths = [options.distilled]
    for name, stage in made.items():
        path = options.out / f"{name}.safetensors"
        paths.append(path if path.exists() else trained(name, stage, options))
    paths.append(unrecycled(options))
    judged = evaluate.evaluate(paths, options.out / "evaluation", options.flights, options.seconds, "torch", None, say)
    record = {
        "what": "heads and horizons of the adversarial stage, from one generator", "date": datetime.date.today().isoformat(),
        "machine": judged["machine"], "versions": {"torch": torch.__version__.split("+")[0]}, "from": checkpoint.load(options.distilled).sha256,
        "stages": {name: dataclasses.asdict(stage) for name, stage in made.items()},
        "curves": {name: curve(options.out / name / "adversarial-1.jsonl") for name in made},
        "regression": curve(options.out / "unrecycled.jsonl"), "evaluation": judged,
    }  # fmt: skip
    out = ROOT / "docs" / "measurements" / f"ablations-{record['date']}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")
    say(f"record: {out}")
    windows = {name: [result["windows"][i] for i in (0, -1)] for name, result in judged["made"].items()}
    print(
        json.dumps({name: {key: [w[key] for w in pair] for key in ("sharpness", "dynamics", "colour", "distance")} for name, pair in windows.items()})
    )


if __name__ == "__main__":
    main()
