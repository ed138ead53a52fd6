"""A whole training run: linear fits, cached latents, the VAE's decoder, the generator's stages, one checkpoint.

Every part leaves its result in the run's folder and is skipped when it is there, so a run that was killed goes on where it stopped.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from aapt_deploy import __version__
from aapt_deploy.errors import CheckpointError, InputError
from aapt_deploy.machine import machine
from aapt_deploy.models import checkpoint
from aapt_deploy.models.checkpoint import StartFrame
from aapt_deploy.models.generator import Generator
from aapt_deploy.models.vae import Vae, from_pixels
from aapt_deploy.profiles import CONDITION_CHANNELS, Profile
from aapt_deploy.prompts import parse
from aapt_deploy.train.data import VALIDATION_SEED, ClipFile, clip_files, conditions
from aapt_deploy.train.flow import Latents, flow_loss
from aapt_deploy.train.loop import fit
from aapt_deploy.train.recipe import FlowStage, Recipe
from aapt_deploy.train.student_forcing import forced_flow_loss
from aapt_deploy.train.vae_stage import Snippets, fit_linear, vae_loss
from aapt_deploy.train.worlds import World, fly

Report = Callable[[str], None]

# Start frames that a demo checkpoint brings: name -> (world seed, prompt). The worlds were not trained on.
STARTS = {
    "desert-dusk": (VALIDATION_SEED + 900, "desert in summer at dusk, clear"),
    "mountains-dawn": (VALIDATION_SEED + 911, "mountains in autumn at dawn, clear"),
    "islands-noon": (VALIDATION_SEED + 902, "islands in summer at noon, cloudy"),
    "forest-noon": (VALIDATION_SEED + 913, "forest in spring at noon, clear"),
    "mountains-winter": (VALIDATION_SEED + 914, "mountains in winter at noon, clear"),
}


def train(data: Path, run: Path, profile: Profile, recipe: Recipe, report: Report) -> Path:
    """Train everything that `run` does not hold yet. Returns the checkpoint's path.

    Raises InputError for a data folder without clips and CheckpointError for a damaged part of an earlier run.
    """
    run.mkdir(parents=True, exist_ok=True)
    skipped: list[str] = []

    def skip(path: Path, reason: str) -> None:
        if path.name in skipped:  # each part of the run meets it again
            return
        skipped.append(path.name)
        report(f"skipped clip {path.name}: {reason} ({len(skipped)} so far)")

    began = time.monotonic()
    clips = clip_files(data, skip)
    torch.manual_seed(recipe.seed)
    generator, vae = Generator(profile), Vae(profile)
    _part(run / "vae-linear.safetensors", vae, lambda: _fit(vae, clips, profile, recipe, report))
    latents = cached_latents(run / "latents.safetensors", vae, clips, profile, report)
    _part(run / "vae.safetensors", vae, lambda: _train_vae(vae, clips, profile, recipe, run, report))
    for number, stage in enumerate(recipe.flow, start=1):
        part = run / f"generator-{number}.safetensors"
        _part(part, generator, partial(_train_generator, generator, latents, stage, recipe.seed + number, run, number, report))
    record: dict[str, object] = {
        "clips": len(clips), "skipped": len(skipped), "seconds_this_run": round(time.monotonic() - began), "machine": machine(),
        "recipe": repr(recipe), "versions": {"aapt_deploy": __version__, "torch": torch.__version__.split("+")[0]},
    }  # fmt: skip
    path = run / "checkpoint.safetensors"
    checkpoint.save(path, profile, generator.eval(), vae.eval(), record, start_frames(profile))
    (run / "record.json").write_text(json.dumps(record, indent=1))
    return path


def _part(path: Path, module: torch.nn.Module, make: Callable[[], None]) -> None:
    """Run `make`, which trains `module`, unless `path` already holds its result. Raises CheckpointError if that is damaged."""
    if path.exists():
        try:
            module.load_state_dict(load_file(path))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"part {path} of an earlier run cannot be used: {error}", "delete it to train this part again") from None
        return
    make()
    save_file({name: t.contiguous() for name, t in module.state_dict().items()}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def _fit(vae: Vae, clips: list[ClipFile], profile: Profile, recipe: Recipe, report: Report) -> None:
    report("fitting the VAE's linear paths")
    kept = fit_linear(vae, clips, profile, recipe.seed)
    report(f"the latent keeps {100 * kept:.2f} % of the pixels' variance")


def cached_latents(path: Path, vae: Vae, clips: list[ClipFile], profile: Profile, report: Report) -> Latents:
    """All clips as latents, from the cache if it was made with this encoder and these clips."""
    names = "".join(clip.path.name for clip in clips).encode()
    key = hashlib.sha256(names + b"".join(t.numpy().tobytes() for t in vae.encoder.state_dict().values())).hexdigest()
    with contextlib.suppress(SafetensorError, OSError, KeyError):  # none yet, or damaged: made again
        held = load_file(path)
        if bytes(held.pop("key").tolist()).hex() == key:
            return Latents(**held)
    latents: Latents | None = None
    used = 0
    for index, clip in enumerate(clips):
        arrays = clip.read(profile)
        if arrays is not None:
            with torch.no_grad():
                z = vae.encode(from_pixels(torch.from_numpy(arrays["frames"]))[None])[0]
            if latents is None:  # one allocation for all: many small ones between large ones would scatter the heap
                latents = _empty_latents(len(clips), z, profile)
            if z.shape == latents.z.shape[1:]:
                latents.z[used], latents.tokens[used] = z, torch.from_numpy(arrays["tokens"])
                latents.conditions[used] = torch.from_numpy(conditions(profile, arrays["poses"]))
                used += 1
            else:
                clip.skip(clip.path, f"{len(z)} latent frames, the first clip has {latents.z.shape[1]}")
        report(f"encoding clips: {index + 1} of {len(clips)}")
    if latents is None:
        raise InputError("no clip of the data folder can be read", "make one with: aapt train data FOLDER")
    latents = Latents(latents.z[:used], latents.conditions[:used], latents.tokens[:used])
    save_file({**vars(latents), "key": torch.tensor(list(bytes.fromhex(key)), dtype=torch.uint8)}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)
    return latents


def _empty_latents(clips: int, z: Tensor, profile: Profile) -> Latents:
    """Room for `clips` clips like z [1 + m, C, h, w], in float16."""
    conditions_shape = (clips, len(z) - 1, CONDITION_CHANNELS, *z.shape[2:])
    return Latents(
        torch.empty(clips, *z.shape, dtype=torch.float16), torch.empty(conditions_shape, dtype=torch.float16),
        torch.empty(clips, profile.text.tokens, dtype=torch.int64),
    )  # fmt: skip


def _train_vae(vae: Vae, clips: list[ClipFile], profile: Profile, recipe: Recipe, run: Path, report: Report) -> None:
    stage, snippets = recipe.vae, Snippets(clips, profile)
    trains_encoder = bool(profile.vae.encoder_channels)
    for parameter in vae.encoder.parameters():
        parameter.requires_grad_(trains_encoder)
    for parameter in vae.decoder.linear.parameters():  # Adam's noise costs the closed-form solution more than training it gains
        parameter.requires_grad_(False)
    average = fit(
        vae, lambda rng: vae_loss(vae, stage, lambda r: snippets.draw(stage, r), rng), stage.optimiser, run / "vae.state", recipe.seed,
        lambda step, loss: report(f"VAE: {step} of {stage.optimiser.steps} updates, loss {loss:.4f}"),
    )  # fmt: skip
    vae.load_state_dict(average, strict=False)


def generator_loss(generator: Generator, latents: Latents, stage: FlowStage, rng: torch.Generator) -> Tensor:
    """One update's loss: along the generator's own rollout in a share `stage.forced` of the updates, else under teacher forcing."""
    forced = float(torch.rand((), generator=rng)) < stage.forced
    batch = latents.draw(generator.profile, stage, rng)
    return forced_flow_loss(generator, batch, stage, rng) if forced else flow_loss(generator, batch, stage, rng)


def _train_generator(generator: Generator, latents: Latents, stage: FlowStage, seed: int, run: Path, number: int, report: Report) -> None:
    generator.step_spread.copy_(latents.step_spread())
    average = fit(
        generator, lambda rng: generator_loss(generator, latents, stage, rng), stage.optimiser,
        run / f"generator-{number}.state", seed,
        lambda step, loss: report(f"generator stage {number}: {step} of {stage.optimiser.steps} updates, loss {loss:.4f}"),
    )  # fmt: skip
    generator.load_state_dict(average, strict=False)


def start_frames(profile: Profile) -> dict[str, StartFrame]:
    """The demo's start frames, rendered at the profile's size."""
    frames = {}
    for name, (seed, prompt) in STARTS.items():
        world = World(seed, parse(prompt), profile.video.width, profile.video.height)
        clip = fly(world, np.random.default_rng((seed, 2)), blocks=1)
        frames[name] = StartFrame(torch.from_numpy(clip.frames[0].copy()), prompt)
    return frames
