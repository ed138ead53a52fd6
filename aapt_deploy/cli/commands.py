"""The command line. Every command parses, calls and reports; the work is elsewhere and is imported when it is needed.

stdout carries data: frames, or one line of JSON with --json. stderr is for people. Exit codes:

    0  done; for `profile`: within the budget      5  a package, a driver or the hardware is missing
    2  wrong option, prompt or control             6  the output cannot be written
    3  measured, and the verdict is bad            7  the bundle is being built by another process
    4  a file that was given is broken             8  an exported graph disagrees with its reference
    9  training diverged
    130 / 143  stopped by Ctrl-C / SIGTERM; what was streamed until then is kept, anything else that is half made is removed
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aapt_deploy import __version__
from aapt_deploy.backends.table import BACKENDS, named
from aapt_deploy.cli import measure
from aapt_deploy.cli.doctor import doctor
from aapt_deploy.cli.measure import measured_latency
from aapt_deploy.cli.options import (
    Backend,
    BundleArg,
    Device,
    Force,
    Json,
    Precision,
    command_named,
    listed,
)
from aapt_deploy.cli.train import train_app
from aapt_deploy.errors import AaptError, OutputError, UsageError, VerdictError, needs_extra

if TYPE_CHECKING:
    from aapt_deploy.backends.trial import Built, Progress
    from aapt_deploy.export.parity import Parity
    from aapt_deploy.models.fp8 import Coverage
    from aapt_deploy.stream.stream import Request, Streamed

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help=(
    "Take a block-causal video generator to a stream that meets its deadline.\n\n"
    "The four steps: export, build-engine, profile, stream. `aapt demo` runs them in a row on the checkpoint that ships with the package."
))  # fmt: skip
app.add_typer(train_app, name="train")
for command in (doctor, measure.profile, measure.plan, measure.diff, measure.quality):
    app.command()(command)

_BUILT = [row for row in BACKENDS.values() if row.needs_build]
_PRECISIONS_BUILT = "; ".join(f"{row.name}: {listed(row.precisions)}" for row in _BUILT)
_ON_DEMAND = listed([f"{row.name} {name}" for row in _BUILT for name in row.precisions if name not in row.by_default], "and")
_FORMS = "; ".join(f"{row.name}: auto, {listed(row.forms)}" for row in _BUILT if row.forms)

_BadUsage: type[typer.BadParameter] = typer.BadParameter.__bases__[0]  # the parser's UsageError, which has no public name


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"aapt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    pass


@app.command()
def export(
    checkpoint: Annotated[Path | None, typer.Argument(help="Checkpoint (.safetensors). Default: the embedded one.", metavar="CKPT")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Bundle directory to make.")] = Path("bundle"),
    sha256: Annotated[str | None, typer.Option(help="Refuse the checkpoint unless it has this hash.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, or fp8: linear layers in e4m3, calibrated on rollouts of the checkpoint.")] = "fp32",
    scales: Annotated[Path | None, typer.Option(help="With fp8: take the scales of this file (from a bundle) instead of calibrating.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Checkpoint -> ONNX graphs, each checked against PyTorch. Exit 8 if one disagrees."""
    from aapt_deploy.cli import console, reports

    if precision not in ("fp32", "fp8"):
        raise UsageError(f"graphs cannot be exported in {precision!r}", "precisions: fp32, fp8; int8 is made by build-engine")
    if scales is not None and precision != "fp8":
        raise UsageError(f"--scales {scales} is for fp8 graphs", "add --precision fp8")
    with console.steps(f"exporting to {out}") as step:
        table, coverage = _export(checkpoint, out, sha256, force, step, precision == "fp8", scales)
    reports.parity(table, out)
    reports.coverage(coverage)
    if as_json:
        shares = [row._asdict() for row in coverage]
        typer.echo(json.dumps({"bundle": str(out), "parity": [row._asdict() for row in table], "coverage": shares}))


@app.command("build-engine")
def build_engine(
    bundle: BundleArg,
    backend: Backend = "onnxruntime",
    precision: Annotated[str | None, typer.Option(help=f"{_PRECISIONS_BUILT}. Default: all that fit the bundle, but for {_ON_DEMAND}.")] = None,
    attention: Annotated[str, typer.Option(help=f"{_FORMS}. auto takes the best that `aapt doctor --tensorrt` proved here.")] = "auto",
    as_json: Json = False,
) -> None:
    """ONNX graphs -> engines for this machine, each measured and compared with fp32 (tensorrt: with the exported graphs).

    Ctrl-C stops a TensorRT build at its next step; started again, it goes on with the plan it was at. Building with TensorRT is checked against the
    real bindings of 10.16 and 11.4, and was never run by us on TensorRT itself.
    """
    from aapt_deploy.cli import console, reports

    with console.phases(f"building {backend} engines in {bundle}") as step:
        built = _build(bundle, backend, precision, step, attention, step)
    reports.engines(built)
    if as_json:
        typer.echo(json.dumps({"bundle": str(bundle), "engines": [asdict(engine) for engine in built]}))


@app.command()
def stream(
    bundle: BundleArg,
    out: Annotated[str, typer.Option("--out", "-o", help="File (.mp4 .mkv .y4m .nut .ts .rgb), or - for stdout.")],
    format: Annotated[str | None, typer.Option(help="mp4, mkv, y4m, nut, mpegts, fmp4 or rawvideo. Default: from the suffix; y4m for -.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length of the video. Default: until Ctrl-C.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same frames.")] = 0,
    image: Annotated[str | None, typer.Option(help="Picture to start from, or the name of a start frame.")] = None,
    prompt: Annotated[str | None, typer.Option(help='Look of the world ("desert at dusk, clear"); else a text encoder\'s .npy.')] = None,
    controls: Annotated[str | None, typer.Option(help="File with JSON lines of camera velocities, or - for stdin.")] = None,
    realtime: Annotated[bool | None, typer.Option("--realtime/--fast", help="Pace at the profile's fps. Default: only with --controls -.")] = None,
    backend: Backend = "onnxruntime",
    device: Device = None,
    precision: Precision = None,
    as_json: Json = False,
) -> None:
    """Generate frames to a file, a pipe or another program, steered live. Exit 130 after Ctrl-C, with the file complete."""
    from aapt_deploy.cli import console, reports
    from aapt_deploy.stream.stream import Request

    paced = controls == "-" if realtime is None else realtime
    request = Request(out, format, seconds, seed, image, prompt, controls, paced, named(backend, device), precision)
    if out == "-" and as_json:
        raise UsageError("--json writes to stdout, and so does --out -", "leave one of them out")
    with console.progress(f"streaming to {'stdout' if out == '-' else out}") as progress:
        done = _stream(bundle, request, progress)
    reports.streamed(done)
    if as_json:
        typer.echo(json.dumps(asdict(done)))
    raise typer.Exit(128 + done.signal if done.signal else 0)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for bundle and video.")] = Path("demo"),
    seconds: Annotated[float, typer.Option(help="Length of the video.")] = 12.0,
    as_json: Json = False,
) -> None:
    """Export, build, profile and stream the embedded checkpoint; ends with the verdict and the video's path. Exit 3 if the budget is missed."""
    from aapt_deploy.assets import demo_controls
    from aapt_deploy.bundle.bundle import Bundle
    from aapt_deploy.cli import console, reports
    from aapt_deploy.profiles import load
    from aapt_deploy.stream.stream import Request, frame_count

    frame_count(load("demo-cpu"), seconds)  # refuse it now, not after a minute's work
    bundle, video = out / "bundle", out / "demo.mp4"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}", "name another folder with --out") from None
    with console.steps("1/4 export") as step:
        reports.parity(_export(None, bundle, None, (bundle / "manifest.json").exists(), step)[0], bundle)
    with console.steps("2/4 build-engine") as step:
        reports.engines(_build(bundle, "onnxruntime", None, step))
    with console.progress("3/4 profile") as progress:
        latency = measured_latency(bundle, "onnxruntime", None, 60, progress)
    reports.latency(latency)
    with console.progress("4/4 stream") as progress:
        done = _stream(bundle, Request(str(video), seconds=seconds, controls=str(demo_controls())), progress)
    reports.streamed(done)
    reports.demo(latency, video, Bundle.open(bundle))
    if as_json:
        typer.echo(json.dumps({"video": str(video), "bundle": str(bundle), "latency": json.loads(latency.json())}))
    raise typer.Exit(0 if latency.within_budget else VerdictError.exit_code)


@app.command()
def init(
    profile: Annotated[str, typer.Argument(help="Shipped preset or TOML file.", metavar="PROFILE")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Checkpoint to write.")] = Path("random.safetensors"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="Where to draw them: cpu, or cuda, in seconds.")] = "cpu",
    force: Force = False,
) -> None:
    """Write a checkpoint of random weights, to size an engine. On a GPU none is needed: aapt profile PROFILE --backend torch --device cuda."""
    from aapt_deploy import profiles
    from aapt_deploy.cli import console

    shape = profiles.load(profile)
    with needs_extra("export"), console.steps(f"drawing weights for {shape.name}"):
        from aapt_deploy.models.random_weights import random_checkpoint

        count = random_checkpoint(shape, out, seed, device, force)
    console.say(f"{out}: {count / 1e6:.1f} M parameters, {out.stat().st_size / 1e6:.1f} MB")


def _export(
    checkpoint: Path | None,
    out: Path,
    sha256: str | None,
    force: bool,
    report: Callable[[str], None],
    in_fp8: bool = False,
    scales_file: Path | None = None,
) -> "tuple[list[Parity], list[Coverage]]":
    from aapt_deploy import assets

    with needs_extra("export"):
        from aapt_deploy.bundle import scales
        from aapt_deploy.export import export
        from aapt_deploy.models import checkpoint as checkpoints

        embedded = checkpoint is None
        path, sha256 = checkpoint or assets.CHECKPOINT, assets.checkpoint_sha256() if embedded else sha256
        stored = checkpoints.stored(path, sha256)
        chosen = None
        if in_fp8 and scales_file is not None:
            chosen = scales.load(scales_file, stored.profile)
        elif in_fp8:
            with needs_extra("fp8"):
                from aapt_deploy.bundle import bundle
                from aapt_deploy.export import calibrate

                bundle.refuse_existing(out, force)  # now, and not after hours of calibration
                chosen = calibrate.calibrate(checkpoints.load(path, stored.sha256), report)
        return export.export_bundle(stored, out, force, report, chosen), export.coverage(stored.profile, chosen)


def _build(
    bundle: Path, backend: str, precision: str | None, report: Callable[[str], None], attention: str = "auto", progress: "Progress | None" = None
) -> "list[Built]":
    from aapt_deploy.bundle.bundle import Bundle

    opened = Bundle.open(bundle)
    with needs_extra("export"):
        from aapt_deploy.backends import build, trial

        return build.build_engine(opened, backend, precision, trial.Options(report, attention, progress))


def _stream(bundle: Path, request: "Request", progress: Callable[[str], None]) -> "Streamed":
    from aapt_deploy.bundle.bundle import Bundle
    from aapt_deploy.cli import console

    opened = Bundle.open(bundle)
    with needs_extra("export"):
        from aapt_deploy.stream import stream

        return stream.stream(opened, request, console.warn, progress)


def main() -> None:
    """Run the command line; the one place where an error becomes two lines and an exit code."""
    try:
        sys.exit(_run())
    except AaptError as error:
        from aapt_deploy.cli import console

        console.fail(str(error), error.hint)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _run() -> int:
    """Run the command that sys.argv names and return its exit code. Raises UsageError for what cannot be parsed."""
    try:
        return app(prog_name="aapt", standalone_mode=False) or 0
    except _BadUsage as error:
        help_text = error.ctx.get_help() if error.ctx else ""
        if error.format_message() == help_text:  # a group that was given no command
            from aapt_deploy.cli import console

            console.say(help_text)
            return UsageError.exit_code
        path = error.ctx.command_path if error.ctx else command_named(typer.main.get_command(app), sys.argv[1:])
        raise UsageError(error.format_message(), f"see: {path} --help") from None
