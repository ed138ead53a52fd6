"""The one module that touches TensorRT's API: ONNX file -> plan, and plan -> execution context. 10.16 to 11.x.

    build(graph, settings, progress)   parse, check, build; a BuiltPlan with the plan, the timing cache and what the parser made of the graph
    open_plan(plan)                    deserialise; a Plan with its tensors and layers
    Plan.context()                     a Context: set addresses, enqueue on a stream, time the layers

What it sees to, because TensorRT does not: every plugin layer that the graph has arrived in the network (a parser that does not find a plugin may
quietly take something slower), all shapes are static, errors carry TensorRT's own last words and the ONNX node, a build can be interrupted, and
code inside a plan is never run. Enums are used by name: between 10.16 and 11.4 their numbers moved.

What it deliberately does not do: allocate memory, make streams, choose precisions (networks are strongly typed: the graph says), register plugins,
or decide whether a plan fits this machine (plan_file.py does, before anything is deserialised here).
"""

import mmap
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, SupportsFloat, TypeVar

from aapt_deploy.backends.trial import Progress
from aapt_deploy.backends.trt.plan_file import AGAIN, PlanLayer, read_layers
from aapt_deploy.backends.trt.remedies import hint
from aapt_deploy.errors import AaptError, BundleError, MachineError, ParityError
from aapt_deploy.ops.block_causal_attention import NAME, PLUGIN_NAMESPACE

try:
    import tensorrt as trt
except (ImportError, OSError) as error:  # OSError: a library is missing
    raise MachineError(
        f"TensorRT cannot be loaded: {error}", "pip install 'aapt_deploy[tensorrt]'"
    ) from None

OLDEST, TOO_NEW = (10, 16), (12,)
POLL_S = 0.2  # how often a build looks for Ctrl-C
KEPT_MESSAGES = 20


@dataclass(frozen=True)
class Settings:
    """How to build one graph."""

    plugin_layers: int  # BlockCausalAttention layers that the network must have
    workspace_bytes: int  # the most that TensorRT may use for scratch memory
    optimization_level: int = 3  # 0 (fast build) to 5 (fast engine)
    timing_cache: bytes = b""  # of an earlier build; another machine's is ignored


@dataclass(frozen=True)
class Tensor:
    """An input or output of a plan."""

    name: str
    is_input: bool
    dtype: str  # TensorRT's own name: "FLOAT", "BF16", "FP8", "INT32", …
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BuiltPlan:
    """A finished plan, still in memory."""

    plan: memoryview
    timing_cache: bytes
    network_layers: int
    tensors: tuple[Tensor, ...]


def version() -> str:
    """TensorRT's version here. Raises MachineError for one that this module was not written for."""
    found = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if not OLDEST <= found < TOO_NEW:
        raise MachineError(
            f"TensorRT {trt.__version__} is not supported: {'.'.join(map(str, OLDEST))} to 11 are",
            "pip install 'aapt_deploy[tensorrt]' brings one",
        )
    return str(trt.__version__)


# Building


class Messages(trt.ILogger):
    """TensorRT's log, of which the last errors and warnings are kept to explain a failure."""

    def __init__(self, report: Callable[[str], None] | None = None) -> None:
        trt.ILogger.__init__(self)
        self.report = report
        self.kept: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        kinds = trt.ILogger.Severity
        if severity in (kinds.INTERNAL_ERROR, kinds.ERROR, kinds.WARNING):
            self.kept = [*self.kept, msg][-KEPT_MESSAGES:]
            if self.report:
                self.report(msg)


class Monitor(trt.IProgressMonitor):
    """Passes the phases of a build on, and stops it when asked, or when passing them on fails."""

    def __init__(self, progress: Progress | None) -> None:
        trt.IProgressMonitor.__init__(self)
        self.progress = progress
        self.cancelled = threading.Event()
        self.failure: Exception | None = None

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        self._tell(lambda progress: progress.phase(phase_name, parent_phase or None, num_steps))

    def step_complete(self, phase_name: str, step: int) -> bool:
        self._tell(lambda progress: progress.step(phase_name, step))
        return not self.cancelled.is_set()

    def phase_finish(self, phase_name: str) -> None:
        self._tell(lambda progress: progress.done(phase_name))

    def _tell(self, tell: Callable[[Progress], None]) -> None:
        try:
            if self.progress and not self.failure:
                tell(self.progress)
        except (
            Exception
        ) as error:  # must not travel through TensorRT; raised again when the build has ended
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
    """Build `graph` into a plan. `failures` is where our plugin keeps what it raised (python_plugin.Creator.failures).

    Raises BundleError when TensorRT cannot parse or build the graph, ParityError when a plugin layer is missing, MachineError for an unknown
    TensorRT or a machine without a GPU, and what our plugin raised, if it was the plugin. Ctrl-C ends the build at TensorRT's next step.
    """
    version()
    messages, earlier = messages or Messages(), len(failures)
    builder = _made(lambda: trt.Builder(messages), messages)
    network = builder.create_network(_network_flags())
    parser = trt.OnnxParser(network, messages)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        nodes = [
            f"{error.node_operator()} node {error.node_name()!r}: {error.desc()}"
            for error in errors
        ]
        _explain(f"TensorRT cannot read {graph}", nodes, messages, failures[earlier:])
    tensors = _check(network, graph, settings.plugin_layers)
    monitor = Monitor(progress)
    config = _configure(builder, settings, monitor)
    plan = _interruptible(lambda: builder.build_serialized_network(network, config), monitor)
    if plan is None:
        _explain(f"TensorRT cannot build {graph}", [], messages, failures[earlier:])
    cache = config.get_timing_cache()
    return BuiltPlan(
        memoryview(plan),
        bytes(memoryview(cache.serialize())) if cache else b"",
        network.num_layers,
        tensors,
    )


def _network_flags() -> int:
    """Strongly typed. 11.x networks always are; the flag is still there, and ignored."""
    flags = trt.NetworkDefinitionCreationFlag
    return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0


def _made(make: Callable[[], T], messages: Messages) -> T:
    """A builder or runtime. The bindings raise TypeError where TensorRT's factory returned nothing."""
    try:
        return make()
    except TypeError as error:
        reason = messages.kept[-1] if messages.kept else str(error)
        raise MachineError(
            f"TensorRT cannot start: {reason}",
            "aapt doctor tells what this machine lacks; a GPU and its driver are needed",
        ) from None


def _check(network: trt.INetworkDefinition, graph: Path, plugin_layers: int) -> tuple[Tensor, ...]:
    """Inputs and outputs, once the network is what the graph says."""
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    found = sum(kind == trt.LayerType.PLUGIN_V3 for kind in kinds)
    if found != plugin_layers:
        raise ParityError(
            f"TensorRT took {found} of the {plugin_layers} {PLUGIN_NAMESPACE}::{NAME} layers in {graph} for our plugin; the others would run slowly",
            "export the bundle again; its graphs must not carry the function that stands in for the plugin",
        )
    inputs = [(network.get_input(index), True) for index in range(network.num_inputs)]
    outputs = [(network.get_output(index), False) for index in range(network.num_outputs)]
    tensors = tuple(
        Tensor(tensor.name, is_input, tensor.dtype.name, tuple(tensor.shape))
        for tensor, is_input in inputs + outputs
    )
    _require_static(tensors, str(graph))
    return tensors


def _require_static(tensors: Sequence[Tensor], where: str) -> None:
    if loose := [
        f"{tensor.name} {list(tensor.shape)}"
        for tensor in tensors
        if any(extent < 0 for extent in tensor.shape)
    ]:
        raise BundleError(
            f"{where} has tensors without a fixed shape: {', '.join(loose)}",
            "export the bundle again; every shape must be static",
        )


def _configure(builder: trt.Builder, settings: Settings, monitor: Monitor) -> trt.IBuilderConfig:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    config.builder_optimization_level = settings.optimization_level
    config.max_aux_streams = 0  # one stream, so that one CUDA graph holds everything
    config.profiling_verbosity = (
        trt.ProfilingVerbosity.DETAILED
    )  # the audit reads layer names and types
    config.progress_monitor = monitor
    cache = config.create_timing_cache(settings.timing_cache)
    if cache is None or not config.set_timing_cache(
        cache, False
    ):  # of another GPU or release: begin anew
        cache = config.create_timing_cache(b"")
        if cache is not None:
            config.set_timing_cache(cache, False)
    return config


def _interruptible(work: Callable[[], T], monitor: Monitor) -> T:
    """Do `work` in a thread. Ctrl-C reaches Python in the main thread only, which TensorRT would keep for as long as it builds."""
    answers: list[T] = []
    errors: list[BaseException] = []
    finished = (
        threading.Event()
    )  # Thread.join, interrupted, takes a running thread for a stopped one (Python 3.11)

    def run() -> None:
        try:
            answers.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            finished.set()

    try:
        threading.Thread(target=run, name="TensorRT build").start()
        while not finished.wait(POLL_S):
            pass
    except BaseException:
        monitor.cancelled.set()
        finished.wait()
        raise
    if monitor.failure:
        raise monitor.failure
    if errors:
        raise errors[0]
    return answers[0]


def _explain(
    what: str, nodes: list[str], messages: Messages, failures: Sequence[Exception]
) -> NoReturn:
    """Raise what our plugin raised, else what TensorRT said last, with what can be done about it."""
    if failures and isinstance(failures[-1], AaptError):
        raise failures[-1]
    reasons = [
        *(f"our plugin: {failure}" for failure in failures[-1:]),
        *nodes[:3],
        *messages.kept[-1:],
    ] or ["it gave no reason"]
    text = "; ".join(reasons)
    raise BundleError(f"{what}: {text}", hint(text))


# Running


class Context:
    """One execution context: tensors at fixed addresses, runs on a stream."""

    def __init__(
        self, context: trt.IExecutionContext, names: Sequence[str], messages: Messages
    ) -> None:
        self._context, self._messages = context, messages
        self._unbound = set(names)

    def bind(self, name: str, address: int) -> None:
        """Put tensor `name` at a device address. Raises BundleError when the plan has no such tensor or refuses the address."""
        if not self._context.set_tensor_address(name, address):
            raise BundleError(
                f"the plan has no tensor {name!r}, or not at address {address:#x}",
                "build the engine again: aapt build-engine",
            )
        self._unbound.discard(name)

    def enqueue(self, stream: int) -> None:
        """Queue one run on `stream`, which must not be the default one: that would synchronise. Raises MachineError when TensorRT refuses."""
        assert stream, "TensorRT synchronises on the default stream"
        assert not self._unbound, f"no address for {sorted(self._unbound)}"
        if not self._context.execute_async_v3(stream):
            reason = self._messages.kept[-1] if self._messages.kept else "it gave no reason"
            raise MachineError(
                f"TensorRT cannot run the plan: {reason}",
                "aapt doctor tells what this machine lacks",
            )

    def timed(self, stream: int, wait: Callable[[], None], runs: int) -> dict[str, list[float]]:
        """Milliseconds of every layer in each of `runs` runs, by TensorRT's profiler; `wait` waits for the stream. Slower than plain runs.

        Raises MachineError when TensorRT does not report. The profiler stays with the context.
        """
        times = LayerTimes()
        self._context.profiler = times
        self._context.enqueue_emits_profile = False  # or every run would wait for itself
        self._profiler = times  # the context does not keep it alive
        for _ in range(runs):
            self.enqueue(stream)
            wait()
            if not self._context.report_to_profiler():
                raise MachineError(
                    "TensorRT does not report layer times",
                    "profile without layers; aapt doctor tells the versions to report",
                )
        return times.ms


class LayerTimes(trt.IProfiler):
    """Gathers what TensorRT's profiler reports."""

    def __init__(self) -> None:
        trt.IProfiler.__init__(self)
        self.ms: dict[str, list[float]] = {}

    def report_layer_time(self, layer_name: str, ms: SupportsFloat) -> None:
        self.ms.setdefault(layer_name, []).append(float(ms))


class Plan:
    """A deserialised plan. Raises BundleError when a shape in it is not static."""

    def __init__(self, runtime: trt.Runtime, engine: trt.ICudaEngine, messages: Messages) -> None:
        self._runtime, self._engine, self._messages = (
            runtime,
            engine,
            messages,
        )  # a runtime must outlive its engines
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.tensors = tuple(
            Tensor(
                name,
                engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                engine.get_tensor_dtype(name).name,
                tuple(engine.get_tensor_shape(name)),
            )
            for name in names
        )
        _require_static(self.tensors, "the plan")
        self.scratch_bytes = engine.device_memory_size_v2

    def layers(self) -> list[PlanLayer]:
        """What TensorRT made of the graph. Raises BundleError when it does not tell."""
        return read_layers(
            self._engine.create_engine_inspector().get_engine_information(
                trt.LayerInformationFormat.JSON
            )
        )

    def context(self) -> Context:
        """A context of its own scratch memory. Raises MachineError when there is not enough."""
        context = self._engine.create_execution_context()
        if context is None:
            raise MachineError(
                f"TensorRT cannot get {self.scratch_bytes} bytes of scratch memory",
                "close other programs on the GPU",
            )
        return Context(context, [tensor.name for tensor in self.tensors], self._messages)


def open_plan(file: Path, messages: Messages | None = None) -> Plan:
    """Deserialise a plan that plan_file.check and its hash have let pass. Code inside a plan is never run.

    Raises BundleError when TensorRT refuses it, MachineError on a machine without a GPU.
    """
    version()
    messages = messages or Messages()
    runtime = _made(lambda: trt.Runtime(messages), messages)
    runtime.engine_host_code_allowed = False
    try:
        with (
            file.open("rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content,
            memoryview(content) as view,
        ):
            engine = runtime.deserialize_cuda_engine(view)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise BundleError(
            f"plan {file} cannot be read: {error}", "build the engine again: aapt build-engine"
        ) from None
    if engine is None:
        reason = messages.kept[-1] if messages.kept else "it gave no reason"
        raise BundleError(f"TensorRT cannot load plan {file}: {reason}", AGAIN)
    return Plan(runtime, engine, messages)
