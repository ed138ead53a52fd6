"""`aapt profile`, `plan`, `diff` and `quality`: what a bundle costs and what a precision loses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aapt_deploy.backends.table import BACKENDS, named
from aapt_deploy.cli.options import Backend, BundleArg, Device, Json, Precision
from aapt_deploy.errors import VerdictError, needs_extra

if TYPE_CHECKING:
    from aapt_deploy.measure.latency import Latency
    from aapt_deploy.measure.quality import Loss
    from aapt_deploy.models.cost import Cost
    from aapt_deploy.profiles import Profile


def profile(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory; with --device cuda also a preset or a TOML file.", metavar="BUNDLE")],
    backend: Backend = "onnxruntime",
    device: Device = None,
    precision: Precision = None,
    blocks: Annotated[int, typer.Option(min=10, help="Blocks to measure after the cold ones.")] = 120,
    as_json: Json = False,
) -> None:
    """Measure step latency against the frame budget (4 frames at 24 fps: 166.7 ms). Exit 3 if it is missed.

    With --device cuda a preset or a TOML file will do as well: random weights are drawn on the GPU.
    """
    from aapt_deploy.cli import console, reports

    with console.progress(f"profiling {bundle}") as progress:
        latency = measured_latency(bundle, named(backend, device), precision, blocks, progress)
    reports.latency(latency)
    if as_json:
        typer.echo(latency.json())
    raise typer.Exit(0 if latency.within_budget else VerdictError.exit_code)


def plan(
    preset: Annotated[str, typer.Argument(help="Preset, TOML file or bundle directory.", metavar="PROFILE")],
    as_json: Json = False,
) -> None:
    """Estimate memory and the minimum step time on the profile's GPU; runs nothing. Exit 3 if the profile does not fit."""
    from aapt_deploy.cli import reports

    cost = _cost(preset)
    reports.plan(cost)
    if as_json:
        typer.echo(cost.json())
    raise typer.Exit(0 if cost.fits else VerdictError.exit_code)


def diff(
    a: Annotated[Path, typer.Argument(help="Record of `aapt profile --json`.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="The record to compare with it.", metavar="B")],
    as_json: Json = False,
) -> None:
    """Compare two records of `aapt profile --json`, stage by stage."""
    from aapt_deploy.cli import reports
    from aapt_deploy.measure.diff import difference

    found = difference(a, b)
    reports.difference(found)
    if as_json:
        typer.echo(found.json())


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
    from aapt_deploy.cli import console, reports

    with needs_extra("train"):
        from aapt_deploy.measure.quality import plotter

        draw = plotter(plot)  # refused now, and not after minutes of measuring
    with console.progress(f"comparing engines of {bundle}") as progress:
        loss = _quality((bundle, reference_bundle), named(backend, device), precision, reference, seconds, progress)
    reports.quality(loss)
    if as_json:
        typer.echo(loss.json())
    draw(loss)
    raise typer.Exit(VerdictError.exit_code if loss.failures else 0)


def measured_latency(bundle: Path, backend: str, precision: str | None, blocks: int, progress: Callable[[str], None]) -> "Latency":
    from aapt_deploy import profiles
    from aapt_deploy.bundle.bundle import Bundle
    from aapt_deploy.cli import console

    from_profile = backend in BACKENDS and not BACKENDS[backend].needs_build
    opened = None if from_profile and not bundle.is_dir() else Bundle.open(bundle)  # None: a profile, to be measured with random weights
    shape = opened.profile if opened else profiles.load(str(bundle))
    with needs_extra("export"):
        from aapt_deploy.measure import latency

        if opened:
            measured = latency.measure_bundle(opened, backend, precision, blocks, console.warn, progress)
        else:
            measured = latency.measure_random(shape, precision, blocks, progress)
    return replace(measured, floor_ms=_floors(shape))


def _floors(shape: "Profile") -> dict[str, float]:
    """The floor of each stage on the profile's target; none for a CPU, nor where torch is missing, which counts the operations."""
    if shape.target.device == "cpu":
        return {}
    try:
        from aapt_deploy.models.cost import cost_of
    except ModuleNotFoundError:
        return {}
    return cost_of(shape).floors_ms


def _cost(preset: str) -> "Cost":
    from aapt_deploy import profiles
    from aapt_deploy.bundle.bundle import Bundle

    shape = Bundle.open(Path(preset)).profile if Path(preset).is_dir() else profiles.load(preset)
    with needs_extra("export"):
        from aapt_deploy.models import cost

        return cost.cost_of(shape)


def _quality(
    bundles: tuple[Path, Path | None], backend: str, precision: str | None, reference: str | None, seconds: int, progress: Callable[[str], None]
) -> "Loss":
    from aapt_deploy.bundle.bundle import Bundle
    from aapt_deploy.cli import console

    opened, other = Bundle.open(bundles[0]), Bundle.open(bundles[1]) if bundles[1] else None
    with needs_extra("export"):
        from aapt_deploy.backends.table import precision_of
        from aapt_deploy.measure import quality

        reference = reference or ("torch-bf16" if opened.manifest.get("precision") == "fp8" else "onnxruntime-fp32")
        return quality.compare(opened, reference, f"{backend}-{precision_of(opened, backend, precision)}", seconds, console.warn, progress, other)
