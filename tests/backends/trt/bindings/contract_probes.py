"""The micro-engines of `aapt doctor --tensorrt`: calls and comparisons.

Calls go through strict fakes, comparisons run over an emulated device. A fake plan answers
rightly or wrongly, so every check is seen to pass the one and fail the other.
"""

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from aapt_deploy.backends.trt import cuda
from aapt_deploy.backends.trt.doctor import cases, lean_run, receipts
from aapt_deploy.backends.trt.doctor.cases import Case
from aapt_deploy.backends.trt.plan_file import PlanLayer
from aapt_deploy.errors import BundleError
from aapt_deploy.ops.block_causal_attention import DOMAIN, kernels
from tests.support import cuda_emulator
from tests.support.bindings.build_rig import TRT_TYPES, Rig
from tests.support.bindings.plugin_layer import Setter, descs, forget
from tests.support.cuda_emulator import Driver

PLAIN = {
    receipts.NATIVE_BUILDS: cases.native, receipts.CAPTURED: cases.native,
    receipts.SLOT: cases.native,
    receipts.FP8_PRODUCTS: cases.fp8_product, receipts.PLUGIN_FP8: cases.plugin,
    receipts.PLUGIN_CAPTURED: cases.plugin,
    receipts.PLUGIN_PACKED: lambda: cases.plugin(packed=True),
    receipts.FUNCTION: lambda: cases.plugin(with_function=True),
    receipts.AOT_OP: lambda: cases.plugin(aot=True), receipts.FP8_ATTENTION: cases.fp8_attention,
    receipts.PORTABLE_NATIVE: cases.native, receipts.PORTABLE_PLUGIN: cases.plugin,
    receipts.PORTABLE_AOT: lambda: cases.plugin(aot=True),
}  # fmt: skip
SMALL = (receipts.AOT_WORKS, receipts.AOT_STATIC, receipts.AOT_DYNAMIC)
PLAIN |= {name: lambda: cases.small_plugin("Probe", 64) for name in SMALL}

Change = Callable[[dict[str, np.ndarray]], None]


@dataclass
class Fake:
    """A TensorRT that answers what the case wants, after `change`."""

    driver: Driver
    case: Case = field(default_factory=cases.native)
    change: Change = lambda outputs: None
    layers: list[PlanLayer] = field(default_factory=list)
    built: list[int] = field(default_factory=list)
    portable: list[bool] = field(default_factory=list)
    defined: list[tuple[int, bool]] = field(default_factory=list)
    refuse: Callable[[onnx.ModelProto], bool] = lambda model: False

    def build(self, graph: Path, settings: Any, progress: Any, failures: Any, messages: Any) -> Any:
        model = onnx.load(graph)
        if self.refuse(model):
            raise BundleError("TensorRT cannot build it", "")
        self.built.append(settings.plugin_layers)
        self.portable.append(settings.portable)
        return SimpleNamespace(plan=model.SerializeToString())

    def open_plan(self, file: Path, messages: Any) -> cuda_emulator.Plan:
        model = onnx.load_from_string(file.read_bytes())
        tensors = []
        for side, values in ((True, model.graph.input), (False, model.graph.output)):
            for value in values:
                kind = value.type.tensor_type
                shape = tuple(dim.dim_value for dim in kind.shape.dim)
                tensors.append(
                    cuda_emulator.Tensor(value.name, side, TRT_TYPES[kind.elem_type], shape)
                )
        stored = {tensor.name: cuda_emulator.STORED[tensor.dtype] for tensor in tensors}
        plan = cuda_emulator.Plan(
            self.driver,
            tensors,
            lambda given: {
                name: array.view(stored[name]) for name, array in self.compute(given).items()
            },
        )
        plan.layers = lambda: self.layers  # type: ignore[method-assign]
        return plan

    def compute(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for name, array in given.items():
            assert array.tobytes() == self.case.inputs[name].tobytes(), (
                f"{name} was not given as the case has it"
            )
        outputs = {
            "out": self.case.out.astype(np.float32),
            **{name: block.copy() for name, block in self.case.blocks.items()},
        }
        self.change(outputs)
        return outputs


@pytest.fixture
def probes(trt: ModuleType, registry: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    from aapt_deploy.backends.trt.plugin import ahead_of_time
    from aapt_deploy.backends.trt.plugin import python as python_plugin

    monkeypatch.setattr(python_plugin, "_REGISTERED", [])
    monkeypatch.setattr(ahead_of_time, "_DEFINED", [])
    monkeypatch.setattr(kernels, "launcher", lambda layout, head_dim: None)
    yield importlib.import_module("aapt_deploy.backends.trt.doctor.probes")
    forget(importlib.import_module("tensorrt.plugin"), "aapt")


@pytest.fixture
def fake(probes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Fake:
    from aapt_deploy.backends.trt.doctor import smallest_plugin

    made = Fake(Driver())
    monkeypatch.setattr(probes.api, "build", made.build)
    monkeypatch.setattr(probes.api, "open_plan", made.open_plan)
    monkeypatch.setattr(
        smallest_plugin, "define", lambda size, dynamic: made.defined.append((size, dynamic))
    )

    def in_this_process(
        module: str, arguments: list[str], patience_s: float
    ) -> tuple[dict[str, Any], str]:
        assert module == "aapt_deploy.backends.trt.doctor.lean_run"
        device = cuda.Device(made.driver)
        told = lean_run.answer(arguments[0], Path(arguments[1]), device)
        device.close()
        return told, ""

    monkeypatch.setattr(lean_run, "api_of", lambda flavour: probes.api)
    monkeypatch.setattr(probes, "ask_process", in_this_process)
    monkeypatch.setattr(probes, "installed", lambda flavour: probes.api.version())
    return made


LAYERS = {
    "plugin": PlanLayer("mine", "PluginV3", "", (), ()),
    "fp8": PlanLayer("product", "gemm", "t", ("FP8",), ()),
    "mha": PlanLayer("a", "fmha", "", ("FP8",), ()),
}
NEEDED = {
    receipts.FP8_PRODUCTS: "fp8", receipts.PLUGIN_FP8: "plugin", receipts.PLUGIN_PACKED: "plugin",
    receipts.PLUGIN_CAPTURED: "plugin",
    receipts.FUNCTION: "plugin", receipts.FP8_ATTENTION: "mha",
}  # fmt: skip


def ask(probes: ModuleType, fake: Fake, name: str) -> tuple[bool, str]:
    fake.case = PLAIN[name]()
    fake.layers = [LAYERS[NEEDED[name]]] if name in NEEDED else []
    device = cuda.Device(fake.driver)
    told = probes.answer(name, device)
    device.close()
    assert not (fake.driver.held or fake.driver.pinned)
    return told["ok"], told["found"]


def test_there_is_a_question_for_every_name(probes: ModuleType) -> None:
    assert tuple(probes.PROBES) == receipts.PROBES
    assert PLAIN.keys() == {*receipts.PROBES}


@pytest.mark.parametrize("name", receipts.PROBES)
def test_a_right_answer_is_a_yes_and_a_wrong_one_a_no(
    probes: ModuleType, fake: Fake, name: str
) -> None:
    ok, found = ask(probes, fake, name)
    assert ok, found
    assert fake.built == [fake.case.plugin_layers] and any(
        "GraphLaunch" in call for call in fake.driver.journal
    ) is ("captured" in name)
    assert fake.portable == ["portable" in name]

    def wrong(outputs: dict[str, np.ndarray]) -> None:
        outputs["out"] = outputs["out"] * np.float32(1.2)

    def nothing(outputs: dict[str, np.ndarray]) -> None:
        outputs["out"] = outputs["out"] * np.float32("nan")

    if name != receipts.SLOT:
        for fake.change in (wrong, nothing):
            ok, found = ask(probes, fake, name)
            assert not ok and "differs by" in found

    def blocks(outputs: dict[str, np.ndarray]) -> None:
        for block in fake.case.blocks:
            outputs[block] = outputs[block][::-1].copy() + 1

    if fake.case.blocks:
        fake.change = blocks
        assert not ask(probes, fake, name)[0]


@pytest.mark.parametrize("name", NEEDED)
def test_a_plan_that_took_something_slower_is_a_no(
    probes: ModuleType, fake: Fake, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        NEEDED, name, {"plugin": "fp8", "fp8": "plugin", "mha": "fp8"}[NEEDED[name]]
    )
    ok, found = ask(probes, fake, name)
    assert not ok and ("instead of" in found or "not one FP8 kernel" in found)


def test_capture_is_asked_in_the_form_that_works(probes: ModuleType, fake: Fake) -> None:
    fake.case = cases.plugin(packed=True)
    fake.layers, fake.refuse = (
        [LAYERS["plugin"]],
        lambda model: model.graph.input[3].type.tensor_type.elem_type != onnx.TensorProto.INT32,
    )
    device = cuda.Device(fake.driver)
    told = probes.answer(receipts.PLUGIN_CAPTURED, device)
    device.close()
    assert told["ok"] and told["found"].endswith("int32 caches")


def test_a_portable_plugin_is_asked_in_the_form_that_works(probes: ModuleType, fake: Fake) -> None:
    fake.case = cases.plugin(packed=True)
    fake.refuse = lambda model: (
        model.graph.input[3].type.tensor_type.elem_type != onnx.TensorProto.INT32
    )
    device = cuda.Device(fake.driver)
    told = probes.answer(receipts.PORTABLE_PLUGIN, device)
    device.close()
    assert told["ok"] and told["found"].endswith("int32 caches")


@pytest.mark.parametrize("there", [None, "11.3.0.1"])
def test_without_the_lean_runtime_of_this_release_nothing_portable_is_proved(
    probes: ModuleType, fake: Fake, monkeypatch: pytest.MonkeyPatch, there: str | None
) -> None:
    monkeypatch.setattr(probes, "installed", lambda flavour: there)
    ok, found = ask(probes, fake, receipts.PORTABLE_NATIVE)
    wanted = f"tensorrt-lean-cu13-libs=={probes.api.version()}"
    assert not ok and wanted in found and fake.built == []


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ((None, "crashed with SIGSEGV: x"), "the lean runtime: crashed with SIGSEGV: x"),
        (({"ok": False, "found": "differs by 0.5"}, ""), "the lean runtime: differs by 0.5"),
    ],
)
def test_what_happens_in_the_lean_runtime_s_process_is_the_answer(
    probes: ModuleType,
    fake: Fake,
    monkeypatch: pytest.MonkeyPatch,
    told: tuple[Any, str],
    reason: str,
) -> None:
    monkeypatch.setattr(probes, "ask_process", lambda *asked: told)
    assert ask(probes, fake, receipts.PORTABLE_NATIVE) == (False, reason)


def test_bytes_beside_a_slot_are_seen(probes: ModuleType, fake: Fake) -> None:
    case = cases.native()
    row = case.inputs["k_cache"].nbytes // cases.RING.tokens

    def beside(outputs: dict[str, np.ndarray]) -> None:
        address = next(
            base
            for base, size in fake.driver.allocated
            if size == case.inputs["k_cache"].nbytes and not fake.driver.held[base][:row].any()
        )
        fake.driver.held[address][cases.SLOT * row - 1] = 7

    fake.change = beside
    assert ask(probes, fake, receipts.SLOT) == (False, "something beside the slot was written")


def test_a_question_through_the_strict_fakes_of_this_release(
    probes: ModuleType,
    trt: ModuleType,
    release: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    registry: Any,
) -> None:
    """Every call fits the bindings; a fake computes nothing, so the answer must be a no."""
    rig = Rig(trt, registry, release, monkeypatch, tmp_path)
    driver = Driver()
    rig.recorder.script["IExecutionContext.execute_async_v3"] = lambda stream: True
    device = cuda.Device(driver)
    for name in (receipts.NATIVE_BUILDS, receipts.PLUGIN_FP8, receipts.SLOT):
        rig.recorder.journal.clear()
        told = probes.answer(name, device)
        assert told["ok"] is False and (
            "differs by" in told["found"] or "not in its slot" in told["found"]
        ), told
        calls = [call.split("(")[0] for call in rig.recorder.journal]
        assert (
            calls.count("Builder.build_serialized_network") == 1
            and calls.count("IExecutionContext.execute_async_v3") == 2
        )
    device.close()


@pytest.mark.parametrize(
    ("size", "dynamic"), [(1 << 10, False), (64 << 10, False), (64 << 10, True)]
)
def test_the_small_plugin_goes_from_the_registry_to_its_kernel(
    probes: ModuleType,
    trt: ModuleType,
    registry: Any,
    builder: Any,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    dynamic: bool,
) -> None:
    from aapt_deploy.backends.trt.doctor import smallest_plugin

    given: list[tuple[str, ...]] = []
    compiled = SimpleNamespace(ptx=b"//\n.version 8.6\n")
    monkeypatch.setattr(
        kernels, "compile_source", lambda source, defines: given.append(defines) or compiled
    )
    smallest_plugin.define(size, dynamic)
    assert given == [(f"AAPT_BYTES={size}", *(["AAPT_DYNAMIC=1"] if dynamic else []))]
    plugin = registry.get_creator("Probe", "1", "aapt").create_plugin(
        "Probe",
        "aapt",
        trt.PluginFieldCollection([]),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    plugin.get_output_data_types([trt.DataType.FLOAT], [1])
    expressions = [trt.DimsExprs([builder.constant(64)])]
    plugin.get_output_shapes(expressions, [], builder)
    in_out = descs(trt, [(64,), (64,)], ["FLOAT", "FLOAT"])
    plugin.get_supported_format_combinations(in_out, 1)
    plugin.configure_plugin(in_out[:1], in_out[1:])
    plugin.get_valid_tactics()
    plugin.set_tactic(0)
    made: list[int] = []
    monkeypatch.setattr(
        trt.plugin._tensor, "SymExprImpl", lambda number: made.append(number._expr.value) or number
    )
    plugin.get_launch_params(expressions, in_out, 1, SimpleNamespace(), Setter(), builder)
    assert made == [1, 1, 1, 64, 1, 1, size if dynamic else 0, 64]
    kernel, image = plugin.clone().get_kernel([in_out[0].desc], [in_out[1].desc])
    assert (kernel, image) == ("aapt_probe", compiled.ptx)


@pytest.mark.parametrize(("size", "dynamic"), [(64 << 10, False), (64 << 10, True)])
def test_the_small_kernel_compiles_for_the_gpu(trt: ModuleType, size: int, dynamic: bool) -> None:
    """By NVRTC, whose assembler must take the 64 KiB of static memory too."""
    from aapt_deploy.backends.trt.doctor import smallest_plugin

    compiled = kernels.compile_source(
        smallest_plugin.SOURCE, (f"AAPT_BYTES={size}", *(["AAPT_DYNAMIC=1"] if dynamic else []))
    )
    text = compiled.ptx.decode()
    assert (
        ".visible .entry aapt_probe(" in text
        and (f"[{size}]" in text) is not dynamic
        and compiled.cubin
    )


def test_a_process_prints_one_line_whatever_happens(
    probes: ModuleType,
    fake: Fake,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cuda, "with_driver", lambda: cuda.Device(fake.driver))
    probes.main("here")
    here = cuda.Gpu(**json.loads(capsys.readouterr().out))
    assert (here.sm, here.cuda, here.gpu, here.kernels) == (
        90,
        "13.0",
        "Emulated H100",
        kernels.source_hash(),
    )
    fake.change = lambda outputs: (_ for _ in ()).throw(
        ZeroDivisionError("what TensorRT may raise")
    )
    with contextlib.suppress(SystemExit):
        probes.main(receipts.NATIVE_BUILDS)
    assert json.loads(capsys.readouterr().out) == {
        "ok": False,
        "found": "ZeroDivisionError: what TensorRT may raise",
    }


def test_the_nodes_of_the_small_plugin_name_it(probes: ModuleType) -> None:
    from aapt_deploy.backends.trt.doctor import smallest_plugin

    node = cases.small_plugin(smallest_plugin.NAME, smallest_plugin.THREADS).model.graph.node[0]
    assert f"{node.domain}::{node.op_type}" == smallest_plugin.ID and node.domain == DOMAIN
