"""The command line. Every command parses, calls and reports; the work is elsewhere.

Work is imported only when it is needed. stdout carries data: frames, or one line of JSON with
--json. stderr is for people. The exit codes are those of errors.py. 130 and 143 mean stopped by
Ctrl-C and SIGTERM: a streamed file is complete then, and other unfinished files are removed.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aapt_deploy import __version__
from aapt_deploy.backends.table import named
from aapt_deploy.cli import measure
from aapt_deploy.cli import options as opt
from aapt_deploy.cli.checkpoints import import_, prompt
from aapt_deploy.cli.doctor import doctor
from aapt_deploy.cli.measure import measured_latency
from aapt_deploy.cli.train import train_app
from aapt_deploy.errors import AaptError, OutputError, UsageError, VerdictError, needs_extra

if TYPE_CHECKING:
    from aapt_deploy.backends.trial import Built, Progress
    from aapt_deploy.export.parity import Parity
    from aapt_deploy.measure.latency import Latency
    from aapt_deploy.models.fp8 import Coverage
    from aapt_deploy.stream.stream import Request, Streamed

_HELP = """Take a block-causal video generator to a stream that meets its deadline.

The four steps: export, build-engine, profile, stream. `aapt demo` runs them in a row on the
checkpoint that ships with the package.
"""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=_HELP,
)
app.add_typer(train_app, name="train")
for command in (doctor, measure.profile, measure.plan, measure.diff, measure.quality):
    app.command()(command)
app.command("import")(import_)
app.command()(prompt)

# The parser's UsageError, which has no public name.
_BadUsage: type[typer.BadParameter] = typer.BadParameter.__bases__[0]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"aapt {__version__}")
        raise typer.Exit


_Version = typer.Option(
    "--version", callback=_version, is_eager=True, help="Print the version and exit."
)


@app.callback()
def _options(version: Annotated[bool, _Version] = False) -> None:
    pass


@app.command()
def export(
    checkpoint: opt.CheckpointArg = None,
    out: opt.BundleOut = Path("bundle"),
    sha256: opt.Sha256 = None,
    precision: opt.ExportPrecision = "fp32",
    scales: opt.ScalesFile = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
) -> None:
    """Export a checkpoint to ONNX graphs and check each against PyTorch.

    Exit 8 if one disagrees.
    """
    from aapt_deploy.cli import console, reports

    _refuse_precision(precision, scales)
    with console.steps(f"exporting to {out}") as step:
        table, coverage = _export(checkpoint, out, sha256, force, step, precision == "fp8", scales)
    reports.parity(table, out)
    reports.coverage(coverage)
    if as_json:
        parity, shares = ([row._asdict() for row in rows] for rows in (table, coverage))
        typer.echo(json.dumps({"bundle": str(out), "parity": parity, "coverage": shares}))


@app.command("build-engine")
def build_engine(
    bundle: opt.BundleArg,
    backend: opt.Backend = "onnxruntime",
    precision: opt.BuildPrecision = None,
    attention: opt.Attention = "auto",
    sm: opt.TargetSms = None,
    portable: opt.Portable = False,
    as_json: opt.Json = False,
) -> None:
    """Build engines for this machine, measure each and compare it with fp32.

    TensorRT engines are compared with the exported graphs. Ctrl-C stops a TensorRT build at its
    next step. Run again, the command resumes with the plan that was not finished. TensorRT-RTX
    also builds plans for other machines' GPUs; those are neither measured nor compared here.
    """
    from aapt_deploy.cli import console, reports

    targets = opt.sms(sm)
    with console.phases(f"building {backend} engines in {bundle}") as step:
        built = _build(bundle, backend, precision, step, attention, step, targets, portable)
    reports.engines(built)
    if as_json:
        engines = [asdict(engine) for engine in built]
        typer.echo(json.dumps({"bundle": str(bundle), "engines": engines}))


@app.command()
def stream(
    bundle: opt.BundleArg,
    out: opt.StreamOut,
    format: opt.FormatName = None,
    seconds: opt.Seconds = None,
    seed: opt.Seed = 0,
    image: opt.Image = None,
    prompt: opt.Prompt = None,
    encoder: opt.Encoder = None,
    controls: opt.ControlLines = None,
    realtime: opt.Realtime = None,
    backend: opt.Backend = "onnxruntime",
    device: opt.Device = None,
    precision: opt.Precision = None,
    as_json: opt.Json = False,
) -> None:
    """Stream frames to a file, a pipe or another program, steered live.

    Exit 130 after Ctrl-C, with the file complete.
    """
    from aapt_deploy.cli import console, reports
    from aapt_deploy.stream.stream import Request

    paced, engine = controls == "-" if realtime is None else realtime, named(backend, device)
    start = (seed, image, prompt, controls)
    request = Request(out, format, seconds, *start, paced, engine, precision)
    if out == "-" and as_json:
        hint = "leave one of them out"
        raise UsageError("--json writes to stdout, and so does --out -", hint)
    with console.progress(f"streaming to {'stdout' if out == '-' else out}") as progress:
        if encoder is not None:
            request = replace(request, prompt=_encoded(bundle, prompt, encoder, progress))
        done = _stream(bundle, request, progress)
    reports.streamed(done)
    if as_json:
        typer.echo(json.dumps(asdict(done)))
    raise typer.Exit(128 + done.signal if done.signal else 0)


@app.command()
def demo(
    out: opt.DemoOut = Path("demo"), seconds: opt.DemoSeconds = 12.0, as_json: opt.Json = False
) -> None:
    """Export, build, profile and stream the embedded checkpoint.

    Ends with the verdict and the video's path. Exit 3 if the budget is missed.
    """
    from aapt_deploy.bundle.bundle import Bundle
    from aapt_deploy.cli import reports

    bundle, video = out / "bundle", out / "demo.mp4"
    _make_demo_folder(out, seconds)
    latency = _four_steps(bundle, video, seconds)
    reports.demo(latency, video, Bundle.open(bundle))
    if as_json:
        paths = {"video": str(video), "bundle": str(bundle)}
        typer.echo(json.dumps(paths | {"latency": json.loads(latency.json())}))
    raise typer.Exit(0 if latency.within_budget else VerdictError.exit_code)


@app.command()
def init(
    profile: opt.ProfileArg,
    out: opt.CheckpointOut = Path("random.safetensors"),
    seed: opt.WeightSeed = 0,
    device: opt.WeightDevice = "cpu",
    force: opt.Force = False,
) -> None:
    """Write a checkpoint of random weights, to size an engine.

    A GPU needs none: aapt profile PROFILE --backend torch --device cuda.
    """
    from aapt_deploy import profiles
    from aapt_deploy.cli import console

    shape = profiles.load(profile)
    with needs_extra("export"), console.steps(f"drawing weights for {shape.name}"):
        from aapt_deploy.models.random_weights import random_checkpoint

        count = random_checkpoint(shape, out, seed, device, force)
    console.say(f"{out}: {count / 1e6:.1f} M parameters, {out.stat().st_size / 1e6:.1f} MB")


def _refuse_precision(precision: str, scales: Path | None) -> None:
    """Raise UsageError if `aapt export` lacks this precision, or if it takes no scales."""
    if precision not in ("fp32", "fp8"):
        hint = "precisions: fp32, fp8; int8 is made by build-engine"
        raise UsageError(f"graphs cannot be exported in {precision!r}", hint)
    if scales is not None and precision != "fp8":
        raise UsageError(f"--scales {scales} is for fp8 graphs", "add --precision fp8")


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

        path = checkpoint or assets.CHECKPOINT
        stored = checkpoints.stored(path, sha256 if checkpoint else assets.checkpoint_sha256())
        chosen = None
        if in_fp8 and scales_file is not None:
            chosen = scales.load(scales_file, stored.profile)
        elif in_fp8:
            with needs_extra("fp8"):
                from aapt_deploy.bundle import bundle
                from aapt_deploy.export import calibrate

                bundle.refuse_existing(out, force)  # before hours of calibration
                chosen = calibrate.calibrate(checkpoints.load(path, stored.sha256), report)
        table = export.export_bundle(stored, out, force, report, chosen)
        return table, export.coverage(stored.profile, chosen)


def _build(
    bundle: Path,
    backend: str,
    precision: str | None,
    report: Callable[[str], None],
    attention: str = "auto",
    progress: "Progress | None" = None,
    sms: tuple[int, ...] = (),
    portable: bool = False,
) -> "list[Built]":
    from aapt_deploy.bundle.bundle import Bundle

    opened = Bundle.open(bundle)
    with needs_extra("export"):
        from aapt_deploy.backends import build, trial

        options = trial.BuildOptions(report, attention, sms, progress, portable)
        return build.build_engine(opened, backend, precision, options)


def _stream(bundle: Path, request: "Request", progress: Callable[[str], None]) -> "Streamed":
    from aapt_deploy.bundle.bundle import Bundle
    from aapt_deploy.cli import console

    opened = Bundle.open(bundle)
    with needs_extra("export"):
        from aapt_deploy.stream import stream

        return stream.stream(opened, request, console.warn, progress)


def _encoded(bundle: Path, prompt: str | None, encoder: Path, report: Callable[[str], None]) -> str:
    """Return the file of a prompt's vectors. Raises UsageError without a prompt."""
    from aapt_deploy.bundle.bundle import Bundle

    if not prompt:
        raise UsageError(f"--encoder {encoder} needs words to encode", "add --prompt")
    tokens = Bundle.open(bundle).profile.text.tokens
    with needs_extra("text"):
        from aapt_deploy.export import text_encoder

        return str(text_encoder.encode([prompt], encoder, tokens, "bf16", report)[0])


def _make_demo_folder(out: Path, seconds: float) -> None:
    """Make the demo's folder. Refuses a wrong length first, before a minute of work."""
    from aapt_deploy.profiles import load
    from aapt_deploy.stream.stream import frame_count

    frame_count(load("demo-cpu"), seconds)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"{out} cannot be written: {error.strerror}"
        raise OutputError(what, "name another folder with --out") from None


def _four_steps(bundle: Path, video: Path, seconds: float) -> "Latency":
    """Run the four steps of a deployment and report each."""
    from aapt_deploy.assets import demo_controls
    from aapt_deploy.cli import console, reports
    from aapt_deploy.stream.stream import Request

    force = (bundle / "manifest.json").exists()
    with console.steps("1/4 export") as step:
        reports.parity(_export(None, bundle, None, force, step)[0], bundle)
    with console.steps("2/4 build-engine") as step:
        reports.engines(_build(bundle, "onnxruntime", None, step))
    with console.progress("3/4 profile") as progress:
        latency = measured_latency(bundle, "onnxruntime", None, 60, progress)
    reports.latency(latency)
    request = Request(str(video), seconds=seconds, controls=str(demo_controls()))
    with console.progress("4/4 stream") as progress:
        reports.streamed(_stream(bundle, request, progress))
    return latency


def main() -> None:
    """Run the command line. The one place where an error becomes two lines and an exit code."""
    try:
        sys.exit(_run())
    except AaptError as error:
        from aapt_deploy.cli import console

        console.fail(str(error), error.hint)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _run() -> int:
    """Run the command of sys.argv and return its exit code.

    Raises UsageError if the words cannot be parsed.
    """
    try:
        return app(prog_name="aapt", standalone_mode=False) or 0
    except _BadUsage as error:
        from aapt_deploy.cli import console

        help_text = error.ctx.get_help() if error.ctx else ""
        if error.format_message() == help_text:  # a group without a command
            console.say(help_text)
            return UsageError.exit_code
        parser = typer.main.get_command(app)
        path = error.ctx.command_path if error.ctx else opt.command_named(parser, sys.argv[1:])
        raise UsageError(error.format_message(), f"see: {path} --help") from None
