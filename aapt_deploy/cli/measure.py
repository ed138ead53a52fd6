"""`aapt profile`, `plan`, `diff` and `quality`: what a bundle costs and what a precision loses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from aapt_deploy.backends.table import BACKENDS, named
from aapt_deploy.cli import options as opt
from aapt_deploy.errors import VerdictError, needs_extra

if TYPE_CHECKING:
    from aapt_deploy.measure.latency import Latency
    from aapt_deploy.measure.quality import Loss
    from aapt_deploy.models.cost import Cost
    from aapt_deploy.profiles import Profile


def profile(
    bundle: opt.BundleOrPreset,
    backend: opt.Backend = "onnxruntime",
    device: opt.Device = None,
    precision: opt.Precision = None,
    blocks: opt.Blocks = 120,
    as_json: opt.Json = False,
) -> None:
    """Measure step latency against the frame budget (4 frames at 24 fps: 166.7 ms).

    Exit 3 if it is missed. With --device cuda a preset or a TOML file will do as well: random
    weights are drawn on the GPU.
    """
    from aapt_deploy.cli import console, reports

    with console.progress(f"profiling {bundle}") as progress:
        latency = measured_latency(bundle, named(backend, device), precision, blocks, progress)
    reports.latency(latency)
    if as_json:
        typer.echo(latency.json())
    raise typer.Exit(0 if latency.within_budget else VerdictError.exit_code)


def plan(preset: opt.Preset, gpu: opt.Gpu = None, as_json: opt.Json = False) -> None:
    """Estimate memory and the minimum step time on the profile's GPU; runs nothing.

    Exit 3 if the profile does not fit.
    """
    from aapt_deploy.cli import reports

    cost = _cost(preset, gpu)
    reports.plan(cost)
    if as_json:
        typer.echo(cost.json())
    raise typer.Exit(0 if cost.fits else VerdictError.exit_code)


def diff(a: opt.RecordA, b: opt.RecordB, as_json: opt.Json = False) -> None:
    """Compare two records of `aapt profile --json`, stage by stage."""
    from aapt_deploy.cli import reports
    from aapt_deploy.measure.diff import difference

    found = difference(a, b)
    reports.difference(found)
    if as_json:
        typer.echo(found.json())


def quality(
    bundle: opt.BundleArg,
    backend: opt.Backend = "onnxruntime",
    device: opt.Device = None,
    precision: opt.Precision = None,
    reference: opt.Reference = None,
    reference_bundle: opt.ReferenceBundle = None,
    seconds: opt.RolloutSeconds = 5,
    plot: opt.Plot = None,
    as_json: opt.Json = False,
) -> None:
    """Measure what a precision costs: latents, frames and drift against another engine.

    Exit 3 if a threshold is missed.
    """
    from aapt_deploy.cli import console, reports

    draw, bundles = _plotter(plot), (bundle, reference_bundle)
    with console.progress(f"comparing engines of {bundle}") as progress:
        engine = named(backend, device)
        loss = _quality(bundles, engine, precision, reference, seconds, progress)
    reports.quality(loss)
    if as_json:
        typer.echo(loss.json())
    draw(loss)
    raise typer.Exit(VerdictError.exit_code if loss.failures else 0)


def measured_latency(
    bundle: Path, backend: str, precision: str | None, blocks: int, progress: Callable[[str], None]
) -> "Latency":
    """Measure a bundle or, if the backend needs no build, a profile with random weights."""
    from aapt_deploy import profiles
    from aapt_deploy.bundle.bundle import Bundle
    from aapt_deploy.cli import console

    from_profile = backend in BACKENDS and not BACKENDS[backend].needs_build
    opened = None if from_profile and not bundle.is_dir() else Bundle.open(bundle)
    shape = opened.profile if opened else profiles.load(str(bundle))
    with needs_extra("export"):
        from aapt_deploy.measure import latency

        if opened:
            run = (opened, backend, precision, blocks, console.warn, progress)
            measured = latency.measure_bundle(*run)
        else:
            measured = latency.measure_random(shape, precision, blocks, progress)
    return replace(measured, floor_ms=_floors(shape))


def _floors(shape: "Profile") -> dict[str, float]:
    """Return the minimum time of each stage on the profile's target.

    Empty for a CPU, and without torch, which counts the operations.
    """
    if shape.target.device == "cpu":
        return {}
    try:
        from aapt_deploy.models.cost import cost_of
    except ModuleNotFoundError:
        return {}
    return cost_of(shape).floors_ms


def _cost(preset: str, gpu: str | None) -> "Cost":
    from aapt_deploy import profiles
    from aapt_deploy.bundle.bundle import Bundle

    is_bundle = Path(preset).is_dir()
    shape = Bundle.open(Path(preset)).profile if is_bundle else profiles.load(preset)
    with needs_extra("export"):
        from aapt_deploy.models import cost

        return cost.cost_of(shape if gpu is None else cost.on_gpu(shape, gpu))


def _plotter(plot: Path | None) -> "Callable[[Loss], None]":
    """Return what plots a Loss. Refuses a bad path now, before minutes of measuring."""
    with needs_extra("train"):
        from aapt_deploy.measure.quality import plotter

        return plotter(plot)


def _quality(
    bundles: tuple[Path, Path | None],
    backend: str,
    precision: str | None,
    reference: str | None,
    seconds: int,
    progress: Callable[[str], None],
) -> "Loss":
    from aapt_deploy.bundle.bundle import Bundle
    from aapt_deploy.cli import console

    opened, other = Bundle.open(bundles[0]), Bundle.open(bundles[1]) if bundles[1] else None
    with needs_extra("export"):
        from aapt_deploy.backends.table import precision_of
        from aapt_deploy.measure import quality

        in_fp8 = opened.manifest.get("precision") == "fp8"
        reference = reference or ("torch-bf16" if in_fp8 else "onnxruntime-fp32")
        candidate = f"{backend}-{precision_of(opened, backend, precision)}"
        run = (opened, reference, candidate, seconds, console.warn, progress, other)
        return quality.compare(*run)
