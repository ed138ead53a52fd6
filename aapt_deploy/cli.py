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
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aapt_deploy import __version__
from aapt_deploy.cli_doctor import doctor
from aapt_deploy.cli_train import train_app
from aapt_deploy.errors import AaptError, OutputError, UsageError, VerdictError
from aapt_deploy.options import Backend, BundleArg, Device, Force, Json, Precision, command_named, needing, placed

if TYPE_CHECKING:
    from aapt_deploy.build import Built
    from aapt_deploy.latency import Latency
    from aapt_deploy.models.fp8 import Coverage
    from aapt_deploy.parity import Parity
    from aapt_deploy.plan import Plan
    from aapt_deploy.profiles import Profile
    from aapt_deploy.quality import Loss
    from aapt_deploy.stream import Request, Streamed

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help=(
    "Take a block-causal video generator to a stream that meets its deadline.\n\n"
    "The four steps: export, build-engine, profile, stream. `aapt demo` runs them in a row on the checkpoint that ships with the package."
))  # fmt: skip
app.add_typer(train_app, name="train")
app.command()(doctor)

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
    from aapt_deploy import console, reports

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
    precision: Annotated[
        str | None, typer.Option(help="fp32, int8 or fp8; tensorrt: fp8, bf16 or fp32. Default: all that fit the bundle; tensorrt: the bundle's own.")
    ] = None,
    attention: Annotated[
        str, typer.Option(help="tensorrt: auto (the best that `aapt doctor --tensorrt` proved here), python, aot or native.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """ONNX graphs -> engines for this machine, each measured and compared with fp32 (tensorrt: with the exported graphs).

    Ctrl-C stops a TensorRT build at its next step; started again, it goes on with the plan it was at. Building with TensorRT is checked against the
    real bindings of 10.16 and 11.4, and was never run by us on TensorRT itself.
    """
    from aapt_deploy import console, reports

    with (console.phases if backend == "tensorrt" else console.steps)(f"building {backend} engines in {bundle}") as step:
        built = _build(bundle, backend, precision, step, attention)
    reports.engines(built)
    if as_json:
        typer.echo(json.dumps({"bundle": str(bundle), "engines": [asdict(engine) for engine in built]}))


@app.command()
def profile(
    bundle: Annotated[
        Path | None, typer.Argument(help="Bundle directory; with --plan or --device cuda also a preset's name or a TOML file.", metavar="BUNDLE")
    ] = None,
    backend: Backend = "onnxruntime",
    device: Device = None,
    precision: Precision = None,
    blocks: Annotated[int, typer.Option(min=10, help="Blocks to measure after the cold ones.")] = 120,
    plan: Annotated[bool, typer.Option("--plan", help="Measure nothing: memory against the target's, and the floor of each stage.")] = False,
    diff: Annotated[tuple[Path, Path] | None, typer.Option("--diff", help="Measure nothing: compare two records of --json.", metavar="A B")] = None,
    as_json: Json = False,
) -> None:
    """Measure step latency against the frame budget (4 frames at 24 fps: 166.7 ms). Exit 3 if it is missed, or if a plan does not fit.

    On --device cuda a preset or a TOML file will do as well: random weights are drawn on the GPU.
    """
    from aapt_deploy import console, reports

    if diff:
        if bundle is not None:
            raise UsageError(f"--diff compares two records and measures nothing, but {bundle} is named", "leave out BUNDLE or --diff")
        from aapt_deploy.profile_diff import difference

        found = difference(*diff)
        reports.difference(found)
        if as_json:
            typer.echo(found.json())
        return
    if bundle is None:
        raise UsageError("no BUNDLE was named", "name one, or compare two records with --diff A.json B.json; see: aapt profile --help")
    if plan:
        planned = _plan(bundle)
        reports.plan(planned)
        if as_json:
            typer.echo(planned.json())
        raise typer.Exit(0 if planned.fits else VerdictError.exit_code)
    with console.progress(f"profiling {bundle}") as progress:
        latency = _profile(bundle, placed(backend, device), precision, blocks, progress)
    reports.latency(latency)
    if as_json:
        typer.echo(latency.json())
    raise typer.Exit(0 if latency.within_budget else VerdictError.exit_code)


@app.command()
def quality(
    bundle: BundleArg,
    backend: Backend = "onnxruntime",
    device: Device = None,
    precision: Precision = None,
    reference: Annotated[
        str | None, typer.Option(help="Engine to compare with, as BACKEND-PRECISION. Default: onnxruntime-fp32; of an fp8 bundle torch-bf16.")
    ] = None,
    reference_bundle: Annotated[Path | None, typer.Option(help="Bundle of the same checkpoint that holds the reference. Default: BUNDLE.")] = None,
    seconds: Annotated[int, typer.Option(min=1, help="Length of each rollout, one per start frame.")] = 5,
    plot: Annotated[Path | None, typer.Option(help="Write the curves to this .png, .svg or .pdf (needs matplotlib).")] = None,
    as_json: Json = False,
) -> None:
    """Measure what a precision costs: latents, frames and drift against another engine of the bundle. Exit 3 if a threshold is missed."""
    from aapt_deploy import console, reports

    with needing("train"):
        from aapt_deploy.quality import plotter

        draw = plotter(plot)  # refused now, and not after minutes of measuring
    with console.progress(f"comparing engines of {bundle}") as progress:
        loss = _quality((bundle, reference_bundle), placed(backend, device), precision, reference, seconds, progress)
    reports.quality(loss)
    if as_json:
        typer.echo(loss.json())
    draw(loss)
    raise typer.Exit(VerdictError.exit_code if loss.failures else 0)


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
    from aapt_deploy import console, reports
    from aapt_deploy.stream import Request

    paced = controls == "-" if realtime is None else realtime
    request = Request(out, format, seconds, seed, image, prompt, controls, paced, placed(backend, device), precision)
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
    from aapt_deploy import console, reports
    from aapt_deploy.assets import demo_controls
    from aapt_deploy.bundle import Bundle
    from aapt_deploy.profiles import load
    from aapt_deploy.stream import Request, frame_count

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
        latency = _profile(bundle, "onnxruntime", None, 60, progress)
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
    from aapt_deploy import console, profiles

    shape = profiles.load(profile)
    with needing("export"), console.steps(f"drawing weights for {shape.name}"):
        from aapt_deploy.initialise import random_checkpoint

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

    with needing("export"):
        from aapt_deploy import export, scales
        from aapt_deploy.models import checkpoint as checkpoints

        embedded = checkpoint is None
        path, sha256 = checkpoint or assets.CHECKPOINT, assets.checkpoint_sha256() if embedded else sha256
        stored = checkpoints.stored(path, sha256)
        chosen = None
        if in_fp8 and scales_file is not None:
            chosen = scales.load(scales_file, stored.profile)
        elif in_fp8:
            with needing("fp8"):
                from aapt_deploy import bundle, quantize

                bundle.refuse_existing(out, force)  # now, and not after hours of calibration
                chosen = quantize.calibrate(checkpoints.load(path, stored.sha256), report)
        return export.export_bundle(stored, out, force, report, chosen), export.coverage(stored.profile, chosen)


def _build(bundle: Path, backend: str, precision: str | None, report: Callable[[str], None], attention: str = "auto") -> "list[Built]":
    from aapt_deploy.bundle import Bundle

    opened = Bundle.open(bundle)
    with needing("export"):
        from aapt_deploy import build

        return build.build_engine(opened, backend, precision, report, attention)


def _profile(bundle: Path, backend: str, precision: str | None, blocks: int, progress: Callable[[str], None]) -> "Latency":
    from aapt_deploy import profiles
    from aapt_deploy.bundle import Bundle

    opened = None if backend == "torch-cuda" and not bundle.is_dir() else Bundle.open(bundle)  # None: a profile, to be measured with random weights
    shape = opened.profile if opened else profiles.load(str(bundle))
    with needing("export"):
        from aapt_deploy import latency

        how = (precision, blocks, progress)
        measured = latency.measure_bundle(opened, backend, *how) if opened else latency.measure_random(shape, *how)
    return replace(measured, floor_ms=_floors(shape))


def _floors(shape: "Profile") -> dict[str, float]:
    """The floor of each stage on the profile's target; none for a CPU, nor where torch is missing, which counts the operations."""
    if shape.target.device == "cpu":
        return {}
    try:
        from aapt_deploy.plan import plan
    except ModuleNotFoundError:
        return {}
    return plan(shape).floors_ms


def _plan(bundle_or_preset: Path) -> "Plan":
    from aapt_deploy import profiles
    from aapt_deploy.bundle import Bundle

    shape = Bundle.open(bundle_or_preset).profile if bundle_or_preset.is_dir() else profiles.load(str(bundle_or_preset))
    with needing("export"):
        from aapt_deploy import plan

        return plan.plan(shape)


def _quality(
    bundles: tuple[Path, Path | None], backend: str, precision: str | None, reference: str | None, seconds: int, progress: Callable[[str], None]
) -> "Loss":
    from aapt_deploy.bundle import Bundle

    opened, other = Bundle.open(bundles[0]), Bundle.open(bundles[1]) if bundles[1] else None
    with needing("export"):
        from aapt_deploy import quality
        from aapt_deploy.engine import precision_of

        reference = reference or ("torch-bf16" if opened.manifest.get("precision") == "fp8" else "onnxruntime-fp32")
        return quality.compare(opened, reference, f"{backend}-{precision_of(opened, backend, precision)}", seconds, progress, other)


def _stream(bundle: Path, request: "Request", progress: Callable[[str], None]) -> "Streamed":
    from aapt_deploy import console
    from aapt_deploy.bundle import Bundle

    opened = Bundle.open(bundle)
    with needing("export"):
        from aapt_deploy import stream

        return stream.stream(opened, request, console.warn, progress)


def main() -> None:
    """Run the command line; the one place where an error becomes two lines and an exit code."""
    try:
        sys.exit(_run())
    except AaptError as error:
        from aapt_deploy import console

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
            from aapt_deploy import console

            console.say(help_text)
            return UsageError.exit_code
        path = error.ctx.command_path if error.ctx else command_named(typer.main.get_command(app), sys.argv[1:])
        raise UsageError(error.format_message(), f"see: {path} --help") from None
