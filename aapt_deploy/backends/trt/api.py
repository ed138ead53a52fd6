"""The one module that calls TensorRT's API: ONNX file -> plan -> context.

flavour.py says which TensorRT. api_rtx.py has the calls that only TensorRT-RTX has.

    build(graph, settings, progress)   parse, check and build; returns a BuiltPlan
    open_plan(plan)                    deserialise; returns a Plan with its tensors and layers
    Plan.context()                     a Context: set addresses, enqueue on a stream, time layers

It checks what TensorRT does not. Every plugin layer of the graph must be in the network, because a
parser that does not find a plugin may take something slower. All shapes must be static. Errors
carry TensorRT's last words and the ONNX node. A build can be interrupted; code inside a plan is
never run. Enums are used by name, because their numbers moved between 10.16 and 11.4.

It does not allocate memory, make streams, register plugins or choose precisions (networks are
strongly typed). plan_file.py checks before whether a plan fits this machine.
"""

from __future__ import annotations  # the lean runtime has no types to build with

import mmap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat, TypeVar, cast

from aapt_deploy.backends.trial import Progress
from aapt_deploy.backends.trt import api_lean, api_rtx, flavour
from aapt_deploy.backends.trt.interrupt import interruptible
from aapt_deploy.backends.trt.plan_file import PlanLayer, read_layers
from aapt_deploy.backends.trt.plans import BuiltPlan, Settings, Tensor
from aapt_deploy.backends.trt.remedies import EXPORT_AGAIN, SMALLER, Messages, NodeError, refusal
from aapt_deploy.errors import AaptError, BundleError, MachineError, ParityError
from aapt_deploy.ops.block_causal_attention import NAME, PLUGIN_NAMESPACE

if TYPE_CHECKING:
    import tensorrt as trt

    FLAVOUR: flavour.Flavour
else:
    FLAVOUR, trt = flavour.bindings()


def version() -> str:
    """Return TensorRT's version. Raises MachineError if this module is not for it."""
    found, here = tuple(int(part) for part in trt.__version__.split(".")[:2]), FLAVOUR
    if not here.oldest <= found < here.too_new:
        wanted = f"{'.'.join(map(str, here.oldest))} to {here.too_new[0] - 1} are"
        text = f"{here.title} {trt.__version__} is not supported: {wanted}"
        raise MachineError(text, f"pip install 'aapt_deploy[{here.backend}]' brings one")
    return str(trt.__version__)


# Building


class Log(trt.ILogger):
    """The log of this process: TensorRT ignores a second one while it lives."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.to = Messages()

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        self.to.log(severity, msg)


_LOG = Log()


class Monitor(trt.IProgressMonitor):
    """Forwards the phases of a build, and stops it if asked or if forwarding fails."""

    def __init__(self, progress: Progress | None) -> None:
        trt.IProgressMonitor.__init__(self)
        self.progress = progress
        self.cancelled = threading.Event()
        self.failure: Exception | None = None

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        self._forward(lambda progress: progress.phase(phase_name, parent_phase or None, num_steps))

    def step_complete(self, phase_name: str, step: int) -> bool:
        self._forward(lambda progress: progress.step(phase_name, step))
        return not self.cancelled.is_set()

    def phase_finish(self, phase_name: str) -> None:
        self._forward(lambda progress: progress.done(phase_name))

    def _forward(self, send: Callable[[Progress], None]) -> None:
        try:
            if self.progress and not self.failure:
                send(self.progress)
        except Exception as error:  # not through TensorRT: `build` raises it at the end
            self.failure = error
            self.cancelled.set()


T = TypeVar("T")


def build(
    graph: Path,
    settings: Settings,
    progress: Progress | None = None,
    failures: Sequence[Exception] = (),
    messages: Messages | None = None,
) -> BuiltPlan:
    """Build `graph` into a plan. Ctrl-C ends the build at TensorRT's next step.

    `failures` is the list in which our plugin records what it raised (Creator.failures). Raises
    BundleError if TensorRT cannot parse or build the graph. Raises ParityError if a plugin layer
    is missing. Raises MachineError for an unknown TensorRT, or without a GPU that it needs.
    Raises what our plugin raised, if that is the cause.
    """
    version()
    # RTX's parser would end the process at a plugin.
    assert FLAVOUR.plugins or not settings.plugin_layers, f"{FLAVOUR.title} has no plugins"
    _LOG.to, monitor = messages or Messages(), Monitor(progress)
    work = lambda: _built(graph, settings, monitor, failures)
    return interruptible(work, monitor.cancelled)


def _built(
    graph: Path, settings: Settings, monitor: Monitor, failures: Sequence[Exception]
) -> BuiltPlan:
    earlier = len(failures)
    builder = _made(lambda: trt.Builder(_LOG))
    network = builder.create_network(_network_flags())
    parser = trt.OnnxParser(network, _LOG)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        nodes = [NodeError(e.node_operator(), e.node_name(), e.desc()) for e in errors]
        raise _refusal(f"cannot read {graph}", nodes, failures[earlier:])
    tensors = _check(network, graph, settings.plugin_layers)
    if settings.decomposable:
        _allow_decomposition(network)
    config = _configure(builder, settings, monitor)
    if settings.portable:
        api_lean.make_portable(trt, parser, config, graph)
    plan = builder.build_serialized_network(network, config)
    if monitor.failure:
        raise monitor.failure
    if plan is None:
        raise _refusal(f"cannot build {graph}", [], failures[earlier:])
    cache = config.get_timing_cache() if FLAVOUR.timing_cache else None
    timings = bytes(memoryview(cache.serialize())) if cache else b""
    return BuiltPlan(memoryview(plan), timings, network.num_layers, tensors)


def _network_flags() -> int:
    """Ask for strong typing. In 11.x the flag exists and is ignored."""
    flags = trt.NetworkDefinitionCreationFlag
    return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0


def _made(make: Callable[[], T]) -> T:
    """Make a builder or runtime. The bindings raise TypeError if TensorRT returned nothing."""
    try:
        return make()
    except TypeError as error:
        said = refusal(f"{FLAVOUR.title} cannot start", [], _LOG.to.kept or [str(error)])
        raise MachineError(str(said), said.hint) from None


def _check(network: trt.INetworkDefinition, graph: Path, plugin_layers: int) -> tuple[Tensor, ...]:
    """Check that the network is what the graph says; return its inputs and outputs."""
    if not network.num_outputs:  # an empty file is parsed as such a graph
        raise BundleError(f"graph {graph} has no outputs", EXPORT_AGAIN)
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    found = sum(kind == trt.LayerType.PLUGIN_V3 for kind in kinds)
    if found != plugin_layers:
        layers = f"{plugin_layers} {PLUGIN_NAMESPACE}::{NAME} layers in {graph}"
        raise ParityError(
            f"TensorRT took {found} of the {layers} for our plugin; the others would run slowly",
            "export the bundle again; its graphs must not carry the function that stands in for "
            "the plugin",
        )
    given = [(network.get_input(index), True) for index in range(network.num_inputs)]
    given += [(network.get_output(index), False) for index in range(network.num_outputs)]
    tensors = tuple(Tensor(t.name, is_in, t.dtype.name, tuple(t.shape)) for t, is_in in given)
    _require_static(tensors, str(graph))
    return tensors


def _allow_decomposition(network: trt.INetworkDefinition) -> None:
    """Let attention run as separate operations where there is no fused kernel.

    The ONNX node has an attribute for it, which ONNX Runtime and the checker refuse.
    """
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings return the base class
            cast("trt.IAttentionInputLayer", layer).attention.decomposable = True


def _require_static(tensors: Sequence[Tensor], where: str) -> None:
    if loose := [f"{t.name} {list(t.shape)}" for t in tensors if min(t.shape, default=0) < 0]:
        hint = "export the bundle again; every shape must be static"
        raise BundleError(f"{where} has tensors without a fixed shape: {', '.join(loose)}", hint)


def _configure(builder: trt.Builder, settings: Settings, monitor: Monitor) -> trt.IBuilderConfig:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    config.builder_optimization_level = settings.optimization_level
    config.max_aux_streams = 0  # one stream, so that one CUDA graph holds everything
    # The audit reads layer names and types.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = monitor
    if settings.sms:
        api_rtx.set_targets(trt, config, settings.sms)
    if not FLAVOUR.timing_cache:
        return config
    cache = config.create_timing_cache(settings.timing_cache)
    if cache is None or not config.set_timing_cache(cache, False):  # of another GPU or release
        cache = config.create_timing_cache(b"")
        if cache is not None:
            config.set_timing_cache(cache, False)
    return config


def _refusal(what: str, nodes: list[NodeError], failures: Sequence[Exception]) -> AaptError:
    """Return what our plugin raised, else TensorRT's reason with a hint."""
    if failures and isinstance(failures[-1], AaptError):
        return failures[-1]
    ours = [f"our plugin: {failure}" for failure in failures[-1:]]
    return refusal(f"{FLAVOUR.title} {what}", nodes, [*ours, *_LOG.to.kept])


# Running


class Context:
    """One execution context: tensors at fixed addresses, runs on a stream."""

    def __init__(self, context: trt.IExecutionContext, names: Sequence[str]) -> None:
        self._context = context
        self._unbound = set(names)

    def bind(self, name: str, address: int) -> None:
        """Put tensor `name` at a device address.

        Raises BundleError if the plan has no such tensor or refuses the address.
        """
        if not self._context.set_tensor_address(name, address):
            text = f"the plan has no tensor {name!r}, or not at address {address:#x}"
            raise BundleError(text, "build the engine again: aapt build-engine")
        self._unbound.discard(name)

    def enqueue(self, stream: int) -> None:
        """Queue one run on `stream`, not the default one. Raises MachineError if refused."""
        assert stream, "TensorRT synchronises on the default stream"
        assert not self._unbound, f"no address for {sorted(self._unbound)}"
        if not self._context.execute_async_v3(stream):
            said = refusal(f"{FLAVOUR.title} cannot run the plan", [], _LOG.to.kept)
            raise MachineError(str(said), said.hint)

    def capturable(self, stream: int) -> bool:
        """Return whether a run on `stream` can be captured into a CUDA graph."""
        return not FLAVOUR.compiles_here or api_rtx.capturable(self._context, stream)

    def timed(self, stream: int, wait: Callable[[], None], runs: int) -> dict[str, list[float]]:
        """Return the milliseconds of every layer in `runs` runs, by TensorRT's profiler.

        `wait` waits for the stream. These runs are slower than plain ones, and the profiler
        stays with the context. Raises MachineError if TensorRT does not report.
        """
        times = LayerTimes()
        self._context.profiler = times
        self._context.enqueue_emits_profile = False  # or every run would wait for itself
        self._profiler = times  # the context does not keep it alive
        for _ in range(runs):
            self.enqueue(stream)
            wait()
            if not self._context.report_to_profiler():
                hint = "profile without layers; aapt doctor tells the versions to report"
                raise MachineError("TensorRT does not report layer times", hint)
        return times.ms


class LayerTimes(trt.IProfiler):
    """Collects what TensorRT's profiler reports."""

    def __init__(self) -> None:
        trt.IProfiler.__init__(self)
        self.ms: dict[str, list[float]] = {}

    def report_layer_time(self, layer_name: str, ms: SupportsFloat) -> None:
        self.ms.setdefault(layer_name, []).append(float(ms))


class Plan:
    """Deserialised plan. Raises BundleError if a shape in it is not static."""

    def __init__(self, runtime: trt.Runtime, engine: trt.ICudaEngine) -> None:
        self._runtime, self._engine = runtime, engine  # the runtime must outlive its engines
        self._compiled: list[Any] = []  # RTX: code that contexts compiled for this GPU
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.tensors = tuple(map(self._tensor, names))
        _require_static(self.tensors, "the plan")
        self.scratch_bytes = engine.device_memory_size_v2

    def _tensor(self, name: str) -> Tensor:
        engine = self._engine
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        dtype = engine.get_tensor_dtype(name).name
        return Tensor(name, is_input, dtype, tuple(engine.get_tensor_shape(name)))

    def layers(self) -> list[PlanLayer]:
        """Return the layers that TensorRT made. Raises BundleError if it does not say."""
        if FLAVOUR.lean:  # it has no inspector
            return []
        inspector = self._engine.create_engine_inspector()
        return read_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

    def context(self, captured: bool = True, compiled: Path | None = None) -> Context:
        """Make a context with its own scratch memory. Raises MachineError if it is too large.

        `captured` if the caller captures CUDA graphs, and `compiled` a file of `keep_compiled`;
        TensorRT-RTX reads both.
        """
        if FLAVOUR.compiles_here:
            config, cache = api_rtx.runtime_config(trt, self._engine, compiled, captured)
            self._compiled = [cache]
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context()
        if context is None:
            text = f"{FLAVOUR.title} cannot get {self.scratch_bytes} bytes of scratch memory"
            raise MachineError(text, SMALLER)
        return Context(context, [tensor.name for tensor in self.tensors])

    def keep_compiled(self, file: Path) -> None:
        """Write what the last context compiled, for the next start. Raises OSError."""
        for cache in self._compiled:
            api_rtx.keep(cache, file)


def validity(file: Path) -> tuple[str, list[str]]:
    """Return what TensorRT-RTX says of a plan before it is opened; see api_rtx.validity."""
    _LOG.to = Messages()
    return api_rtx.validity(trt, _made(lambda: trt.Runtime(_LOG)), file.read_bytes())


def open_plan(file: Path, messages: Messages | None = None) -> Plan:
    """Deserialise a plan whose receipt and hash were checked. Code inside it is never run.

    Raises BundleError if TensorRT refuses it, MachineError without a GPU.
    """
    version()
    _LOG.to = messages or Messages()
    return interruptible(lambda: _opened(file), threading.Event())


def _opened(file: Path) -> Plan:
    runtime, what = _made(lambda: trt.Runtime(_LOG)), f"{FLAVOUR.title} cannot load plan {file}"
    if FLAVOUR.lean:
        api_lean.require_started(runtime, what, _LOG.to.kept)
    runtime.engine_host_code_allowed = False
    try:
        with (
            file.open("rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content,
            memoryview(content) as view,
        ):
            engine = runtime.deserialize_cuda_engine(view)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        hint = "build the engine again: aapt build-engine"
        raise BundleError(f"plan {file} cannot be read: {error}", hint) from None
    if engine is None:
        raise refusal(what, [], _LOG.to.kept)
    return Plan(runtime, engine)
