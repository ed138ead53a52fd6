"""`aapt train`: the commands that make and judge checkpoints."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from aapt_deploy.cli import options as opt
from aapt_deploy.errors import OutputError, UsageError, needs_extra

if TYPE_CHECKING:
    from aapt_deploy.profiles import Profile

train_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Train a checkpoint: render or import clips, then run the stages.",
)


@train_app.command("data")
def train_data(
    folder: opt.ClipsOut,
    worlds: opt.Worlds = 1000,
    first_seed: opt.FirstSeed = 0,
    blocks: opt.ClipBlocks = 24,
    processes: opt.Processes = 2,
    videos: opt.Videos = None,
    profile: opt.ProfileName = "demo-cpu",
    force: opt.ForceClips = False,
) -> None:
    """Make training clips: rendered flights over procedural worlds, or pieces of your videos."""
    from aapt_deploy import profiles
    from aapt_deploy.cli import console
    from aapt_deploy.train.world import data

    shape = profiles.load(profile)
    if not force:
        data.refuse_other_clips(folder, shape, blocks)
    with _writing(folder), console.progress(f"writing clips to {folder}") as progress:
        if videos is not None:
            written = data.import_videos(videos, folder, shape, _skipped, blocks)
        else:
            seeds = (first_seed, worlds)
            written = _render(folder, shape, seeds, processes, blocks, progress)
    console.say(f"{folder}: {written} new clips")


@train_app.command("run")
def train_run(
    folder: opt.Clips,
    run: opt.RunFolder = Path("runs/demo"),
    profile: opt.ProfileName = "demo-cpu",
    chosen: opt.Recipe = "demo",
    start: opt.Begin = None,
    distilled: opt.Distilled = None,
    device: opt.TrainDevice = "cpu",
    bf16: opt.Bf16 = None,
    context: opt.Context = 1,
    checkpointing: opt.Checkpointing = False,
) -> None:
    """Train VAE and generator; writes a checkpoint per stage and one in the end.

    Safe to stop and start at any time.

    Under torchrun, processes share the work: torchrun --nproc-per-node 8 -m -- aapt_deploy train
    run DATA --device cuda.
    """
    from aapt_deploy import profiles
    from aapt_deploy.cli import console

    if distilled is not None and start is None:
        hint = "name the flow-matching checkpoint it came from with --from"
        raise UsageError("--distilled stands in for a stage after --from", hint)
    shape = profiles.load(profile)
    with needs_extra("train"), _writing(run), console.progress(f"training in {run}") as progress:
        from aapt_deploy.train import processes, recipe
        from aapt_deploy.train import run as stages

        steps, begin = recipe.named(chosen), stages.WarmStart(start, distilled) if start else None
        how = processes.joined(device, _mixed(device, bf16), checkpointing, context)
        path = stages.train(folder, run, shape, steps, progress, how, begin, console.warn)
    console.say(f"checkpoint: {path}")


@train_app.command("all")
def train_all(
    folder: opt.Everything,
    worlds: opt.Worlds = 1000,
    chosen: opt.Recipe = "demo",
    flights: opt.Flights = 32,
    seconds: opt.FlightSeconds = 60,
    profile: opt.ProfileName = "demo-cpu",
    bf16: opt.Bf16 = None,
) -> None:
    """Run the whole recipe on this machine: render clips, train all stages, judge each.

    The demo's recipe takes days on two cores.
    """
    from aapt_deploy import profiles
    from aapt_deploy.cli import console, reports

    shape, clips, run = profiles.load(profile), folder / "clips", folder / "run"
    doing = f"training in {folder}"
    with needs_extra("train"), _writing(folder), console.progress(doing) as progress:
        from aapt_deploy.train import processes, recipe
        from aapt_deploy.train import run as stages
        from aapt_deploy.train.judge import evaluate
        from aapt_deploy.train.world import data

        steps = recipe.named(chosen)
        evaluate.refuse_length(seconds)
        data.refuse_other_clips(clips, shape, data.BLOCKS)
        for done, _ in enumerate(data.render_worlds(clips, shape, 0, worlds, 2), start=1):
            progress(f"{done} of {worlds} worlds")
        how = processes.Setup(bf16=_mixed("cpu", bf16))
        stages.train(clips, run, shape, steps, progress, how, warn=console.warn)
        found = run.glob("checkpoint-*.safetensors")
        checkpoints, out = sorted(found, key=_age), folder / "evaluation"
        listeners = (console.warn, progress)
        record = evaluate.evaluate(checkpoints, out, flights, seconds, "torch", None, *listeners)
    reports.evaluation(record, out)


@train_app.command("evaluate")
def train_evaluate(
    bundles: opt.Judged,
    out: opt.EvaluationOut = Path("evaluation"),
    flights: opt.Flights = 32,
    seconds: opt.FlightSeconds = 60,
    backend: opt.Backend = "onnxruntime",
    precision: opt.Precision = None,
    as_json: opt.Json = False,
) -> None:
    """Measure how long a checkpoint's world stays good, against the renderer.

    Compares picture, motion, camera and prompt.
    """
    from aapt_deploy.cli import console, reports

    doing = f"evaluating {len(bundles)} bundles"
    with needs_extra("train"), _writing(out), console.progress(doing) as progress:
        from aapt_deploy.train.judge import evaluate

        engine = (backend, precision)
        record = evaluate.evaluate(bundles, out, flights, seconds, *engine, console.warn, progress)
    reports.evaluation(record, out)
    if as_json:
        typer.echo(json.dumps(record))


def _render(
    folder: Path,
    shape: "Profile",
    seeds: tuple[int, int],
    processes: int,
    blocks: int,
    progress: Callable[[str], None],
) -> int:
    """Render worlds of `seeds` (first, number) and return the number of new clips."""
    from aapt_deploy.train.world import data

    written = 0
    rendered = data.render_worlds(folder, shape, *seeds, processes, blocks)
    for done, clips in enumerate(rendered, start=1):
        written += clips
        progress(f"{done} of {seeds[1]} worlds, {written} new clips")
    return written


def _skipped(path: Path, reason: str) -> None:
    from aapt_deploy.cli import console

    console.warn(f"skipped {path}: {reason}")


def _age(path: Path) -> float:
    return path.stat().st_mtime


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn the system's errors about `folder` (no access, a full disk) into one OutputError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        hint = "free some space, or name a folder that can be written"
        raise OutputError(f"{folder} cannot be written: {error}", hint) from None


def _mixed(device: str, wanted: bool | None) -> bool:
    """Return whether to train in mixed precision; warn if that is wanted and slow here."""
    from aapt_deploy.cli import console
    from aapt_deploy.train.processes import has_bf16

    fast = has_bf16(device)
    if wanted and not fast:
        slow = "this CPU emulates bf16, at a hundredth of its speed in float32"
        console.warn(f"{slow}; --no-bf16 is faster")
    return fast if wanted is None else wanted
