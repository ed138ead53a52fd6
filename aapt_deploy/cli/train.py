"""`aapt train`: the commands that make and judge checkpoints. As in commands.py, every command parses, calls and reports."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from aapt_deploy.cli.options import Backend, Json, Precision, ProfileName
from aapt_deploy.errors import OutputError, needs_extra

Bf16 = Annotated[bool | None, typer.Option("--bf16/--no-bf16", help="Mixed precision. Default: where the hardware has it.")]

train_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Train a checkpoint: render or import clips, then run the stages.")


@train_app.command("data")
def train_data(
    folder: Annotated[Path, typer.Argument(help="Folder for the clips; an earlier run goes on.")],
    worlds: Annotated[int, typer.Option(min=1, help="Worlds to render, two clips each.")] = 1000,
    first_seed: Annotated[int, typer.Option(min=0)] = 0,
    blocks: Annotated[int, typer.Option(min=2, help="Blocks of four frames per clip: six are a second.")] = 24,
    processes: Annotated[int, typer.Option(min=1)] = 2,
    videos: Annotated[Path | None, typer.Option(help="Cut this video, or all in this folder, into clips instead of rendering.")] = None,
    profile: ProfileName = "demo-cpu",
    force: Annotated[bool, typer.Option("--force", help="Make clips of another length or size again.")] = False,
) -> None:
    """Make training clips: rendered flights over procedural worlds, or pieces of your own videos."""
    from aapt_deploy import profiles
    from aapt_deploy.cli import console
    from aapt_deploy.train.world import data

    shape = profiles.load(profile)
    if not force:
        data.refuse_other_clips(folder, shape, blocks)
    with _writing(folder), console.progress(f"writing clips to {folder}") as progress:
        if videos is not None:
            written = data.import_videos(videos, folder, shape, lambda path, reason: console.warn(f"skipped {path}: {reason}"), blocks)
        else:
            written = 0
            for done, clips in enumerate(data.render_worlds(folder, shape, first_seed, worlds, processes, blocks), start=1):
                written += clips
                progress(f"{done} of {worlds} worlds, {written} new clips")
    console.say(f"{folder}: {written} new clips")


@train_app.command("run")
def train_run(
    folder: Annotated[Path, typer.Argument(help="Folder of clips, made by `aapt train data`.")],
    run: Annotated[Path, typer.Option("--run", help="Folder of the run; an interrupted run goes on.")] = Path("runs/demo"),
    profile: ProfileName = "demo-cpu",
    chosen: Annotated[
        str, typer.Option("--recipe", help="demo, demo-causal, -clip, -bidirectional-clip, -consistency, -anchored, or paper.")
    ] = "demo",
    start: Annotated[Path | None, typer.Option("--from", help="Checkpoint with a VAE and a flow-matching generator: go on from there.")] = None,
    distilled: Annotated[Path | None, typer.Option(help="With --from: a one-step checkpoint, in the place of distillation.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    bf16: Bf16 = None,
    context: Annotated[int, typer.Option(min=1, help="Under torchrun: processes that share each batch, its tokens and heads.")] = 1,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute blocks in the backward pass: less memory, more time.")] = False,
) -> None:
    """Train VAE and generator; ends with a checkpoint in the run's folder, and one of each stage. Safe to stop and start at any time.

    Under torchrun, processes share the work: torchrun --nproc-per-node 8 -m -- aapt_deploy train run DATA --device cuda.
    """
    from aapt_deploy import profiles
    from aapt_deploy.cli import console
    from aapt_deploy.errors import UsageError

    if distilled is not None and start is None:
        raise UsageError("--distilled stands in for a stage after --from", "name the flow-matching checkpoint it came from with --from")
    shape = profiles.load(profile)
    with needs_extra("train"), _writing(run), console.progress(f"training in {run}") as progress:
        from aapt_deploy.train import processes, recipe
        from aapt_deploy.train import run as stages

        how = processes.joined(device, _mixed(device, bf16), checkpointing, context)
        begin = stages.WarmStart(start, distilled) if start else None
        path = stages.train(folder, run, shape, recipe.named(chosen), progress, how, begin, console.warn)
    console.say(f"checkpoint: {path}")


@train_app.command("all")
def train_all(
    folder: Annotated[Path, typer.Argument(help="Folder for everything: clips, run and evaluation. An interrupted command goes on.")],
    worlds: Annotated[int, typer.Option(min=1, help="Worlds to render, two clips each.")] = 1000,
    chosen: Annotated[str, typer.Option("--recipe", help="As in `aapt train run`.")] = "demo",
    flights: Annotated[int, typer.Option(min=1, help="Held-out worlds to judge by.")] = 32,
    seconds: Annotated[int, typer.Option(min=5, help="Length of a flight, a multiple of 5.")] = 60,
    profile: ProfileName = "demo-cpu",
    bf16: Bf16 = None,
) -> None:
    """The whole recipe on this machine: render clips, train all stages, judge the checkpoint of each. The demo's takes days on two cores."""
    from aapt_deploy import profiles
    from aapt_deploy.cli import console, reports

    shape, clips, run = profiles.load(profile), folder / "clips", folder / "run"
    with needs_extra("train"), _writing(folder), console.progress(f"training in {folder}") as progress:
        from aapt_deploy.train import processes, recipe
        from aapt_deploy.train import run as stages
        from aapt_deploy.train.judge import evaluate
        from aapt_deploy.train.world import data

        steps = recipe.named(chosen)
        evaluate.refuse_length(seconds)
        data.refuse_other_clips(clips, shape, data.BLOCKS)
        for done, _ in enumerate(data.render_worlds(clips, shape, 0, worlds, 2), start=1):
            progress(f"{done} of {worlds} worlds")
        stages.train(clips, run, shape, steps, progress, processes.Setup(bf16=_mixed("cpu", bf16)), warn=console.warn)
        checkpoints = sorted(run.glob("checkpoint-*.safetensors"), key=lambda path: path.stat().st_mtime)
        out = folder / "evaluation"
        record = evaluate.evaluate(checkpoints, out, flights, seconds, "torch", None, console.warn, progress)
    reports.evaluation(record, out)


@train_app.command("evaluate")
def train_evaluate(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles with engines, or checkpoints, side by side.", metavar="BUNDLE...")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for evaluation.json, curves.png and sheets of frames.")] = Path("evaluation"),
    flights: Annotated[int, typer.Option(min=1, help="Held-out worlds, one flight each.")] = 32,
    seconds: Annotated[int, typer.Option(min=5, help="Length of a flight, a multiple of 5.")] = 60,
    backend: Backend = "onnxruntime",
    precision: Precision = None,
    as_json: Json = False,
) -> None:
    """Measure how long a checkpoint's world holds: picture, motion, camera and prompt, against the renderer."""
    from aapt_deploy.cli import console, reports

    with needs_extra("train"), _writing(out), console.progress(f"evaluating {len(bundles)} bundles") as progress:
        from aapt_deploy.train.judge import evaluate

        record = evaluate.evaluate(bundles, out, flights, seconds, backend, precision, console.warn, progress)
    reports.evaluation(record, out)
    if as_json:
        typer.echo(json.dumps(record))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn what the system says about a folder that cannot be written, or a full disk, into one error."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{folder} cannot be written: {error}", "free some space, or name a folder that can be written") from None


def _mixed(device: str, wanted: bool | None) -> bool:
    """Whether to train in mixed precision; a wish that costs more than it gives is granted, and told."""
    from aapt_deploy.cli import console
    from aapt_deploy.train.processes import has_bf16

    fast = has_bf16(device)
    if wanted and not fast:
        console.warn("this CPU emulates bf16, at a hundredth of its speed in float32; --no-bf16 is faster")
    return fast if wanted is None else wanted
