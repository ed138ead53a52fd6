"""`aapt build-engine --backend tensorrt`: build plans for this GPU, each checked.

    1  machine     TensorRT, GPU, driver; the best form of attention that the doctor has proved
    2  room        the profile's memory against the device's free memory, before hours of work
    3  each graph  lower, parse, count plugin layers, build, keep timings, audit the plan's layers.
                   A finished plan is kept: a stopped build resumes, equal inputs build nothing
    4  together    open the engine, compare it with ONNX Runtime on the exported graphs, time it
    5  manifest    plans, scales, receipts, audit: all at once, or nothing

If nothing is proved, or a proved form fails to build, TensorRT's own attention is taken and the
reason reported. No form is taken silently.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aapt_deploy.backends.trial import BuildOptions, Built, Progress, Report, median_step_ms
from aapt_deploy.backends.trt import cuda, plan_file
from aapt_deploy.backends.trt.doctor import receipts
from aapt_deploy.backends.trt.doctor.receipts import AOT, NATIVE, PYTHON, Choice
from aapt_deploy.backends.trt.engine import RunOptions, TrtEngines
from aapt_deploy.backends.trt.lower import Lowered, lower
from aapt_deploy.backends.trt.parity import compare, start_of
from aapt_deploy.backends.trt.plan_file import Receipt, graph_sha256
from aapt_deploy.backends.trt.remedies import SMALLER
from aapt_deploy.bundle.bundle import Bundle, Stage
from aapt_deploy.bundle.files import free_memory_bytes, writing
from aapt_deploy.bundle.scales import FILE as SCALES
from aapt_deploy.bundle.scales import load as load_scales
from aapt_deploy.errors import BundleError, MachineError, ParityError
from aapt_deploy.models.cost import WORKSPACE_GB, cost_of
from aapt_deploy.models.family import family_of
from aapt_deploy.ops.block_causal_attention import hopper_fp8, kernels
from aapt_deploy.profiles import Profile

if TYPE_CHECKING:
    from aapt_deploy.backends.trt import api

BACKEND = "tensorrt"
RECIPE = 1  # of this module; a plan of another one is not kept
FP8_SM = 89
ROOM = "free some space, or set XDG_CACHE_HOME to a place that has it"
LEAST_HOST_SHARE = 3  # host memory / weights reported by others; below it we only warn


@dataclass(frozen=True)
class Order:
    """What all graphs of one build have in common."""

    bundle: Bundle
    precision: str
    choice: Choice
    here: cuda.Gpu
    scales: list[hopper_fp8.Scales] | None
    report: Report
    progress: Progress | None

    @property
    def key(self) -> str:
        return f"{BACKEND}-{self.precision}"


@dataclass(frozen=True)
class Finished:
    """One plan and what was recorded about it."""

    path: Path
    inputs: str  # hash of everything that it was made from
    audit: dict[str, int]


def build(bundle: Bundle, precisions: Sequence[str], options: BuildOptions) -> list[Built]:
    """Build the engine of each of `precisions`.

    Raises MachineError without TensorRT, GPU or room. Raises BundleError for a damaged bundle or
    a graph that TensorRT refuses. Raises ParityError for a plan that is not what was asked for,
    or computes something else.
    """
    return [_build(bundle, precision, options) for precision in precisions]


def _build(bundle: Bundle, precision: str, options: BuildOptions) -> Built:
    began, report = time.monotonic(), options.report
    from aapt_deploy.backends.trt import api

    version = api.version()
    device = cuda.with_driver()
    try:
        here = device.gpu(version, kernels.source_hash())
        scales = None
        if precision == "fp8":
            scales = load_scales(bundle.checked(SCALES), bundle.profile).attention
        _check_machine(bundle.profile, precision, device, report)
        choices = _choices(here, options.attention, scales is not None)
    finally:
        device.close()
    order = Order(bundle, precision, choices[0], here, scales, report, options.progress)
    with bundle.add_engine(order.key) as stage:
        order, finished = _all_plans(order, choices, stage.folder)
        _place(stage, order, finished)
        parity, step_ms = _prove(order, stage)
        psnr_db, seconds = parity.pop("psnr_db"), round(time.monotonic() - began, 1)
        built = Built(order.key, round(step_ms, 2), stage.size, 1, False, psnr_db, seconds)
        stage.entry |= {"parity": parity} | asdict(built)
    for done in finished.values():
        _forget(done)
    return built


def _check_machine(profile: Profile, precision: str, device: cuda.Device, report: Report) -> None:
    """Refuse, before any work, a build that cannot succeed."""
    target = profile.target
    if precision == "fp8" and device.sm < FP8_SM:
        raise MachineError(
            f"GPU {device.name} is SM {device.sm}; products in FP8 need SM {FP8_SM}",
            "export with --precision fp32 and build with --precision bf16",
        )
    if target.sm and target.sm != device.sm:
        made_for = f"was made for {target.name} (SM {target.sm})"
        report(f"profile {profile.name} {made_for}; this is {device.name} (SM {device.sm})")
    needed = cost_of(profile)
    free_gb = device.free_bytes / 1e9
    if needed.total_gb > free_gb:
        parts = ", ".join(f"{name} {gb:.2f}" for name, gb in needed.memory_gb.items())
        free = f"{free_gb:.2f} GB are free on {device.name}"
        text = f"profile {profile.name} needs {needed.total_gb:.2f} GB ({parts}); {free}"
        raise MachineError(text, SMALLER)
    host_gb, wanted_gb = free_memory_bytes() / 1e9, LEAST_HOST_SHARE * needed.memory_gb["weights"]
    if host_gb < wanted_gb:
        taken = f"TensorRT may take {wanted_gb:.1f} GB while it builds"
        report(f"warning: {host_gb:.1f} GB of host memory are free; {taken}")


def _choices(here: cuda.Gpu, attention: str, fp8: bool) -> list[Choice]:
    """Return the forms to try, in order. Raises MachineError if the wanted one is not proved."""
    choices = receipts.choose(receipts.load(here), fp8)
    if attention == "auto":
        return choices
    wanted = [choice for choice in choices if choice.form == attention]
    if not wanted:
        hint = "aapt doctor --tensorrt, and read what it finds"
        reason = choices[-1].reason
        raise MachineError(f"attention in form {attention!r} is not proved here: {reason}", hint)
    return wanted


# Plans


def _all_plans(
    order: Order, choices: Sequence[Choice], folder: Path
) -> tuple[Order, dict[str, Finished]]:
    """Build every graph's plan, the generator in the first of `choices` that builds.

    Returns `order` with that form, and the plans.
    """
    chosen, generator = _generator(order, choices, folder)
    graphs = family_of(order.bundle.profile).signatures(order.bundle.profile)
    plans = {name: _one_plan(chosen, name, folder) for name in graphs if name != "generator"}
    return chosen, {**plans, "generator": generator}


def _generator(order: Order, choices: Sequence[Choice], folder: Path) -> tuple[Order, Finished]:
    """Build the largest plan first: what fails, fails early."""
    for index, choice in enumerate(choices, 1):
        order = replace(order, choice=choice)
        order.report(f"{order.key}: attention in form {choice.form} ({choice.reason})")
        try:
            return order, _one_plan(order, "generator", folder)
        except (BundleError, ParityError, MachineError) as error:
            if index == len(choices):
                raise
            failed = f"attention in form {choice.form} failed: {error}"
            order.report(f"warning: {failed}; going on with {choices[index].form}")
    raise AssertionError("no form of attention")


def _one_plan(order: Order, graph: str, folder: Path) -> Finished:
    """Build the plan of one graph, or take a kept one. Raises what build and audit raise."""
    from aapt_deploy.backends.trt import api

    inputs = inputs_hash(order, graph)
    if kept := _kept(order, graph, inputs):
        order.report(f"{order.key}: {graph} is built already")
        return kept
    place = Path(tempfile.mkdtemp(prefix="lowered-", dir=folder))
    try:
        order.report(f"{order.key}: lowering {graph}")
        lowered = lower(order.bundle, graph, order.precision, order.choice, order.scales, place)
        failures = _register(order, lowered)
        cache = receipts.timing_cache_file(order.here)
        timings = cache.read_bytes() if cache.is_file() else b""
        workspace = round(WORKSPACE_GB * 1e9)
        settings = api.Settings(lowered.plugin_layers, workspace, timing_cache=timings)
        order.report(f"{order.key}: building {graph}")
        built = api.build(lowered.path, settings, order.progress, failures, api.Messages())
        path = _unfinished(inputs)
        with writing(path, ROOM):
            receipts.write_whole(path, built.plan)
        with contextlib.suppress(OSError):  # without timings the next build is slower, and no worse
            receipts.write_whole(cache, built.timing_cache)
        try:
            audit = audited(api.open_plan(path), lowered, order, graph)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    finally:
        shutil.rmtree(place, ignore_errors=True)
    with writing(path, ROOM):
        note = {"sha256": _sha256(path), "audit": audit}
        receipts.write_whole(path.with_suffix(".json"), json.dumps(note).encode())  # finished now
    return Finished(path, inputs, audit)


def inputs_hash(order: Order, graph: str) -> str:
    """Return the sha256 of everything that a plan is made from; equal inputs, same plan."""
    files = order.bundle.manifest["files"]
    ours = graph == "generator" and order.choice.form != NATIVE
    stored = (f"{graph}.onnx", f"{graph}.onnx.data")
    form = [order.choice.form, order.choice.packed]
    made_from = {
        "recipe": RECIPE, "graph": graph, "precision": order.precision,
        "tensorrt": order.here.tensorrt, "sm": order.here.sm,
        "files": [files.get(name, {}).get("sha256") for name in stored],
        "attention": form if graph == "generator" else None,
        "kernels": order.here.kernels if ours else None,
        "scales": files[SCALES]["sha256"] if ours else None,
        "workspace": WORKSPACE_GB,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _register(order: Order, lowered: Lowered) -> Sequence[Exception]:
    """Register our plugin before the graph is parsed; return the list of what it raised.

    Needs the device's context, which stays current.
    """
    if not lowered.plugin_layers:
        return ()
    if order.choice.form == PYTHON:
        from aapt_deploy.backends.trt.plugin import python as python_plugin

        # Compiled and loaded now, not while TensorRT measures.
        kernels.launcher(hopper_fp8.NAME, order.bundle.profile.head_dim)
        return python_plugin.register(kernels.launcher).failures
    from aapt_deploy.backends.trt.plugin import ahead_of_time

    ahead_of_time.define_once(kernels.ptx_launch)
    return ()


def audited(plan_: "api.Plan", lowered: Lowered, order: Order, graph: str) -> dict[str, int]:
    """Count the layers of a plan. Raises ParityError, naming layers, if it is not as wanted."""
    layers = plan_.layers()
    found = plan_file.audit(layers, lowered.plugin_layers, len(lowered.fp8_products))
    nodes, products = lowered.attention_layers, len(lowered.fp8_products)
    wanted = {"plugins": lowered.plugin_layers, "fp8": products, "attention": nodes}
    order.report(
        f"{order.key}: {graph} has {found.layers} layers: {found.plugins} of our kernels, "
        f"{found.attention} of TensorRT's attention (of {nodes} nodes), "
        f"{found.fp8} in FP8 (at least {products} expected), {found.reformats} reformats"
    )
    if found.attention < nodes:
        unfused = f"{nodes - found.attention} attention nodes of {graph}"
        order.report(f"warning: {unfused} run unfused, which is slow")
    if found.reformats > order.bundle.profile.model.depth:
        names = [layer.name for layer in layers if layer.is_reformat]
        shown = ", ".join(names[: plan_file.SHOWN])
        order.report(f"warning: {found.reformats} reformats, such as {shown}")
    return asdict(found) | {f"{name}_expected": count for name, count in wanted.items()}


# Plans of earlier builds


def _unfinished(inputs: str) -> Path:
    """Return where a plan waits: in this user's caches, because an opened plan is trusted."""
    return receipts.cache_folder() / "unfinished" / f"{inputs}.plan"


def _kept(order: Order, graph: str, inputs: str) -> Finished | None:
    """Return a whole plan from the same inputs: of a stopped build or of the bundle's engine."""
    waiting = _unfinished(inputs)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        note = json.loads(waiting.with_suffix(".json").read_bytes())
        if note["sha256"] == _sha256(waiting):
            return Finished(waiting, inputs, dict(note["audit"]))
    entry = order.bundle.engines.get(order.key, {})
    with contextlib.suppress(BundleError, KeyError, TypeError):
        driver = entry["receipts"][graph]["driver"]
        if entry["inputs"][graph] == inputs and driver == order.here.driver:
            path = order.bundle.checked(entry["graphs"][graph])
            return Finished(path, inputs, dict(entry["audit"][graph]))
    return None


def _forget(finished: Finished) -> None:
    """Remove a kept plan that the bundle has now."""
    for suffix in (".plan", ".json"):
        _unfinished(finished.inputs).with_suffix(suffix).unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The engine


def _place(stage: Stage, order: Order, finished: dict[str, Finished]) -> None:
    """Put plans, scales and their part of the manifest into the stage."""
    for name, done in finished.items():
        target = stage.path / f"{name}.plan"
        try:
            os.link(done.path, target)
        except OSError:  # another file system
            shutil.copyfile(done.path, target)
    ours = order.choice.form != NATIVE
    listed, receipts = order.bundle.manifest["files"], {}
    for name in finished:
        sha256 = graph_sha256(listed, name)
        receipts[name] = Receipt.of_build(order.here, ours and name == "generator", sha256)
    stage.entry |= {
        "backend": BACKEND, "precision": order.precision,
        "plugin": order.choice.form, "reason": order.choice.reason,
        "cache_layout": "hopper_fp8" if ours else "token_major",
        "cuda_graph": order.choice.captured,
        "graphs": {name: f"{stage.relative}/{name}.plan" for name in finished},
        "receipts": {name: receipt.to_dict() for name, receipt in receipts.items()},
        "inputs": {name: done.inputs for name, done in finished.items()},
        "audit": {name: done.audit for name, done in finished.items()},
    }  # fmt: skip
    if ours and order.scales is not None:
        # The plan has them as constants; the runtime packs prompts with them.
        shutil.copyfile(order.bundle.checked(SCALES), stage.path / SCALES)
        stage.entry["scales"] = f"{stage.relative}/{SCALES}"


def _prove(order: Order, stage: Stage) -> tuple[dict[str, Any], float]:
    """Open the engine as a stream would, compare it with the exported graphs, then time it.

    Returns the figures and the median ms of a step.
    """
    from aapt_deploy.backends.trt import api

    bundle, profile = order.bundle, order.bundle.profile
    if order.choice.form == PYTHON:
        from aapt_deploy.backends.trt.plugin import python as python_plugin

        python_plugin.register(kernels.launcher)
    order.report(f"{order.key}: opening the plans")
    device = cuda.with_driver()
    try:
        graphs = family_of(profile).signatures(profile)
        plans = {name: api.open_plan(stage.path / f"{name}.plan") for name in graphs}
    except BaseException:
        device.close()
        raise
    scales = order.scales if order.choice.form in (PYTHON, AOT) and order.scales else []
    options = RunOptions(order.choice.captured, scales)
    engines = TrtEngines(profile, plans, device, order.precision, options)
    try:
        first = start_of(bundle)
        order.report(f"{order.key}: comparing with the exported graphs in ONNX Runtime")
        figures = compare(engines, bundle, first)
        said = ", ".join(f"{name} {value}" for name, value in figures.items())
        order.report(f"{order.key}: {said}")
        return figures, median_step_ms(engines, profile, first)
    finally:
        engines.close()
