"""Measure what each discriminator head notices, and write a record.

Each is trained alone against one fixed generator, then sees clips that stand still or crawl.

    python bench/heads.py LATENTS --from ADAPTED --distilled ONE_STEP [--updates 60]

LATENTS is the cache of a training run (`latents.safetensors`), whose last clips are held out. For
each head and each kind of clip: by how many deviations of its logits of true clips a clip's mean
logit lies below theirs, and in how many pairs it does. A published criticism of causal
discriminators with a logit per frame is that they reward still video; `bench/ablations.py` trains
the generator with each head, which takes hours.
"""

import argparse
import dataclasses
import datetime
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from aapt_deploy.measure.machine import machine
from aapt_deploy.models import checkpoint
from aapt_deploy.models.aapt.discriminator import Discriminator
from aapt_deploy.train.draws import numbers
from aapt_deploy.train.loop import Learner, fit_together
from aapt_deploy.train.losses.adversarial import ForcedRollout, adversarial_update
from aapt_deploy.train.losses.flow import Clips, Latents
from aapt_deploy.train.processes import Setup, has_bf16
from aapt_deploy.train.recipe import DEMO, gan

ROOT = Path(__file__).parent.parent
HELD_OUT = 100  # clips
HEADS = [
    (attention, logits) for attention in ("causal", "bidirectional") for logits in ("frame", "clip")
]


def kinds(real: Clips, made: torch.Tensor) -> dict[str, torch.Tensor]:
    """Frames [B, 1 + n, C, h, w] of each kind, from the same first frame under the same camera."""
    true = real.frames
    half = true[:, torch.arange(true.shape[1]) // 2]
    slow = (half + true[:, (torch.arange(true.shape[1]) + 1) // 2]) / 2
    return {"made": made, "still": true[:, :1].expand_as(true), "half speed": slow}


@torch.no_grad()
def judged(
    discriminator: Discriminator, latents: Latents, generator: Any, stage: Any
) -> dict[str, dict[str, float]]:
    logits: dict[str, list[torch.Tensor]] = {}
    for batch in range(12):
        rng = numbers(77, batch, 0)
        real = latents.clips(8, stage.blocks, rng)
        made = ForcedRollout(generator, real.frames[:, 0], real.text, stage, rng).extend(
            real.condition
        )
        frames = {"true": real.frames, **kinds(real, torch.cat([real.frames[:, :1], made], dim=1))}
        t = torch.rand(8, generator=rng)
        for name, clip in frames.items():
            logits.setdefault(name, []).append(
                discriminator(clip, real.condition, t, real.text).float().mean(1)
            )
    each = {name: torch.cat(parts) for name, parts in logits.items()}
    true = each.pop("true")
    return {
        name: {
            "deviations_below": round(float((true - x).mean() / true.std()), 3),
            "pairs_below": round(float((x < true).float().mean()), 3),
        }
        for name, x in each.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("latents", type=Path)
    parser.add_argument("--from", dest="adapted", type=Path, required=True)
    parser.add_argument("--distilled", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=60)
    options = parser.parse_args()
    held = load_file(options.latents)
    part = lambda rows: Latents(held["z"][rows], held["conditions"][rows], held["tokens"][rows])
    taught, kept = part(slice(None, -HELD_OUT)), part(slice(-HELD_OUT, None))
    adapted, generator = (
        checkpoint.load(options.adapted).generator,
        checkpoint.load(options.distilled).generator,
    )
    found, setup = {}, Setup(bf16=has_bf16("cpu"))
    for attention, logits in HEADS:
        rate = gan(options.updates, 4, DEMO.adversarial[0].discriminator_rate, clip_norm=5.0)
        stage = dataclasses.replace(
            DEMO.adversarial[0],
            optimiser=rate,
            attention=attention,
            logits=logits,
            head_start=options.updates,
        )
        torch.manual_seed(1)
        discriminator = Discriminator(generator.profile, attention, logits)
        discriminator.start_from(adapted)
        update = lambda rng, step, scale, d=discriminator, s=stage: adversarial_update(
            generator, d, taught, s, rng, step, scale
        )
        told = lambda step, loss, name=f"{attention}, a logit per {logits}": print(
            f"{name}: {step}, loss {loss:.4f}", file=sys.stderr, flush=True
        )
        with TemporaryDirectory() as folder:
            fit_together(
                [Learner("", discriminator, rate)],
                update,
                rate,
                Path(folder) / "head.state",
                5,
                told,
                setup,
            )
        with setup.autocast():
            found[f"{attention}, a logit per {logits}"] = judged(
                discriminator, kept, generator, stage
            )
        print(list(found.items())[-1], file=sys.stderr, flush=True)
    today = datetime.date.today().isoformat()
    record = {
        "what": "what discriminator heads notice", "date": today, "machine": machine(),
        "updates": options.updates, "clips": 96, "seed": 1,
        "from": {"adapted": checkpoint.load(options.adapted).sha256,
                 "distilled": checkpoint.load(options.distilled).sha256},
        "heads": found,
    }  # fmt: skip
    out = ROOT / "docs" / "measurements" / f"heads-{today}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"record: {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
