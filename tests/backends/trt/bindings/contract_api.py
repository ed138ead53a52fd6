"""Build and run a plan through strict fakes: calls in order, and mistakes to be caught.

The enums, the logger and the progress monitor are the real ones. Builder, parser, runtime and
the like are fakes made from this release's stubs.
"""

import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from aapt_deploy.errors import BundleError, MachineError, ParityError
from tests.support.bindings import GOLDEN, type_stubs
from tests.support.bindings.recorder import Fake, Recorder, Stubs

PLUGINS = 2
GRAPH = Path("generator.onnx")
PLAN = b"plan" * 1000


@pytest.fixture(scope="session")
def stubs(request: pytest.FixtureRequest) -> Stubs:
    return Stubs(
        type_stubs.type_stubs(request.config.getoption("--release")) / "tensorrt" / "__init__.pyi"
    )


class Rig:
    """The module under test over fakes. A test changes `script` before it calls."""

    def __init__(self, trt: ModuleType, stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorder = Recorder(trt, stubs, {})
        self.api = importlib.import_module("aapt_deploy.backends.trt.api")
        for kind in ("Builder", "OnnxParser", "Runtime"):
            monkeypatch.setattr(trt, kind, self.recorder.constructor(kind))
        self.trt, self.make = trt, self.recorder.make
        self.kinds = ["PLUGIN_V3", "MATRIX_MULTIPLY", "PLUGIN_V3", "CAST"]
        tensors = {
            "noisy": ("FLOAT", (1, 4, 8, 8)),
            "k_cache.00": ("FP8", (2, 3, 8192)),
            "clean": ("FLOAT", (1, 4, 8, 8)),
        }
        self.tensors = [
            self.make("ITensor", name=name, dtype=getattr(trt.DataType, kind), shape=shape)
            for name, (kind, shape) in tensors.items()
        ]
        self.script = self.recorder.script
        self.script |= {
            "INetworkDefinition.num_layers": lambda: len(self.kinds),
            "INetworkDefinition.get_layer": (
                lambda index: self.make("ILayer", type=getattr(trt.LayerType, self.kinds[index]))
            ),
            "INetworkDefinition.num_inputs": 2,
            "INetworkDefinition.get_input": lambda index: self.tensors[index],
            "INetworkDefinition.num_outputs": 1,
            "INetworkDefinition.get_output": lambda index: self.tensors[2],
            "Builder.build_serialized_network": PLAN, "ITimingCache.serialize": b"timing",
            "ICudaEngine.num_io_tensors": 3,
            "ICudaEngine.get_tensor_name": lambda index: [*tensors][index],
            "ICudaEngine.get_tensor_mode": (
                lambda name: getattr(trt.TensorIOMode, "OUTPUT" if name == "clean" else "INPUT")
            ),
            "ICudaEngine.get_tensor_dtype": lambda name: getattr(trt.DataType, tensors[name][0]),
            "ICudaEngine.get_tensor_shape": lambda name: tensors[name][1],
            "ICudaEngine.device_memory_size_v2": 12345,
            "EngineInspector.get_engine_information": (
                '{"Layers": [{"Name": "a", "LayerType": "PluginV3"}]}'
            ),
        }  # fmt: skip

    def build(self, api: ModuleType | None = None, **more: Any) -> Any:
        module, portable = api or self.api, more.pop("portable", False)
        settings = module.Settings(PLUGINS, 1 << 30, portable=portable, timing_cache=b"old")
        return module.build(GRAPH, settings, **more)

    def golden(self, name: str, write: bool) -> None:
        text = "\n".join(self.recorder.journal) + "\n"
        file = GOLDEN / f"{name}.txt"
        if write:
            GOLDEN.mkdir(exist_ok=True)
            file.write_text(text)
        assert text == file.read_text()


@pytest.fixture
def rig(trt: ModuleType, stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(trt, stubs, monkeypatch)


@pytest.fixture
def write(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--write-golden"))


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    file = tmp_path / "generator.plan"
    file.write_bytes(PLAN)
    return file


# --- the calls, in order ---


def test_a_build_is_these_calls(rig: Rig, release: str, write: bool) -> None:
    built = rig.build()
    assert (bytes(built.plan), built.timing_cache, built.network_layers) == (PLAN, b"timing", 4)
    assert [(tensor.name, tensor.is_input, tensor.dtype) for tensor in built.tensors] == [
        ("noisy", True, "FLOAT"), ("k_cache.00", True, "FP8"), ("clean", False, "FLOAT"),
    ]  # fmt: skip
    rig.golden(f"build-{release}", write)


def test_a_portable_build_is_three_calls_more(rig: Rig, release: str) -> None:
    """The runtime is left out of the plan: its code would be run when the plan is opened."""
    rig.script["OnnxParser.get_used_vc_plugin_libraries"] = []
    rig.build(portable=True)
    plain, more = (GOLDEN / f"build-{release}.txt").read_text().splitlines(), rig.recorder.journal
    assert [call for call in more if call not in plain] == [
        "OnnxParser.get_used_vc_plugin_libraries()",
        "IBuilderConfig.set_flag(BuilderFlag.VERSION_COMPATIBLE)",
        "IBuilderConfig.set_flag(BuilderFlag.EXCLUDE_LEAN_RUNTIME)",
    ]
    assert [call for call in more if call in plain] == plain


def test_a_portable_plan_that_needs_a_plugin_library_is_refused_before_it_is_built(
    rig: Rig,
) -> None:
    rig.script["OnnxParser.get_used_vc_plugin_libraries"] = ["libnvinfer_vc_plugin.so.11"]
    with pytest.raises(BundleError, match=r"plugins in libnvinfer_vc_plugin\.so\.11; a portable"):
        rig.build(portable=True)
    assert not any("build_serialized" in call for call in rig.recorder.journal)


def test_a_run_is_these_calls(rig: Rig, plan_file: Path, write: bool) -> None:
    plan = rig.api.open_plan(plan_file)
    assert [(tensor.name, tensor.is_input, tensor.dtype, tensor.shape) for tensor in plan.tensors][
        1
    ] == ("k_cache.00", True, "FP8", (2, 3, 8192))
    assert plan.scratch_bytes == 12345 and [layer.is_plugin for layer in plan.layers()] == [True]
    context = plan.context()
    for address, tensor in enumerate(plan.tensors, 1):
        context.bind(tensor.name, 4096 * address)
    context.enqueue(77)
    rig.golden("run", write)


def test_the_network_is_strongly_typed_by_name_and_not_by_number(rig: Rig, trt: ModuleType) -> None:
    rig.build()
    wanted = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert f"Builder.create_network({wanted})" in rig.recorder.journal


def test_code_in_a_plan_is_refused_before_the_plan_is_read(rig: Rig, plan_file: Path) -> None:
    rig.api.open_plan(plan_file)
    calls = rig.recorder.journal
    assert calls.index("Runtime.engine_host_code_allowed = False") < calls.index(
        f"Runtime.deserialize_cuda_engine(<{len(PLAN)} bytes>)"
    )


def test_another_machine_s_timing_cache_is_left_out(rig: Rig) -> None:
    answers = iter([False, True])
    rig.script["IBuilderConfig.set_timing_cache"] = lambda cache, ignore: next(answers)
    rig.build()
    caches = [call for call in rig.recorder.journal if "create_timing_cache" in call]
    assert caches == [
        "IBuilderConfig.create_timing_cache(<3 bytes>)",
        "IBuilderConfig.create_timing_cache(<0 bytes>)",
    ]


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        (["PLUGIN_V3", "MATRIX_MULTIPLY"], 1),
        (["MATRIX_MULTIPLY", "SOFTMAX"], 0),
        (["PLUGIN_V3"] * 3, 3),
    ],
)
def test_a_missing_plugin_layer_or_a_silent_fallback_ends_the_build_before_it_begins(
    rig: Rig, kinds: list[str], found: int
) -> None:
    rig.kinds = kinds
    with pytest.raises(
        ParityError, match=f"took {found} of the 2 aapt::BlockCausalAttention layers"
    ):
        rig.build()
    assert not [call for call in rig.recorder.journal if "build_serialized_network" in call]


def test_a_shape_that_is_not_fixed_is_refused(rig: Rig, plan_file: Path) -> None:
    rig.tensors[0].written["shape"] = (1, -1, 8, 8)
    with pytest.raises(BundleError, match=r"generator.onnx has .* noisy \[1, -1, 8, 8\]"):
        rig.build()
    rig.script["ICudaEngine.get_tensor_shape"] = (1, -1)
    with pytest.raises(BundleError, match=r"the plan has .* noisy \[1, -1\]"):
        rig.api.open_plan(plan_file)


def test_what_the_plugin_raised_in_this_build_is_the_reason(rig: Rig) -> None:
    failures: list[Exception] = [MachineError("of an earlier build")]
    reasons: list[Exception | None] = [MachineError("no kernel for SM 80"), KeyError(3), None]

    def fail(network: Fake, config: Fake) -> None:
        if reason := reasons.pop(0):
            failures.append(reason)

    rig.script["Builder.build_serialized_network"] = fail
    for kind, text in (
        (MachineError, "no kernel for SM 80"),
        (BundleError, "our plugin: 3"),
        (BundleError, "it gave no reason"),
    ):
        with pytest.raises(kind, match=text):
            rig.build(failures=failures)


def test_without_a_gpu_builder_and_runtime_say_so(trt: ModuleType, plan_file: Path) -> None:
    """No fakes here: the stub's factories return nothing, as TensorRT's without a driver."""
    api = importlib.import_module("aapt_deploy.backends.trt.api")
    for attempt in (lambda: api.build(GRAPH, api.Settings(0, 1)), lambda: api.open_plan(plan_file)):
        with pytest.raises(MachineError, match="TensorRT cannot start"):
            attempt()


def test_another_tensorrt_is_refused(
    rig: Rig, trt: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in ("10.15.1.29", "8.6.1", "12.0.0.1"):
        monkeypatch.setattr(trt, "__version__", number)
        with pytest.raises(MachineError, match=f"TensorRT {number} is not supported"):
            rig.build()


def test_a_context_refuses_unknown_tensors_unbound_runs_and_the_default_stream(
    rig: Rig, plan_file: Path
) -> None:
    plan = rig.api.open_plan(plan_file)
    context = plan.context()
    with pytest.raises(AssertionError, match="no address for"):
        context.enqueue(77)
    with pytest.raises(AssertionError, match="default stream"):
        context.enqueue(0)
    rig.script["IExecutionContext.set_tensor_address"] = False
    with pytest.raises(BundleError, match="no tensor 'x'"):
        context.bind("x", 4096)
    rig.script |= {
        "IExecutionContext.set_tensor_address": True,
        "IExecutionContext.execute_async_v3": False,
    }
    for tensor in plan.tensors:
        context.bind(tensor.name, 4096)
    with pytest.raises(MachineError, match="cannot run"):
        context.enqueue(77)
    rig.script["ICudaEngine.create_execution_context"] = None
    with pytest.raises(MachineError, match="12345 bytes"):
        plan.context()


# --- mistakes planted into the module are caught by the fakes ---

PLANTED = {  # what is written instead of what, and how the bindings answer
    "a flag of 10.x": (
        "config.max_aux_streams = 0",
        "config.set_flag(trt.BuilderFlag.FP8)",
        (AttributeError,),
    ),
    "a wrong arity": (
        "config.set_timing_cache(cache, False)",
        "config.set_timing_cache(cache)",
        (TypeError,),
    ),
    "a number for an enum": ("trt.ProfilingVerbosity.DETAILED", "2", (TypeError,)),
    "an enum of another kind": (
        "trt.MemoryPoolType.WORKSPACE",
        "trt.TacticSource.CUBLAS",
        (TypeError, AttributeError),
    ),
    "a property that is gone": (
        "config.max_aux_streams = 0",
        "config.max_workspace_size = 1",
        (AttributeError,),
    ),
    "a method that is gone": (
        "builder.build_serialized_network",
        "builder.build_cuda_engine",
        (AttributeError,),
    ),
    "a path where text belongs": (
        "parse_from_file(str(graph))",
        "parse_from_file(graph)",
        (TypeError,),
    ),
    "a network flag of 10.x": (
        "flags.STRONGLY_TYPED) if",
        "flags.EXPLICIT_BATCH) if",
        (AttributeError,),
    ),
    "an unknown keyword": (
        "trt.OnnxParser(network, _LOG)",
        "trt.OnnxParser(network, log=_LOG)",
        (TypeError,),
    ),
    "a read-only property": (
        "config.progress_monitor = monitor",
        "network.num_layers = 3",
        (AttributeError, NameError),
    ),
}
VALID_IN = {"a flag of 10.x": "10.16", "a network flag of 10.x": "10.16"}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_caught(rig: Rig, release: str, mistake: str) -> None:
    old, new, errors = PLANTED[mistake]
    source = inspect.getsource(rig.api)
    assert source.count(old) >= 1
    mutant = ModuleType("mutant")
    mutant.__dict__["__name__"] = "aapt_deploy.backends.trt.api"
    code = compile(source.replace(old, new), "mutant", "exec")
    exec(code, mutant.__dict__)  # noqa: S102  our own source with one mistake planted
    if VALID_IN.get(mistake) == release:
        rig.build(mutant)
        assert any("FP8" in call or "create_network(" in call for call in rig.recorder.journal)
    else:
        with pytest.raises(errors):
            rig.build(mutant)
