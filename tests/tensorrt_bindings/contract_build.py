"""build-engine through strict fakes of one release: what it asks of TensorRT for a whole fp8 bundle, in each form of attention, with golden logs.

The bundle is synthetic and small; its generator has our op's nodes and one product in FP8. Builder, parser and runtime are fakes made from the
release's stubs; a "network" has the layers that the lowered file has nodes, but a plugin's only where its creator is registered, as TensorRT does it.
"""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import type_stubs
from contract_aot import forget
from contract_engine import small
from cuda_emulator import Driver
from onnx import TensorProto, helper
from recorder import Recorder, Stubs

from aapt_deploy import bundle as bundles
from aapt_deploy import probe_graphs, proofs, scales
from aapt_deploy.engine import cuda
from aapt_deploy.errors import BundleError, MachineError, ParityError
from aapt_deploy.models.aapt_signature import layer_names, signatures
from aapt_deploy.ops.block_causal_attention import DOMAIN, NAME, PLUGIN_NAMESPACE, PLUGIN_VERSION, Ring, hopper_fp8, kernels, softmax_scale
from aapt_deploy.profiles import Profile
from aapt_deploy.proofs import AOT, NATIVE, PYTHON, Choice
from aapt_deploy.signature import GraphSignature

GOLDEN = Path(__file__).parent / "golden"
ONNX_TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int64": TensorProto.INT64, "uint8": TensorProto.UINT8}
TRT_TYPES = {TensorProto.FLOAT: "FLOAT", TensorProto.INT32: "INT32", TensorProto.INT64: "INT64", TensorProto.UINT8: "UINT8"} | {
    TensorProto.BFLOAT16: "BF16", TensorProto.FLOAT8E4M3FN: "FP8",
}  # fmt: skip
MANY = re.compile(r"(get_layer|get_input|get_output|get_tensor_)(?:name|mode|dtype|shape)?\(.*\)")


def generator_graph(profile: Profile) -> onnx.ModelProto:
    """Attention in every layer, each fed by the layer before it, and the FP8 product of the doctor's micro-graph beside it."""
    heads, dim, tokens = profile.model.heads, profile.head_dim, profile.frame_tokens
    block, cache = [1, tokens, heads, dim], [1, Ring.of(profile).tokens, heads, dim]
    product = probe_graphs.fp8_product().model.graph
    nodes, described = [*product.node], []
    inputs = [helper.make_tensor_value_info("q", TensorProto.FLOAT, block), helper.make_tensor_value_info("cache_len", TensorProto.INT32, [1])]
    outputs, before = [*product.output], "q"
    attributes: dict[str, Any] = {"scale": softmax_scale(dim), "plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}
    for layer in range(profile.model.depth):
        names = [f"{name}.{layer:02d}" for name in ("k_cache", "v_cache", "k_block", "v_block", "attended")]
        inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, cache) for name in names[:2]]
        outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, block) for name in names[2:4]]
        described.append(helper.make_tensor_value_info(names[4], TensorProto.FLOAT, block))
        reads, writes = [before, before, before, *names[:2], "cache_len"], [names[4], *names[2:4]]
        nodes.append(helper.make_node(NAME, reads, writes, f"attention.{layer}", domain=DOMAIN, **attributes))
        before = names[4]
    nodes.append(helper.make_node("Identity", [before], ["clean"], "last"))
    outputs.append(helper.make_tensor_value_info("clean", TensorProto.FLOAT, block))
    graph = helper.make_graph(nodes, "generator", [*inputs, *product.input], outputs, [*product.initializer], value_info=described)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)], ir_version=10)


def plain_graph(signature: GraphSignature) -> onnx.ModelProto:
    """The graph's inputs and outputs, each made of the first input."""
    inputs = [helper.make_tensor_value_info(spec.name, ONNX_TYPES[spec.dtype], spec.shape) for spec in (*signature.inputs, *signature.state)]
    outputs = [helper.make_tensor_value_info(spec.name, ONNX_TYPES[spec.dtype], spec.shape) for spec in signature.outputs]
    nodes = [helper.make_node("Cast", [inputs[0].name], [output.name], f"to.{output.name}", to=TensorProto.FLOAT) for output in outputs]
    return helper.make_model(helper.make_graph(nodes, signature.name, inputs, outputs), opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


class Rig:
    """A bundle, a machine, and the builder over fakes."""

    def __init__(self, trt: ModuleType, registry: Any, release: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        self.trt, self.registry, self.profile = trt, registry, small()
        stubs = Stubs(type_stubs.type_stubs(release) / "tensorrt" / "__init__.pyi")
        self.recorder = Recorder(trt, stubs, {})
        for kind in ("Builder", "OnnxParser", "Runtime"):
            monkeypatch.setattr(trt, kind, self.recorder.constructor(kind))
        self.module = importlib.import_module("aapt_deploy.build_tensorrt")
        self.parsed = self.opened = onnx.ModelProto()
        self.lose: tuple[str, ...] = ()  # kinds of layers that the plan does not have
        self.said: list[str] = []
        self.recorder.script |= self._script()
        monkeypatch.setattr(kernels, "launcher", lambda layout, head_dim: None)
        self.bundle = self._bundle(folder / "bundle")
        device = cuda.Device(Driver())
        self.here = device.here(trt.__version__, "k" * 64)
        device.close()

    def _bundle(self, path: Path) -> bundles.Bundle:
        heads, dim = self.profile.model.heads, self.profile.head_dim
        one = hopper_fp8.Scales(*(np.ones(heads, np.float32),) * 2, np.zeros((heads, dim), np.float32), np.ones((heads, dim), np.float32))
        self.scales = [one] * self.profile.model.depth
        with bundles.create(path, self.profile) as draft:
            for name, signature in signatures(self.profile).items():
                model = generator_graph(self.profile) if name == "generator" else plain_graph(signature)
                (draft.path / f"{name}.onnx").write_bytes(model.SerializeToString())
            scales.save(scales.Scales({}, self.scales), draft.path / scales.FILE)
            draft.manifest |= {"precision": "fp8", "source": {"checkpoint": "made.safetensors", "sha256": "0" * 64}}
        return bundles.Bundle.open(path)

    def _script(self) -> dict[str, Any]:
        trt = self.trt
        return {
            "OnnxParser.parse_from_file": self._parse,
            "INetworkDefinition.num_layers": lambda: len(self.parsed.graph.node), "INetworkDefinition.get_layer": self._layer,
            "INetworkDefinition.num_inputs": lambda: len(self.parsed.graph.input),
            "INetworkDefinition.num_outputs": lambda: len(self.parsed.graph.output),
            "INetworkDefinition.get_input": lambda index: self._tensor(self.parsed.graph.input[index]),
            "INetworkDefinition.get_output": lambda index: self._tensor(self.parsed.graph.output[index]),
            "Builder.build_serialized_network": lambda network, config: self.parsed.SerializeToString(),
            "ITimingCache.serialize": b"timings",
            "Runtime.deserialize_cuda_engine": self._deserialise,
            "ICudaEngine.num_io_tensors": lambda: len(self._io()), "ICudaEngine.get_tensor_name": lambda index: self._io()[index].name,
            "ICudaEngine.get_tensor_mode": lambda name: trt.TensorIOMode.INPUT if name in self._inputs() else trt.TensorIOMode.OUTPUT,
            "ICudaEngine.get_tensor_dtype": lambda name: self._tensor(next(v for v in self._io() if v.name == name)).dtype,
            "ICudaEngine.get_tensor_shape": lambda name: self._tensor(next(v for v in self._io() if v.name == name)).shape,
            "ICudaEngine.device_memory_size_v2": 4096, "EngineInspector.get_engine_information": lambda form: self._inspect(),
        }  # fmt: skip

    def _parse(self, path: str) -> bool:
        self.parsed = onnx.load(path)
        return True

    def _known(self, node: onnx.NodeProto) -> bool:
        return node.domain == DOMAIN and self.registry.get_creator(node.op_type, PLUGIN_VERSION, PLUGIN_NAMESPACE) is not None

    def _layer(self, index: int) -> Any:
        kind = "PLUGIN_V3" if self._known(self.parsed.graph.node[index]) else "IDENTITY"
        return self.recorder.make("ILayer", type=getattr(self.trt.LayerType, kind))

    def _tensor(self, value: Any) -> Any:
        kind = value.type.tensor_type
        shape = tuple(dim.dim_value for dim in kind.shape.dim)
        return self.recorder.make("ITensor", name=value.name, dtype=getattr(self.trt.DataType, TRT_TYPES[kind.elem_type]), shape=shape)

    def _deserialise(self, plan: Any) -> Any:
        self.opened = onnx.load_from_string(bytes(plan))
        return self.recorder.make("ICudaEngine")

    def _inputs(self) -> set[str]:
        return {value.name for value in self.opened.graph.input}

    def _io(self) -> list[Any]:
        return [*self.opened.graph.input, *self.opened.graph.output]

    def _inspect(self) -> str:
        layers = []
        for node in self.opened.graph.node:
            kind = "PluginV3" if node.domain == DOMAIN else {"Attention": "fmha", "MatMul": "gemm"}.get(node.op_type, "kgen")
            dtype = "FP8" if node.name == "product" else "BF16"
            if kind not in self.lose and dtype not in self.lose:
                layers.append({"Name": node.name, "LayerType": kind, "Inputs": [{"Name": "x", "DataType": dtype}], "Outputs": [], "TacticName": "t"})
        return json.dumps({"Layers": layers})

    def order(self, choice: Choice) -> Any:
        return self.module.Order(self.bundle, "fp8", choice, self.here, self.scales, self.said.append)

    def plans(self, *choices: Choice) -> Any:
        with self.bundle.add_engine("tensorrt-fp8") as stage:
            order, finished = self.module._all_plans(self.order(choices[0]), choices, stage.folder)
            self.module._place(stage, order, finished)
        return order, finished

    def golden(self, name: str, write: bool) -> None:
        """The journal, with the many questions about layers and tensors counted."""
        lines: list[tuple[str, int]] = []
        for raw in self.recorder.journal:
            line = MANY.sub(r"\1(...)", re.sub(r"'[^']*/", "'", raw))
            line = re.sub(r"<\d\d+ bytes>", "<plan>", line)
            lines = [*lines[:-1], (line, lines[-1][1] + 1)] if lines and lines[-1][0] == line else [*lines, (line, 1)]
        text = "".join(f"{line}\n" if count == 1 else f"{line} x {count}\n" for line, count in lines)
        file = GOLDEN / f"{name}.txt"
        if write:
            file.write_text(text)
        assert text == file.read_text()


CHOICES = {form: Choice(form, packed=False, captured=True, reason="proved here") for form in (PYTHON, AOT, NATIVE)}


@pytest.fixture
def rig(trt: ModuleType, registry: Any, release: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Rig]:
    from aapt_deploy.ops.block_causal_attention import trt_plugin, trt_plugin_aot

    monkeypatch.setattr(trt_plugin, "_REGISTERED", [])
    monkeypatch.setattr(trt_plugin_aot, "_DEFINED", [])
    yield Rig(trt, registry, release, monkeypatch, tmp_path)
    forget(importlib.import_module("tensorrt.plugin"), "aapt")


@pytest.fixture
def write(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--write-golden"))


@pytest.mark.parametrize("form", CHOICES)
def test_a_build_of_a_bundle_is_these_calls(rig: Rig, release: str, form: str, write: bool) -> None:
    order, finished = rig.plans(CHOICES[form])
    rig.golden(f"bundle-{form}-{release}", write)
    assert order.choice.form == form and set(finished) == set(signatures(rig.profile))
    audit = finished["generator"].audit
    plugins = {PYTHON: 2, AOT: 4, NATIVE: 0}[form]
    assert (audit["plugins"], audit["fp8"], audit["attention"]) == (plugins, 1, 2 if form == NATIVE else 0)
    entry = rig.bundle.engines["tensorrt-fp8"]
    assert entry["plugin"] == form and ("scales" in entry) == (form != NATIVE)
    assert entry["receipts"]["generator"]["kernels"] == ("" if form == NATIVE else "k" * 64) and entry["receipts"]["decoder"]["kernels"] == ""
    stored = {PYTHON: "FP8", AOT: "FP8", NATIVE: "BF16"}[form]
    rig.opened = onnx.load_from_string((rig.bundle.path / entry["graphs"]["generator"]).read_bytes())
    kinds = {value.name: TRT_TYPES[value.type.tensor_type.elem_type] for value in rig._io()}
    assert {kinds[name] for prefix in ("k_cache", "v_block") for name in layer_names(prefix, rig.profile)} == {stored}


def test_the_runtime_reads_what_the_builder_wrote(rig: Rig) -> None:
    from aapt_deploy.engine.trt import Entry

    rig.plans(CHOICES[PYTHON])
    entry = Entry.of(rig.bundle, "fp8")
    assert entry.plugin == PYTHON and entry.captured and entry.scales
    for found, wanted in zip(scales.load(rig.bundle.checked(entry.scales), rig.profile).attention, rig.scales, strict=True):
        assert all(np.array_equal(array, getattr(wanted, name)) for name, array in vars(found).items())


def test_packed_caches_are_int32(rig: Rig) -> None:
    rig.plans(Choice(PYTHON, packed=True, captured=True, reason=""))
    kinds = {value.name: TRT_TYPES[value.type.tensor_type.elem_type] for value in onnx.load_from_string(
        (rig.bundle.path / rig.bundle.engines["tensorrt-fp8"]["graphs"]["generator"]).read_bytes()
    ).graph.input}  # fmt: skip
    assert kinds["k_cache.00"] == "INT32"


def test_the_plugin_is_registered_before_the_graph_is_parsed(rig: Rig) -> None:
    seen: list[list[str]] = []
    parse = rig._parse
    rig.recorder.script["OnnxParser.parse_from_file"] = lambda path: seen.append(sorted(key[0] for key in rig.registry.creators)) or parse(path)
    rig.plans(CHOICES[PYTHON])
    assert seen[0] == [NAME]


# --- planted: a missing plugin, a silent fallback, products that are not in FP8 ---


@pytest.mark.parametrize(("form", "wanted"), [(PYTHON, 2), (AOT, 4)])
def test_a_plugin_that_was_not_registered_is_a_missing_layer_and_no_silent_fallback(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, form: str, wanted: int
) -> None:
    monkeypatch.setattr(rig.module, "_register", lambda order, lowered: ())
    with pytest.raises(ParityError, match=f"took 0 of the {wanted} aapt::BlockCausalAttention layers"):
        rig.plans(CHOICES[form])
    assert not [call for call in rig.recorder.journal if "build_serialized_network" in call]


@pytest.mark.parametrize(("lost", "said"), [("PluginV3", "0 layers instead of 2"), ("FP8", "0 layers in FP8 instead of 1")])
def test_a_plan_without_what_it_was_built_for_is_refused_and_not_kept(rig: Rig, lost: str, said: str) -> None:
    rig.lose = (lost,)
    with pytest.raises(ParityError, match=said):
        rig.plans(CHOICES[PYTHON])
    assert not list((proofs.cache_folder() / "unfinished").iterdir())


def test_a_form_that_tensorrt_refuses_gives_way_to_the_next_and_says_so(rig: Rig) -> None:
    def parse(path: str) -> bool:
        rig._parse(path)
        return not any(node.domain == DOMAIN for node in rig.parsed.graph.node)

    rig.recorder.script["OnnxParser.parse_from_file"] = parse
    order, _ = rig.plans(CHOICES[PYTHON], CHOICES[AOT], CHOICES[NATIVE])
    assert order.choice.form == NATIVE and rig.bundle.engines["tensorrt-fp8"]["plugin"] == NATIVE
    assert sum(line.startswith("warning: attention in form") for line in rig.said) == 2


def test_what_the_plugin_raised_is_the_error_of_the_build(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(layout: str, head_dim: int) -> None:
        raise MachineError("GPU NVIDIA L40S has compute capability 8.9", "take another")

    monkeypatch.setattr(kernels, "launcher", refuse)
    with pytest.raises(MachineError, match=r"compute capability 8\.9"):
        rig.plans(CHOICES[PYTHON])
    assert not rig.recorder.journal


def test_ctrl_c_in_the_middle_leaves_nothing_half_written(rig: Rig) -> None:
    calls: list[int] = []

    def build(network: Any, config: Any) -> bytes:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return bytes(rig.parsed.SerializeToString())

    rig.recorder.script["Builder.build_serialized_network"] = build
    with pytest.raises(KeyboardInterrupt):
        rig.plans(CHOICES[PYTHON])
    names = [file.suffix for file in (proofs.cache_folder() / "unfinished").iterdir()]
    assert sorted(names) == [".json", ".plan"] and "tensorrt-fp8" not in bundles.Bundle.open(rig.bundle.path).engines
    rig.plans(CHOICES[PYTHON])
    assert len(calls) == 2 + 3, "the generator's plan was not kept"


def test_errors_of_the_parser_reach_the_user_with_what_can_be_done(rig: Rig) -> None:
    rig.recorder.script |= {
        "OnnxParser.parse_from_file": False, "OnnxParser.num_errors": 1, "ParserError.desc": "No importer registered for op: Attention",
        "ParserError.node_name": "attention.0", "ParserError.node_operator": "Attention",
    }  # fmt: skip
    with pytest.raises(BundleError, match=r"Attention node 'attention\.0': No importer") as caught:
        rig.plans(CHOICES[NATIVE])
    assert "newer TensorRT" in caught.value.hint


def test_the_aot_kernels_are_our_ptx_and_launch_shapes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    from aapt_deploy.ops.block_causal_attention import trt_plugin_aot

    defined: list[Any] = []
    monkeypatch.setattr(trt_plugin_aot, "define", defined.append)
    launch = kernels.PtxLaunch("aapt_attend", "//\n.version 8.6\n", (2, 3, 1), (384, 1, 1))
    trt_plugin_aot.define_once(lambda *sizes: launch)
    trt_plugin_aot.define_once(lambda *sizes: launch)
    assert len(defined) == 1
    compiled = defined[0]("aapt_attend", 100, 3, 64)
    assert (compiled.name, compiled.ptx, compiled.grid, compiled.block, compiled.dynamic_shared_bytes) == (*launch, 0)
