"""A small bundle, an emulated machine, and the builder over fakes of one release."""

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from aapt_deploy import profiles
from aapt_deploy.backends.trt import cuda
from aapt_deploy.backends.trt.doctor import cases
from aapt_deploy.backends.trt.doctor.receipts import Choice
from aapt_deploy.backends.trt.flavour import PROPER
from aapt_deploy.backends.trt.order import Order
from aapt_deploy.bundle import bundle as bundles
from aapt_deploy.bundle import scales
from aapt_deploy.bundle.signature import GraphSignature
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.models.cost import cost_of
from aapt_deploy.ops.block_causal_attention import (
    DOMAIN,
    NAME,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    Ring,
    hopper_fp8,
    kernels,
    softmax_scale,
)
from aapt_deploy.profiles import Model, Profile, Vae, Window
from tests.support.bindings import GOLDEN, type_stubs
from tests.support.bindings.recorder import Recorder, Stubs
from tests.support.cuda_emulator import Driver


def small() -> Profile:
    """Two layers with the head_dim that our kernels have, a ring of two blocks and no sink."""
    tiny = profiles.load("tiny-cpu")
    return replace(
        tiny, name="small", model=Model(dim=128, depth=2, heads=2, patch=2),
        window=Window(frames=2, sink_frames=0),
        vae=Vae(encoder_channels=(), decoder_channels=(8, 8, 8), blocks=1, temporal_kernel=2),
    )  # fmt: skip


MANY = re.compile(r"(get_layer|get_input|get_output|get_tensor_)(?:name|mode|dtype|shape)?\(.*\)")
ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
}
TRT_TYPES = {
    TensorProto.FLOAT: "FLOAT", TensorProto.INT32: "INT32", TensorProto.INT64: "INT64",
    TensorProto.UINT8: "UINT8", TensorProto.BFLOAT16: "BF16", TensorProto.FLOAT8E4M3FN: "FP8",
}  # fmt: skip


def generator_graph(profile: Profile) -> onnx.ModelProto:
    """Return a graph with attention in every layer, each fed by the layer before it.

    The FP8 product of the doctor's micro-graph stands beside it.
    """
    heads, dim, tokens = profile.model.heads, profile.head_dim, profile.frame_tokens
    block, cache = [1, tokens, heads, dim], [1, Ring.of(profile).tokens, heads, dim]
    product = cases.fp8_product().model.graph
    nodes, described = [*product.node], []
    inputs = [
        helper.make_tensor_value_info("q", TensorProto.FLOAT, block),
        helper.make_tensor_value_info("cache_len", TensorProto.INT32, [1]),
    ]
    outputs, before = [*product.output], "q"
    attributes: dict[str, Any] = {
        "scale": softmax_scale(dim),
        "plugin_namespace": PLUGIN_NAMESPACE,
        "plugin_version": PLUGIN_VERSION,
    }
    for layer in range(profile.model.depth):
        names = [
            f"{name}.{layer:02d}"
            for name in ("k_cache", "v_cache", "k_block", "v_block", "attended")
        ]
        inputs += [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, cache) for name in names[:2]
        ]
        outputs += [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, block) for name in names[2:4]
        ]
        described.append(helper.make_tensor_value_info(names[4], TensorProto.FLOAT, block))
        reads, writes = [before, before, before, *names[:2], "cache_len"], [names[4], *names[2:4]]
        nodes.append(
            helper.make_node(NAME, reads, writes, f"attention.{layer}", domain=DOMAIN, **attributes)
        )
        before = names[4]
    nodes.append(helper.make_node("Identity", [before], ["clean"], "last"))
    outputs.append(helper.make_tensor_value_info("clean", TensorProto.FLOAT, block))
    graph = helper.make_graph(
        nodes,
        "generator",
        [*inputs, *product.input],
        outputs,
        [*product.initializer],
        value_info=described,
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )


def plain_graph(signature: GraphSignature) -> onnx.ModelProto:
    """The graph's inputs and outputs, each made of the first input."""
    inputs = [
        helper.make_tensor_value_info(spec.name, ONNX_TYPES[spec.dtype], spec.shape)
        for spec in (*signature.inputs, *signature.state)
    ]
    outputs = [
        helper.make_tensor_value_info(spec.name, ONNX_TYPES[spec.dtype], spec.shape)
        for spec in signature.outputs
    ]
    nodes = [
        helper.make_node(
            "Cast", [inputs[0].name], [output.name], f"to.{output.name}", to=TensorProto.FLOAT
        )
        for output in outputs
    ]
    return helper.make_model(
        helper.make_graph(nodes, signature.name, inputs, outputs),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=10,
    )


class Rig:
    """A bundle, a machine, and the builder over fakes."""

    def __init__(
        self,
        trt: ModuleType,
        registry: Any,
        release: str,
        monkeypatch: pytest.MonkeyPatch,
        folder: Path,
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        self.trt, self.registry, self.profile = trt, registry, small()
        stubs = Stubs(type_stubs.type_stubs(release) / "tensorrt" / "__init__.pyi")
        self.recorder = Recorder(trt, stubs, {})
        for kind in ("Builder", "OnnxParser", "Runtime"):
            monkeypatch.setattr(trt, kind, self.recorder.constructor(kind))
        self.module = importlib.import_module("aapt_deploy.backends.trt.build")
        self.parsed = self.opened = onnx.ModelProto()
        self.lose: tuple[str, ...] = ()  # kinds of layers that the plan does not have
        self.said: list[str] = []
        self.recorder.script |= self._script()
        monkeypatch.setattr(kernels, "launcher", lambda layout, head_dim: None)
        self.bundle = self._bundle(folder / "bundle")
        device = cuda.Device(Driver())
        self.here = device.gpu(trt.__version__, "k" * 64)
        device.close()

    def _bundle(self, path: Path) -> bundles.Bundle:
        heads, dim = self.profile.model.heads, self.profile.head_dim
        one = hopper_fp8.Scales(
            *(np.ones(heads, np.float32),) * 2,
            np.zeros((heads, dim), np.float32),
            np.ones((heads, dim), np.float32),
        )
        self.scales = [one] * self.profile.model.depth
        with bundles.create(path, self.profile) as draft:
            for name, signature in signatures(self.profile).items():
                model = (
                    generator_graph(self.profile) if name == "generator" else plain_graph(signature)
                )
                (draft.path / f"{name}.onnx").write_bytes(model.SerializeToString())
            scales.save(scales.Scales({}, self.scales), draft.path / scales.FILE)
            draft.manifest |= {
                "precision": "fp8",
                "source": {"checkpoint": "made.safetensors", "sha256": "0" * 64},
            }
        return bundles.Bundle.open(path)

    def _script(self) -> dict[str, Any]:
        trt = self.trt
        mode = trt.TensorIOMode
        graph = lambda: self.parsed.graph
        named = lambda name: self._tensor(next(v for v in self._io() if v.name == name))
        return {
            "OnnxParser.parse_from_file": self._parse,
            "INetworkDefinition.num_layers": lambda: len(self.parsed.graph.node),
            "INetworkDefinition.get_layer": self._layer,
            "INetworkDefinition.num_inputs": lambda: len(self.parsed.graph.input),
            "INetworkDefinition.num_outputs": lambda: len(self.parsed.graph.output),
            "INetworkDefinition.get_input": lambda index: self._tensor(graph().input[index]),
            "INetworkDefinition.get_output": lambda index: self._tensor(graph().output[index]),
            "Builder.build_serialized_network": self._serialise,
            "ITimingCache.serialize": b"timings",
            "Runtime.deserialize_cuda_engine": self._deserialise,
            "ICudaEngine.num_io_tensors": lambda: len(self._io()),
            "ICudaEngine.get_tensor_name": lambda index: self._io()[index].name,
            "ICudaEngine.get_tensor_mode": lambda name: (
                mode.INPUT if name in self._inputs() else mode.OUTPUT
            ),
            "ICudaEngine.get_tensor_dtype": lambda name: named(name).dtype,
            "ICudaEngine.get_tensor_shape": lambda name: named(name).shape,
            "ICudaEngine.device_memory_size_v2": 4096,
            "EngineInspector.get_engine_information": lambda form: self._inspect(),
        }  # fmt: skip

    def _parse(self, path: str) -> bool:
        self.parsed = onnx.load(path)
        return True

    def _known(self, node: onnx.NodeProto) -> bool:
        return (
            node.domain == DOMAIN
            and self.registry.get_creator(node.op_type, PLUGIN_VERSION, PLUGIN_NAMESPACE)
            is not None
        )

    def _layer(self, index: int) -> Any:
        kind = "PLUGIN_V3" if self._known(self.parsed.graph.node[index]) else "IDENTITY"
        return self.recorder.make("ILayer", type=getattr(self.trt.LayerType, kind))

    def _tensor(self, value: Any) -> Any:
        kind = value.type.tensor_type
        shape = tuple(dim.dim_value for dim in kind.shape.dim)
        return self.recorder.make(
            "ITensor",
            name=value.name,
            dtype=getattr(self.trt.DataType, TRT_TYPES[kind.elem_type]),
            shape=shape,
        )

    def _serialise(self, network: Any, config: Any) -> bytes:
        return self.parsed.SerializeToString()

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
            kind = (
                "PluginV3"
                if node.domain == DOMAIN
                else {"Attention": "fmha", "MatMul": "gemm"}.get(node.op_type, "kgen")
            )
            dtype = "FP8" if node.name == "product" else "BF16"
            if kind not in self.lose and dtype not in self.lose:
                layers.append(
                    {
                        "Name": node.name,
                        "LayerType": kind,
                        "Inputs": [{"Name": "x", "DataType": dtype}],
                        "Outputs": [],
                        "TacticName": "t",
                    }
                )
        return json.dumps({"Layers": layers})

    def order(self, choice: Choice) -> Any:
        tensorrt, cost = self.trt.__version__, cost_of(self.profile)
        return Order(
            self.bundle, "fp8", PROPER, tensorrt, (90,), self.here, choice, self.scales, cost,
            self.said.append, None,
        )  # fmt: skip

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
            lines = (
                [*lines[:-1], (line, lines[-1][1] + 1)]
                if lines and lines[-1][0] == line
                else [*lines, (line, 1)]
            )
        text = "".join(
            f"{line}\n" if count == 1 else f"{line} x {count}\n" for line, count in lines
        )
        file = GOLDEN / f"{name}.txt"
        if write:
            file.write_text(text)
        assert text == file.read_text()
