"""`aapt build-engine --backend tensorrt`: a bundle's graphs -> plans for this GPU, each checked before the bundle takes it.

    1  what is here          TensorRT, GPU, driver; the receipt of `aapt doctor --tensorrt`, and from it the best proved form of attention
    2  room                  the profile's memory plan against the device's free memory, before hours of work
    3  graph by graph        lower, parse, count the plugin's layers, build, keep the timings, audit the plan's layers; a finished plan is kept, so
                             that a build which was stopped goes on where it was, and one with the same inputs is not done again
    4  all together          the engine that the bundle will have is opened and compared with ONNX Runtime on the exported graphs, then timed
    5  the manifest          plans, scales, receipts, audit: all at once, or nothing

When nothing is proved, or a proved form fails to build, TensorRT's own attention is taken and the reason told. No form is taken silently.

Nothing here was run on TensorRT by us. The flow is executed over strict fakes made from the real bindings of 10.16 and 11.4, with golden call logs,
and steps 4 and 5 over an emulated device.
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

from aapt_deploy.backends.trial import Built, Options, Progress, Report, median_step_ms
from aapt_deploy.backends.trt import cuda, plan_file
from aapt_deploy.backends.trt.doctor import receipts
from aapt_deploy.backends.trt.doctor.receipts import AOT, NATIVE, PYTHON, Choice
from aapt_deploy.backends.trt.engine import RunOptions, TrtEngines
from aapt_deploy.backends.trt.lower import Lowered, lower
from aapt_deploy.backends.trt.parity import compare, start_of
from aapt_deploy.backends.trt.plan_file import Receipt, graph_sha256
from aapt_deploy.bundle.bundle import Bundle, Stage
from aapt_deploy.bundle.files import free_memory_bytes, writing
from aapt_deploy.bundle.scales import FILE as SCALES
from aapt_deploy.bundle.scales import load as load_scales
from aapt_deploy.errors import BundleError, MachineError, ParityError
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.models.cost import WORKSPACE_GB, cost_of
from aapt_deploy.ops.block_causal_attention import hopper_fp8, kernels
from aapt_deploy.profiles import Profile

if TYPE_CHECKING:
    from aapt_deploy.backends.trt import api

BACKEND = "tensorrt"
RECIPE = 1  # of this module; a plan of another one is not kept
FP8_SM = 89
LEAST_HOST_SHARE = (
    3  # host memory over weights that others report for a build; less is only warned of
)


@dataclass(frozen=True)
class Order:
    """What every graph of one build has in common."""

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
    """One plan, and what is known of it."""

    path: Path
    inputs: str  # hash of everything that it was made from
    audit: dict[str, int]


def build(bundle: Bundle, precisions: Sequence[str], options: Options) -> list[Built]:
    """Build the engine of each of `precisions`.

    Raises MachineError without TensorRT, GPU or room, BundleError for a damaged bundle or a graph that TensorRT refuses, ParityError for a plan
    that is not what was asked for or computes something else.
    """
    return [_build(bundle, precision, options) for precision in precisions]


def _build(bundle: Bundle, precision: str, options: Options) -> Built:
    began, report = time.monotonic(), options.report
    from aapt_deploy.backends.trt import api

    version = api.version()
    device = cuda.with_driver()
    try:
        here = device.gpu(version, kernels.source_hash())
        scales = (
            load_scales(bundle.checked(SCALES), bundle.profile).attention
            if precision == "fp8"
            else None
        )
        _check_machine(bundle.profile, precision, device, report)
        choices = _choices(here, options.attention, scales is not None)
    finally:
        device.close()
    order = Order(bundle, precision, choices[0], here, scales, report, options.progress)
    with bundle.add_engine(order.key) as stage:
        order, finished = _all_plans(order, choices, stage.folder)
        _place(stage, order, finished)
        parity, step_ms = _prove(order, stage)
        built = Built(
            order.key,
            round(step_ms, 2),
            stage.size,
            1,
            False,
            parity.pop("psnr_db"),
            round(time.monotonic() - began, 1),
        )
        stage.entry |= {"parity": parity} | asdict(built)
    for plan_ in finished.values():
        _forget(plan_)
    return built


def _check_machine(profile: Profile, precision: str, device: cuda.Device, report: Report) -> None:
    """Refuse, before any work, what cannot end well."""
    if precision == "fp8" and device.sm < FP8_SM:
        raise MachineError(
            f"GPU {device.name} is SM {device.sm}; products in FP8 need SM {FP8_SM}",
            "export with --precision fp32 and build with --precision bf16",
        )
    if profile.target.sm and profile.target.sm != device.sm:
        report(
            f"profile {profile.name} was made for {profile.target.name} (SM {profile.target.sm}); this is {device.name} (SM {device.sm})"
        )
    needed = cost_of(profile)
    free_gb = device.free_bytes / 1e9
    if needed.total_gb > free_gb:
        parts = ", ".join(f"{name} {gb:.2f}" for name, gb in needed.memory_gb.items())
        raise MachineError(
            f"profile {profile.name} needs {needed.total_gb:.2f} GB ({parts}); {free_gb:.2f} GB are free on {device.name}",
            "close other programs on the GPU, or take a smaller profile; aapt plan NAME tells what one needs",
        )
    host_gb, wanted_gb = free_memory_bytes() / 1e9, LEAST_HOST_SHARE * needed.memory_gb["weights"]
    if host_gb < wanted_gb:
        report(
            f"warning: {host_gb:.1f} GB of host memory are free; TensorRT may take {wanted_gb:.1f} GB while it builds"
        )


def _choices(here: cuda.Gpu, attention: str, fp8: bool) -> list[Choice]:
    """The forms to try, in order. Raises MachineError for one that was asked for and is not proved here."""
    choices = receipts.choose(receipts.load(here), fp8)
    if attention == "auto":
        return choices
    wanted = [choice for choice in choices if choice.form == attention]
    if not wanted:
        raise MachineError(
            f"attention in form {attention!r} is not proved here: {choices[-1].reason}",
            "aapt doctor --tensorrt, and read what it finds",
        )
    return wanted


# Plans


def _all_plans(
    order: Order, choices: Sequence[Choice], folder: Path
) -> tuple[Order, dict[str, Finished]]:
    """Every graph's plan, and the order with the form that the generator took: the first of `choices` that builds."""
    chosen, generator = _generator(order, choices, folder)
    others = {
        name: _one_plan(chosen, name, folder)
        for name in signatures(order.bundle.profile)
        if name != "generator"
    }
    return chosen, {**others, "generator": generator}


def _generator(order: Order, choices: Sequence[Choice], folder: Path) -> tuple[Order, Finished]:
    """The largest plan goes first: what fails, fails early."""
    for index, choice in enumerate(choices, 1):
        order = replace(order, choice=choice)
        order.report(f"{order.key}: attention in form {choice.form} ({choice.reason})")
        try:
            return order, _one_plan(order, "generator", folder)
        except (BundleError, ParityError, MachineError) as error:
            if index == len(choices):
                raise
            order.report(
                f"warning: attention in form {choice.form} failed: {error}; going on with {choices[index].form}"
            )
    raise AssertionError("no form of attention")


def _one_plan(order: Order, graph: str, folder: Path) -> Finished:
    """The plan of one graph: one that is kept from before, or a new one. Raises what api.build and the audit raise."""
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
        settings = api.Settings(
            lowered.plugin_layers, round(WORKSPACE_GB * 1e9), timing_cache=timings
        )
        order.report(f"{order.key}: building {graph}")
        built = api.build(lowered.path, settings, order.progress, failures, api.Messages())
        path = _unfinished(inputs)
        with _told(path):
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
    with _told(path):
        note = {"sha256": _sha256(path), "audit": audit}
        receipts.write_whole(
            path.with_suffix(".json"), json.dumps(note).encode()
        )  # only now is it a finished plan
    return Finished(path, inputs, audit)


def inputs_hash(order: Order, graph: str) -> str:
    """sha256 of everything that a plan is made from; equal inputs, same plan."""
    files = order.bundle.manifest["files"]
    ours = graph == "generator" and order.choice.form != NATIVE
    made_from = {
        "recipe": RECIPE, "graph": graph, "precision": order.precision, "tensorrt": order.here.tensorrt, "sm": order.here.sm,
        "files": [files.get(name, {}).get("sha256") for name in (f"{graph}.onnx", f"{graph}.onnx.data")],
        "attention": [order.choice.form, order.choice.packed] if graph == "generator" else None,
        "kernels": order.here.kernels if ours else None, "scales": files[SCALES]["sha256"] if ours else None,
        "workspace": WORKSPACE_GB,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _register(order: Order, lowered: Lowered) -> Sequence[Exception]:
    """Make our plugin known before the graph is parsed; where it keeps what it raised. Needs the device's context, which stays current."""
    if not lowered.plugin_layers:
        return ()
    if order.choice.form == PYTHON:
        from aapt_deploy.backends.trt.plugin import python as python_plugin

        kernels.launcher(
            hopper_fp8.NAME, order.bundle.profile.head_dim
        )  # compiled and loaded now, not while TensorRT measures
        return python_plugin.register(kernels.launcher).failures
    from aapt_deploy.backends.trt.plugin import ahead_of_time

    ahead_of_time.define_once(kernels.ptx_launch)
    return ()


def audited(plan_: "api.Plan", lowered: Lowered, order: Order, graph: str) -> dict[str, int]:
    """Count the layers of a plan and insist on what it was built for. Raises ParityError, naming layers."""
    layers = plan_.layers()
    found = plan_file.audit(layers, lowered.plugin_layers, len(lowered.fp8_products))
    wanted = {
        "plugins": lowered.plugin_layers,
        "fp8": len(lowered.fp8_products),
        "attention": lowered.attention_layers,
    }
    order.report(
        f"{order.key}: {graph} has {found.layers} layers: {found.plugins} of our kernels, {found.attention} of TensorRT's attention (of "
        f"{lowered.attention_layers} nodes), {found.fp8} in FP8 (at least {len(lowered.fp8_products)} expected), {found.reformats} reformats"
    )
    if found.attention < lowered.attention_layers:
        order.report(
            f"warning: {lowered.attention_layers - found.attention} attention nodes of {graph} run unfused, which is slow"
        )
    if found.reformats > order.bundle.profile.model.depth:
        names = [layer.name for layer in layers if layer.is_reformat]
        order.report(
            f"warning: {found.reformats} reformats, such as {', '.join(names[: plan_file.SHOWN])}"
        )
    return asdict(found) | {f"{name}_expected": count for name, count in wanted.items()}


# Plans of earlier builds


def _unfinished(inputs: str) -> Path:
    """Where a plan waits for the bundle to take it: with this user's other caches, because a plan is trusted when it is opened."""
    return receipts.cache_folder() / "unfinished" / f"{inputs}.plan"


def _kept(order: Order, graph: str, inputs: str) -> Finished | None:
    """A whole plan from the same inputs: of a build that was stopped, or of the engine that the bundle has."""
    waiting = _unfinished(inputs)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        note = json.loads(waiting.with_suffix(".json").read_bytes())
        if note["sha256"] == _sha256(waiting):
            return Finished(waiting, inputs, dict(note["audit"]))
    entry = order.bundle.engines.get(order.key, {})
    with contextlib.suppress(BundleError, KeyError, TypeError):
        if (
            entry["inputs"][graph] == inputs
            and entry["receipts"][graph]["driver"] == order.here.driver
        ):
            return Finished(
                order.bundle.checked(entry["graphs"][graph]), inputs, dict(entry["audit"][graph])
            )
    return None


def _forget(finished: Finished) -> None:
    """The bundle has it now."""
    for suffix in (".plan", ".json"):
        _unfinished(finished.inputs).with_suffix(suffix).unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _told(path: Path) -> contextlib.AbstractContextManager[None]:
    return writing(path, "free some space, or set XDG_CACHE_HOME to a place that has it")


# The engine


def _place(stage: Stage, order: Order, finished: dict[str, Finished]) -> None:
    """Plans, scales and what the manifest says of them, into the stage."""
    for name, done in finished.items():
        target = stage.path / f"{name}.plan"
        try:
            os.link(done.path, target)
        except OSError:  # another file system
            shutil.copyfile(done.path, target)
    here = order.here
    ours = order.choice.form != NATIVE
    receipts = {
        name: Receipt(
            here.tensorrt, here.sm, here.kernels if ours and name == "generator" else "", graph_sha256(order.bundle.manifest["files"], name),
            here.cuda, here.driver, here.gpu,
        ).to_dict()
        for name in finished
    }  # fmt: skip
    stage.entry |= {
        "backend": BACKEND, "precision": order.precision, "plugin": order.choice.form, "reason": order.choice.reason,
        "cache_layout": "hopper_fp8" if ours else "token_major", "cuda_graph": order.choice.captured,
        "graphs": {name: f"{stage.relative}/{name}.plan" for name in finished},
        "receipts": receipts,
        "inputs": {name: done.inputs for name, done in finished.items()},
        "audit": {name: done.audit for name, done in finished.items()},
    }  # fmt: skip
    if ours and order.scales is not None:
        shutil.copyfile(
            order.bundle.checked(SCALES), stage.path / SCALES
        )  # what the plan holds as constants, the runtime packs prompts with
        stage.entry["scales"] = f"{stage.relative}/{SCALES}"


def _prove(order: Order, stage: Stage) -> tuple[dict[str, Any], float]:
    """Open the engine as a stream would, compare it with the exported graphs, then time it: (figures, median ms of a step)."""
    from aapt_deploy.backends.trt import api

    bundle, profile = order.bundle, order.bundle.profile
    if order.choice.form == PYTHON:
        from aapt_deploy.backends.trt.plugin import python as python_plugin

        python_plugin.register(kernels.launcher)
    order.report(f"{order.key}: opening the plans")
    device = cuda.with_driver()
    try:
        plans = {name: api.open_plan(stage.path / f"{name}.plan") for name in signatures(profile)}
    except BaseException:
        device.close()
        raise
    scales = order.scales if order.choice.form in (PYTHON, AOT) and order.scales else []
    engines = TrtEngines(
        profile, plans, device, order.precision, RunOptions(order.choice.captured, scales)
    )
    try:
        first = start_of(bundle)
        order.report(f"{order.key}: comparing with the exported graphs in ONNX Runtime")
        figures = compare(engines, bundle, first)
        order.report(
            f"{order.key}: {', '.join(f'{name} {value}' for name, value in figures.items())}"
        )
        return figures, median_step_ms(engines, profile, first)
    finally:
        engines.close()
