"""Run a whole training: VAE, latents, the generator's stages, and a checkpoint after each.

The generator's stages are those of AAPT's App. B: flow matching (flow.py), distillation to one
step (consistency.py), then student forcing under a discriminator and its long-video form
(adversarial.py). A run may also start from a checkpoint that replaces VAE and flow matching.

Every part writes its result into the run's folder and is skipped if it is there, so a killed run
resumes. run.json names what the folder was made from; a run with anything else is refused there.
"""

import contextlib
import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from aapt_deploy import __version__
from aapt_deploy.backends.trial import Report
from aapt_deploy.bundle.files import locked, whole
from aapt_deploy.errors import CheckpointError, UsageError
from aapt_deploy.measure.machine import machine
from aapt_deploy.models import checkpoint
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.prompts import PROMPT_TOKENS, parse
from aapt_deploy.models.aapt.vae import Vae
from aapt_deploy.models.checkpoint import StartFrame
from aapt_deploy.profiles import Profile
from aapt_deploy.train.latents import cached_latents
from aapt_deploy.train.loop import fit
from aapt_deploy.train.losses.flow import Latents
from aapt_deploy.train.losses.vae_stage import Snippets, fit_linear, vae_loss
from aapt_deploy.train.processes import ALONE, Setup, has_bf16
from aapt_deploy.train.recipe import Recipe
from aapt_deploy.train.samples import write_samples
from aapt_deploy.train.stages import GeneratorStages, Timesteps, part
from aapt_deploy.train.world.data import VALIDATION_SEED, ClipFile, clip_files
from aapt_deploy.train.world.worlds import World, fly

# Start frames of a demo checkpoint: name -> (world seed, prompt). No training clip shows the
# worlds.
STARTS = {
    "desert-dusk": (VALIDATION_SEED + 900, "desert in summer at dusk, clear"),
    "mountains-dawn": (VALIDATION_SEED + 911, "mountains in autumn at dawn, clear"),
    "islands-noon": (VALIDATION_SEED + 902, "islands in summer at noon, cloudy"),
    "forest-noon": (VALIDATION_SEED + 913, "forest in spring at noon, clear"),
    "mountains-winter": (VALIDATION_SEED + 914, "mountains in winter at noon, clear"),
}


@dataclass(frozen=True)
class WarmStart:
    """Checkpoints to start a run from."""

    adapted: Path  # VAE and generator after flow matching: that stage is skipped
    distilled: Path | None = None  # a one-step generator: distillation is skipped, too


@dataclass(frozen=True)
class Run:
    """One run: what it trains from what, and whom it reports to."""

    data: Path  # folder of clips
    folder: Path  # of the run: parts, training states, checkpoints, samples
    profile: Profile
    recipe: Recipe
    setup: Setup
    start: WarmStart | None
    report: Report  # gets progress
    warn: Report  # gets one line for each clip that cannot be used

    def networks(self) -> tuple[Generator, Vae]:
        """Return the start's networks, or new ones with the recipe's seed."""
        torch.manual_seed(self.recipe.seed)
        if self.start is None:
            return Generator(self.profile), Vae(self.profile)
        loaded = checkpoint.load(self.start.adapted)
        return loaded.generator.train(), loaded.vae

    def vae_part(self, name: str, vae: Vae, make: Callable[[], None]) -> None:
        """Run `make`, which trains the VAE, in the first process alone; skip it if done."""
        part(self.folder / f"{name}.safetensors", vae, make, self.setup, together=False)

    def train_vae(self, vae: Vae, clips: list[ClipFile]) -> Latents:
        """Train the VAE, unless the start brings it. Return all clips as latents."""
        if self.start is None:
            self.vae_part("vae-linear", vae, lambda: _fit_linear(self, vae, clips))
        path = self.folder / "latents.safetensors"
        encode = lambda: cached_latents(path, vae, clips, self.profile, self.report)
        latents = one_after_another(self.setup, encode)
        if self.start is None:
            self.vae_part("vae", vae, lambda: _train_vae(self, vae, clips))
        return latents

    def record(self, stage: str, clips: int, skipped: int, began: float) -> dict[str, object]:
        """Describe how the checkpoint of `stage` was made."""
        start = self.start and {n: path and path.name for n, path in vars(self.start).items()}
        return {
            "stage": stage,
            "clips": clips,
            "skipped": skipped,
            "seconds_this_run": round(time.monotonic() - began),
            "machine": machine(),
            "recipe": repr(self.recipe),
            "start": start,
            "versions": {"aapt_deploy": __version__, "torch": torch.__version__.split("+")[0]},
        }

    def write(self, stage: str, generator: Generator, vae: Vae, timesteps: Timesteps,
              record: dict[str, object]) -> Path:  # fmt: skip
        """Write checkpoint and samples of `stage` unless they are there. Return the checkpoint."""
        path = self.folder / f"checkpoint-{stage}.safetensors"
        if not self.setup.writes:
            return path
        if not _has_weights(path, generator, vae):  # else keep it: records name it by its hash
            profile, frames = _with_timesteps(self.profile, timesteps), start_frames(self.profile)
            checkpoint.save(path, profile, generator.eval(), vae.eval(), record, frames)
            _write_json(self.folder / "record.json", record, indent=1)
            _copy(path, self.latest)
        samples = self.folder / f"samples-{stage}"
        if self.recipe.sample_seconds and not samples.exists():
            self.report(f"streaming samples of stage {stage}")
            write_samples(path, samples, self.recipe.sample_seconds)
        return path

    @property
    def latest(self) -> Path:
        """The checkpoint of the last stage that is done."""
        return self.folder / "checkpoint.safetensors"


def train(data: Path, folder: Path, profile: Profile, recipe: Recipe, report: Report,
          setup: Setup = ALONE, start: WarmStart | None = None,
          warn: Report | None = None) -> Path:  # fmt: skip
    """Train all that `folder` lacks. Return the path of the last stage's checkpoint.

    `report` gets progress; `warn` (default: `report`) gets each clip that cannot be used. With
    `start`, the profile is that of its checkpoint.

    Raises InputError for a data folder without clips or a start that does not fit.
    Raises UsageError if clips have no prompts of the profile's kind, or for another run's folder.
    Raises BusyError if another process writes to `folder`.
    Raises CheckpointError if a part of an earlier run is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    warn = warn or report
    if not setup.writes:
        report = warn = _silence
    run = Run(data, folder, profile, recipe, setup, start, report, warn)
    with locked(folder, f"run {folder}") if setup.writes else contextlib.nullcontext():
        return _train(run)


def _train(run: Run) -> Path:
    began = time.monotonic()
    skipped: list[str] = []
    clips = clip_files(run.data, partial(_skip_once, skipped, run.warn))
    generator, vae = run.networks()
    run = dataclasses.replace(run, profile=generator.profile)
    _refuse_prompts(run.profile)
    _refuse_other_run(run)
    latents = run.train_vae(vae, clips)

    stages = GeneratorStages(
        generator.to(run.setup.device), latents, run.recipe, run.folder, run.report, run.setup
    )
    path, distilled = run.latest, run.start.distilled if run.start else None
    for stage, timesteps in stages.all(run.start is not None, distilled):
        record = run.record(stage, len(clips), len(skipped), began)
        path = run.write(stage, generator, vae, timesteps, record)
        generator.train()
        run.setup.wait()
    if run.setup.writes:
        _copy(path, run.latest)  # again: the run may have been killed between the two
    return run.latest


def _skip_once(skipped: list[str], warn: Report, path: Path, reason: str) -> None:
    """Warn of a clip once: each part of the run meets it again."""
    if path.name not in skipped:
        skipped.append(path.name)
        warn(f"skipped clip {path.name}: {reason} ({len(skipped)} so far)")


def _with_timesteps(profile: Profile, timesteps: Timesteps) -> Profile:
    """Return `profile` with another sampler's times; None keeps its own."""
    if timesteps is None:
        return profile
    return profile.replace(sampler=dataclasses.replace(profile.sampler, timesteps=timesteps))


def _has_weights(path: Path, generator: Generator, vae: Vae) -> bool:
    """Return whether the checkpoint at `path` has these weights."""
    try:
        stored = checkpoint.stored(path)
        return all(
            torch.equal(stored.tensor(f"{prefix}.{name}"), tensor.cpu().half().float())
            for prefix, module in (("generator", generator), ("vae", vae))
            for name, tensor in module.state_dict().items()
        )
    except CheckpointError:  # missing or damaged
        return False


def _copy(source: Path, target: Path) -> None:
    with whole(target) as temporary:
        shutil.copyfile(source, temporary)


def _write_json(path: Path, value: object, indent: int | None = None) -> None:
    with whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent))


def _refuse_prompts(profile: Profile) -> None:
    text = profile.text
    if text.tokens and (text.kind != "vocabulary" or text.tokens != PROMPT_TOKENS):
        raise UsageError(
            f"profile {profile.name} reads prompts of {text.tokens} tokens of kind {text.kind!r}; "
            f"clips hold the ids of {PROMPT_TOKENS} words",
            f'in its [text] set kind = "vocabulary" and tokens = {PROMPT_TOKENS}, '
            "or tokens = 0 to train without text",
        )


def _refuse_other_run(run: Run) -> None:
    """Write what `run` is made from into run.json, or compare with what is there.

    Raises UsageError if the folder was made from something else.
    """
    starts = vars(run.start).items() if run.start else ()
    hashes = {name: checkpoint.stored(path).sha256 for name, path in starts if path}
    profile, recipe = run.profile.dumps(), repr(run.recipe)
    wanted = {"profile": profile, "recipe": recipe, "start": json.dumps(hashes)}
    path = run.folder / "run.json"
    run.setup.wait()
    try:
        found = json.loads(path.read_text()) if path.exists() else wanted
    except ValueError as error:
        hint = "delete it if the run is yours to go on with"
        raise CheckpointError(f"{path} cannot be read: {error}", hint) from None
    if differing := [name for name, value in wanted.items() if found.get(name) != value]:
        raise UsageError(
            f"run {run.folder} was made with another {' and another '.join(differing)}",
            f"give another folder with --run, or ask for what {path} says; "
            f"to begin anew, delete {run.folder}",
        )
    run.setup.wait()  # all processes read before one writes
    if run.setup.writes and not path.exists():
        _write_json(path, wanted)


def _silence(text: str) -> None:
    """Drop the text: the first process reports for all."""


def one_after_another(setup: Setup, make: Callable[[], Latents]) -> Latents:
    """Run `make` in the first process, which writes a file, then in the others, which read it."""
    made = make() if setup.writes else None
    setup.wait()
    return make() if made is None else made


def _fit_linear(run: Run, vae: Vae, clips: list[ClipFile]) -> None:
    run.report("fitting the VAE's linear paths")
    kept = fit_linear(vae, clips, run.profile, run.recipe.seed)
    run.report(f"the latent keeps {100 * kept:.2f} % of the pixels' variance")


def _train_vae(run: Run, vae: Vae, clips: list[ClipFile]) -> None:
    stage, snippets, setup = run.recipe.vae, Snippets(clips, run.profile), run.setup
    vae.encoder.requires_grad_(bool(run.profile.vae.encoder_channels))
    vae.decoder.linear.requires_grad_(False)  # Adam's noise costs more than training it gains
    bf16 = setup.bf16 and (setup.device == "cpu" or has_bf16("cpu"))
    alone = dataclasses.replace(setup, device="cpu", bf16=bf16, mesh=None)

    def progress(step: int, loss: float) -> None:
        run.report(f"VAE: {step} of {stage.optimiser.steps} updates, loss {loss:.4f}")

    def loss(rng: torch.Generator) -> torch.Tensor:
        return vae_loss(vae, stage, lambda r: snippets.draw(stage, r), rng)

    state = run.folder / "vae.state"
    average = fit(vae, loss, stage.optimiser, state, run.recipe.seed, progress, alone)
    vae.load_state_dict(average, strict=False)


@functools.lru_cache(maxsize=1)  # every stage needs them, and five worlds take seconds
def start_frames(profile: Profile) -> dict[str, StartFrame]:
    """Render the demo's start frames at the profile's size."""
    frames = {}
    for name, (seed, prompt) in STARTS.items():
        world = World(seed, parse(prompt), profile.video.width, profile.video.height)
        clip = fly(world, np.random.default_rng((seed, 2)), blocks=1)
        frames[name] = StartFrame(torch.from_numpy(clip.frames[0].copy()), prompt)
    return frames
