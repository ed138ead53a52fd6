"""A whole training run: linear fits, cached latents, the VAE's decoder, the generator's stages, a checkpoint after each of those that can stream.

The generator's stages are those of AAPT's App. B: flow matching (flow.py), distillation to one step (consistency.py), student forcing under a
discriminator and its long-video form (adversarial.py). A run may also start from a checkpoint in the place of VAE and flow matching.

Every part leaves its result in the run's folder and is skipped when it is there, so a run that was killed goes on where it stopped. What the folder
was made from is written down in it (run.json), and a run with anything else is refused there.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from aapt_deploy import __version__
from aapt_deploy.bundle.files import locked, whole
from aapt_deploy.errors import CheckpointError, InputError, UsageError
from aapt_deploy.measure.machine import machine
from aapt_deploy.models import checkpoint
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.prompts import PROMPT_TOKENS, parse
from aapt_deploy.models.aapt.vae import Vae, from_pixels
from aapt_deploy.models.checkpoint import StartFrame
from aapt_deploy.profiles import CONDITION_CHANNELS, Profile
from aapt_deploy.train.loop import fit
from aapt_deploy.train.losses.flow import Latents
from aapt_deploy.train.losses.vae_stage import Snippets, fit_linear, vae_loss
from aapt_deploy.train.processes import ALONE, Setup, has_bf16
from aapt_deploy.train.recipe import Recipe
from aapt_deploy.train.samples import write_samples
from aapt_deploy.train.stages import GeneratorStages, part
from aapt_deploy.train.world.data import VALIDATION_SEED, ClipFile, clip_files, conditions
from aapt_deploy.train.world.worlds import World, fly

Report = Callable[[str], None]

# Start frames that a demo checkpoint brings: name -> (world seed, prompt). The worlds were not trained on.
STARTS = {
    "desert-dusk": (VALIDATION_SEED + 900, "desert in summer at dusk, clear"),
    "mountains-dawn": (VALIDATION_SEED + 911, "mountains in autumn at dawn, clear"),
    "islands-noon": (VALIDATION_SEED + 902, "islands in summer at noon, cloudy"),
    "forest-noon": (VALIDATION_SEED + 913, "forest in spring at noon, clear"),
    "mountains-winter": (VALIDATION_SEED + 914, "mountains in winter at noon, clear"),
}


@dataclass(frozen=True)
class Start:
    """Checkpoints to go on from."""

    adapted: Path  # VAE and generator after flow matching: that stage is skipped
    distilled: Path | None = None  # a one-step generator: distillation is skipped, too


def train(
    data: Path, run: Path, profile: Profile, recipe: Recipe, report: Report, setup: Setup = ALONE, start: Start | None = None,
    warn: Report | None = None,
) -> Path:  # fmt: skip
    """Train everything that `run` does not hold yet. Returns the path of the last stage's checkpoint; `run` holds one of each.

    `report` hears of progress, `warn` (default: `report`) of each clip that cannot be used.

    With `start`, the profile is that of its checkpoint. Raises InputError for a data folder without clips or a start that does not fit, UsageError
    for a profile whose prompts clips do not hold or a folder of another run, BusyError while another process writes there, and CheckpointError for
    a damaged part of an earlier run.
    """
    run.mkdir(parents=True, exist_ok=True)
    with locked(run, f"run {run}") if setup.writes else contextlib.nullcontext():
        heard = (report, warn or report) if setup.writes else (_silence, _silence)
        return _train(data, run, profile, recipe, heard, setup, start)


def _train(data: Path, run: Path, profile: Profile, recipe: Recipe, heard: tuple[Report, Report], setup: Setup, start: Start | None) -> Path:
    report, warn = heard
    skipped: list[str] = []

    def skip(path: Path, reason: str) -> None:
        if path.name in skipped:  # each part of the run meets it again
            return
        skipped.append(path.name)
        warn(f"skipped clip {path.name}: {reason} ({len(skipped)} so far)")

    began = time.monotonic()
    clips = clip_files(data, skip)
    torch.manual_seed(recipe.seed)
    if start is not None:
        held = checkpoint.load(start.adapted)
        profile, generator, vae = held.profile, held.generator.train(), held.vae
    else:
        generator, vae = Generator(profile), Vae(profile)
    _refuse_prompts(profile)
    _same_run(run, profile, recipe, start, setup)
    if start is None:
        part(run / "vae-linear.safetensors", vae, lambda: _fit(vae, clips, profile, recipe, report), setup, together=False)
    latents = one_after_another(setup, lambda: cached_latents(run / "latents.safetensors", vae, clips, profile, report))
    if start is None:
        part(run / "vae.safetensors", vae, lambda: _train_vae(vae, clips, profile, recipe, run, report, setup), setup, together=False)

    def record(stage: str) -> dict[str, object]:
        return {
            "stage": stage, "clips": len(clips), "skipped": len(skipped), "seconds_this_run": round(time.monotonic() - began), "machine": machine(),
            "recipe": repr(recipe), "start": start and {name: path and path.name for name, path in vars(start).items()},
            "versions": {"aapt_deploy": __version__, "torch": torch.__version__.split("+")[0]},
        }  # fmt: skip

    stages = GeneratorStages(generator.to(setup.device), latents, recipe, run, report, setup)
    path = made = run / "checkpoint.safetensors"
    for stage, timesteps in stages.all(start is not None, start.distilled if start else None):
        made = run / f"checkpoint-{stage}.safetensors"
        if setup.writes:
            if not _holds(made, generator, vae):  # else it stays as it is: records name it by its hash
                shipped = profile.replace(sampler=dataclasses.replace(profile.sampler, timesteps=timesteps or profile.sampler.timesteps))
                checkpoint.save(made, shipped, generator.eval(), vae.eval(), record(stage), start_frames(profile))
                (run / "record.json").write_text(json.dumps(record(stage), indent=1))
                _copy(made, path)
            if recipe.sample_seconds and not (run / f"samples-{stage}").exists():
                report(f"streaming samples of stage {stage}")
                write_samples(made, run / f"samples-{stage}", recipe.sample_seconds)
        generator.train()
        setup.wait()
    if setup.writes:
        _copy(made, path)  # once more, for a run that was killed between the two
    return path


def _holds(path: Path, generator: Generator, vae: Vae) -> bool:
    """Whether the checkpoint at `path` has these weights."""
    try:
        held = checkpoint.stored(path)
        parts = (("generator", generator), ("vae", vae))
        return all(
            torch.equal(held.tensor(f"{part}.{name}"), tensor.cpu().half().float())
            for part, module in parts
            for name, tensor in module.state_dict().items()
        )
    except CheckpointError:  # there is none, or it is damaged
        return False


def _copy(source: Path, target: Path) -> None:
    with whole(target) as temporary:
        shutil.copyfile(source, temporary)


def _refuse_prompts(profile: Profile) -> None:
    if profile.text.tokens and (profile.text.kind != "vocabulary" or profile.text.tokens != PROMPT_TOKENS):
        raise UsageError(
            f"profile {profile.name} reads prompts of {profile.text.tokens} tokens of kind {profile.text.kind!r}; "
            f"clips hold the ids of {PROMPT_TOKENS} words",
            f'in its [text] set kind = "vocabulary" and tokens = {PROMPT_TOKENS}, or tokens = 0 to train without text',
        )


def _same_run(run: Path, profile: Profile, recipe: Recipe, start: Start | None, setup: Setup) -> None:
    """Write down what `run` is made from, or compare. Raises UsageError for a folder that was made from something else."""
    starts = {name: checkpoint.stored(path).sha256 for name, path in vars(start).items() if path} if start else {}
    wanted = {"profile": profile.dumps(), "recipe": repr(recipe), "start": json.dumps(starts)}
    path = run / "run.json"
    setup.wait()
    try:
        held = json.loads(path.read_text()) if path.exists() else wanted
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "delete it if the run is yours to go on with") from None
    if differing := [name for name, value in wanted.items() if held.get(name) != value]:
        raise UsageError(
            f"run {run} was made with another {' and another '.join(differing)}",
            f"give another folder with --run, or ask for what {path} says; to begin anew, delete {run}",
        )
    setup.wait()  # all look before one writes
    if setup.writes and not path.exists():
        with whole(path) as temporary:
            temporary.write_text(json.dumps(wanted, indent=1))


def _silence(text: str) -> None:
    """The other processes have nothing to say that the first one does not."""


def one_after_another(setup: Setup, make: Callable[[], Latents]) -> Latents:
    """`make` in the first process, which leaves a file, then in the others, which read it."""
    made = make() if setup.writes else None
    setup.wait()
    return make() if made is None else made


def _fit(vae: Vae, clips: list[ClipFile], profile: Profile, recipe: Recipe, report: Report) -> None:
    report("fitting the VAE's linear paths")
    kept = fit_linear(vae, clips, profile, recipe.seed)
    report(f"the latent keeps {100 * kept:.2f} % of the pixels' variance")


def cached_latents(path: Path, vae: Vae, clips: list[ClipFile], profile: Profile, report: Report) -> Latents:
    """All clips as latents, from the cache if it was made with this encoder and these clips."""
    files = repr([(clip.path.name, found.st_size, found.st_mtime_ns) for clip in clips for found in [clip.path.stat()]]).encode()
    key = hashlib.sha256(files + b"".join(t.numpy().tobytes() for t in vae.encoder.state_dict().values())).hexdigest()
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
                latents.z[used], latents.tokens[used] = z, torch.from_numpy(arrays["tokens"])[: profile.text.tokens]
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


def _train_vae(vae: Vae, clips: list[ClipFile], profile: Profile, recipe: Recipe, run: Path, report: Report, setup: Setup) -> None:
    stage, snippets = recipe.vae, Snippets(clips, profile)
    trains_encoder = bool(profile.vae.encoder_channels)
    for parameter in vae.encoder.parameters():
        parameter.requires_grad_(trains_encoder)
    for parameter in vae.decoder.linear.parameters():  # Adam's noise costs the closed-form solution more than training it gains
        parameter.requires_grad_(False)
    average = fit(
        vae, lambda rng: vae_loss(vae, stage, lambda r: snippets.draw(stage, r), rng), stage.optimiser, run / "vae.state", recipe.seed,
        lambda step, loss: report(f"VAE: {step} of {stage.optimiser.steps} updates, loss {loss:.4f}"),
        dataclasses.replace(setup, device="cpu", bf16=setup.bf16 and (setup.device == "cpu" or has_bf16("cpu")), mesh=None),
    )  # fmt: skip
    vae.load_state_dict(average, strict=False)


@functools.lru_cache(maxsize=1)  # a run asks after every stage, and five worlds take seconds
def start_frames(profile: Profile) -> dict[str, StartFrame]:
    """The demo's start frames, rendered at the profile's size."""
    frames = {}
    for name, (seed, prompt) in STARTS.items():
        world = World(seed, parse(prompt), profile.video.width, profile.video.height)
        clip = fly(world, np.random.default_rng((seed, 2)), blocks=1)
        frames[name] = StartFrame(torch.from_numpy(clip.frames[0].copy()), prompt)
    return frames
