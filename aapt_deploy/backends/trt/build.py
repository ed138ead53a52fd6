"""`aapt build-engine --backend tensorrt` and `tensorrt-rtx`: build plans, each checked.

    1  order       TensorRT, GPU, targets; the best form of attention that is proved (order.py)
    2  each graph  lower, parse, count plugin layers, build, keep timings, audit the plan's layers.
                   A finished plan is kept: a stopped build resumes, equal inputs build nothing
    3  together    open the engine, compare it with ONNX Runtime on the exported graphs, time it
    4  manifest    plans, scales, receipts, audit: all at once, or nothing

If nothing is proved, or a proved form fails to build, TensorRT's own attention is taken and the
reason reported. No form is taken silently. Plans for another GPU than this machine's are built and
not run: nothing is compared or timed, and the manifest says so.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aapt_deploy.backends.trial import BuildOptions, Built, median_step_ms
from aapt_deploy.backends.trt import cuda, kept_plans, plan_file
from aapt_deploy.backends.trt.doctor import receipts
from aapt_deploy.backends.trt.doctor.receipts import OURS, PYTHON, Choice
from aapt_deploy.backends.trt.engine import RunOptions, TrtEngines
from aapt_deploy.backends.trt.flavour import PROPER, Flavour
from aapt_deploy.backends.trt.kept_plans import Finished
from aapt_deploy.backends.trt.loading import api_of
from aapt_deploy.backends.trt.lower import Lowered, lower
from aapt_deploy.backends.trt.order import Order, take_order
from aapt_deploy.backends.trt.parity import compare, start_of
from aapt_deploy.backends.trt.plan_file import Receipt, graph_sha256
from aapt_deploy.bundle.bundle import Bundle, Stage
from aapt_deploy.bundle.files import writing
from aapt_deploy.bundle.scales import FILE as SCALES
from aapt_deploy.errors import BundleError, MachineError, ParityError
from aapt_deploy.models.family import family_of
from aapt_deploy.ops.block_causal_attention import hopper_fp8, kernels

if TYPE_CHECKING:
    from aapt_deploy.backends.trt import api

ROOM = "free some space, or set XDG_CACHE_HOME to a place that has it"


def build(
    bundle: Bundle, precisions: Sequence[str], options: BuildOptions, flavour: Flavour = PROPER
) -> list[Built]:
    """Build the engine of each of `precisions`.

    Raises MachineError without TensorRT, GPU or room. Raises BundleError for a damaged bundle or
    a graph that TensorRT refuses. Raises ParityError for a plan that is not what was asked for,
    or computes something else.
    """
    return [_build(bundle, precision, options, flavour) for precision in precisions]


def _build(bundle: Bundle, precision: str, options: BuildOptions, flavour: Flavour) -> Built:
    began = time.monotonic()
    order, choices = take_order(bundle, precision, options, flavour)
    with bundle.add_engine(order.key) as stage:
        order, finished = _all_plans(order, choices, stage.folder)
        _place(stage, order, finished)
        parity, step_ms = _prove(order, stage) if order.runs_here else ({}, None)
        psnr_db, seconds = parity.pop("psnr_db", None), round(time.monotonic() - began, 1)
        built = Built(order.key, step_ms, stage.size, 1, False, psnr_db, seconds)
        stage.entry |= {"parity": parity} | asdict(built)
    for done in finished.values():
        kept_plans.forget(done)
    return built


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
    inputs = kept_plans.inputs_hash(order, graph)
    if kept := kept_plans.kept(order, graph, inputs):
        order.report(f"{order.key}: {graph} is built already")
        return kept
    place = Path(tempfile.mkdtemp(prefix="lowered-", dir=folder))
    try:
        order.report(f"{order.key}: lowering {graph}")
        lowered = lower(order.bundle, graph, order.precision, order.choice, order.scales, place)
        path = kept_plans.unfinished(inputs)
        _write_plan(order, graph, lowered, path)
        try:
            audit = _audit(order, graph, lowered, path) if order.runs_here else {}
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    finally:
        shutil.rmtree(place, ignore_errors=True)
    with writing(path, ROOM):
        note = {"sha256": kept_plans.sha256_of(path), "audit": audit}
        receipts.write_whole(path.with_suffix(".json"), json.dumps(note).encode())  # finished now
    return Finished(path, inputs, audit)


def may_decompose(graph: str, precision: str) -> bool:
    """Return whether attention may run unfused: in fp32, and where it is a VAE's single head.

    The generator's must be fused in bf16. A plan with unfused attention would miss every deadline.
    """
    return precision == "fp32" or graph != "generator"


def _write_plan(order: Order, graph: str, lowered: Lowered, path: Path) -> None:
    """Build the plan of a lowered graph into the file `path`, and keep the timings."""
    api, flavour = api_of(order.flavour), order.flavour
    failures = _register(order, lowered)
    cache, timings = None, b""
    if flavour.timing_cache and order.here:
        cache = receipts.timing_cache_file(order.here)
        timings = cache.read_bytes() if cache.is_file() else b""
    settings = api.Settings(
        lowered.plugin_layers, kept_plans.workspace_bytes(order, graph),
        decomposable=may_decompose(graph, order.precision), sms=order.sms if flavour.sms else (),
        portable=order.portable, timing_cache=timings,
    )  # fmt: skip
    order.report(f"{order.key}: building {graph}")
    built = api.build(lowered.path, settings, order.progress, failures, api.Messages())
    with writing(path, ROOM):
        receipts.write_whole(path, built.plan)
    if cache:
        with contextlib.suppress(OSError):  # without timings the next build is slower, and no worse
            receipts.write_whole(cache, built.timing_cache)


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


def _audit(order: Order, graph: str, lowered: Lowered, path: Path) -> dict[str, int]:
    """Open a plan and audit it. What TensorRT-RTX compiles later is only reported."""
    try:
        return audited(api_of(order.flavour).open_plan(path), lowered, order, graph)
    except (BundleError, ParityError) as error:
        if not order.flavour.compiles_here:
            raise
        order.report(f"warning: {error}")
        return {}


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


# The engine


def _place(stage: Stage, order: Order, finished: dict[str, Finished]) -> None:
    """Put plans, scales and their part of the manifest into the stage."""
    for name, done in finished.items():
        target = stage.path / f"{name}.plan"
        try:
            os.link(done.path, target)
        except OSError:  # another file system
            shutil.copyfile(done.path, target)
    ours = order.choice.form in OURS
    listed, here = order.bundle.manifest["files"], order.here if order.runs_here else None
    compiled = here.kernels if here and ours else ""
    on = (here.cuda, here.driver, here.gpu) if here else ("", "", "")
    given = {}
    for name in finished:
        used = compiled if name == "generator" else ""
        given[name] = Receipt(order.tensorrt, order.sms, used, graph_sha256(listed, name), *on)
    stage.entry |= {
        "backend": order.flavour.backend, "precision": order.precision,
        "plugin": order.choice.form, "reason": order.choice.reason,
        "cache_layout": "hopper_fp8" if ours else "token_major",
        "cuda_graph": order.choice.captured, "portable": order.portable,
        "graphs": {name: f"{stage.relative}/{name}.plan" for name in finished},
        "receipts": {name: receipt.to_dict() for name, receipt in given.items()},
        "inputs": {name: done.inputs for name, done in finished.items()},
        "audit": {name: done.audit for name, done in finished.items()},
    }  # fmt: skip
    if ours and order.scales is not None:
        # The plan has them as constants; the runtime packs prompts with them.
        shutil.copyfile(order.bundle.checked(SCALES), stage.path / SCALES)
        stage.entry["scales"] = f"{stage.relative}/{SCALES}"


def _prove(order: Order, stage: Stage) -> tuple[dict[str, Any], float | None]:
    """Open the engine as a stream would, compare it with the exported graphs, then time it.

    Returns the figures and the median ms of a step.
    """
    api, bundle, profile = api_of(order.flavour), order.bundle, order.bundle.profile
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
    scales = order.scales if order.choice.form in OURS and order.scales else []
    options = RunOptions(order.choice.captured, scales)
    engines = TrtEngines(profile, plans, device, order.precision, options, order.flavour.backend)
    try:
        first = start_of(bundle)
        order.report(f"{order.key}: comparing with the exported graphs in ONNX Runtime")
        figures = compare(engines, bundle, first)
        said = ", ".join(f"{name} {value}" for name, value in figures.items())
        order.report(f"{order.key}: {said}")
        return figures, round(median_step_ms(engines, profile, first), 2)
    finally:
        engines.close()
