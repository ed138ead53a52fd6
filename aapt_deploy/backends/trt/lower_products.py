"""Put a graph's products and attention into the number formats that TensorRT is fast in.

    products_in_bf16   operands and results of products in bf16, also around FP8 operands
    attention_in_bf16  operands and results of standard attention in bf16
    outputs_in_bf16    named outputs in bf16

TensorRT's networks are strongly typed: each product is computed in the type that it reads. All
functions return a new model. Weights stay float32 on disk; TensorRT rounds them while it builds.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from aapt_deploy.errors import BundleError
from aapt_deploy.ops.block_causal_attention.onnx_function import replace

PRODUCTS = ("MatMul", "Gemm", "Conv")  # not ConvTranspose: TensorRT's compiler has none in bf16
ATTENTION = "Attention"
PASSING = ("Transpose", "Reshape")  # between a weight's DequantizeLinear and its product
BF16 = TensorProto.BFLOAT16


class _Casts:
    """Casts of tensors to bf16, one for each tensor."""

    def __init__(self, suffix: str) -> None:
        self._suffix, self._made = suffix, set[str]()

    def of(self, name: str) -> tuple[str, list[NodeProto]]:
        """Return the name of `name` in bf16, and the node if it is new."""
        new = f"{name}.{self._suffix}"
        if name in self._made:
            return new, []
        self._made.add(name)
        return new, [_cast(name, new, f"{new}.cast", BF16)]


def products_in_bf16(model: ModelProto, folder: Path) -> ModelProto:
    """Return `model` with its float32 products in bf16.

    Operands in FP8 stay in FP8, with scales in bf16. Else DequantizeLinear would yield float32, and
    the product would write twice the bytes. `folder` has the graph's external data.
    """
    lowered = ModelProto()
    lowered.CopyFrom(model)
    graph = lowered.graph
    made = {name: node for node in graph.node for name in node.output}
    quantising = _quantising(graph.node, made)
    halved = _scales_in_bf16(lowered, [made[name] for name in sorted(quantising)], folder)
    casts, nodes = _Casts("bf16"), list[NodeProto]()
    for node in graph.node:
        if node.output[0] in quantising:
            if node.op_type == "QuantizeLinear":
                node.input[0], new = casts.of(node.input[0])
                nodes += new
            node.input[1] = halved[node.input[1]]
        if node.op_type not in PRODUCTS:
            nodes.append(node)
            continue
        for index, name in enumerate(node.input):
            if name and not dequantised(name, made):
                node.input[index], new = casts.of(name)
                nodes += new
        nodes += _returning_float(node)
    replace(graph.node, nodes)
    # The types of what follows a DequantizeLinear have changed.
    kept = [value for value in graph.value_info if not dequantised(value.name, made)]
    replace(graph.value_info, kept)
    return lowered


def _quantising(nodes: Iterable[NodeProto], made: dict[str, NodeProto]) -> set[str]:
    """Return the outputs of the nodes that quantise and dequantise the operands of products."""
    found = set()
    for node in nodes:
        for name in node.input if node.op_type in PRODUCTS else ():
            if dq := dequantised(name, made):
                found |= {dq.output[0]} | ({dq.input[0]} & made.keys())
    return found


def _scales_in_bf16(
    model: ModelProto, quantising: Iterable[NodeProto], folder: Path
) -> dict[str, str]:
    """Put the scales of these nodes into bf16; return their new names by the old ones.

    Raises BundleError if a scale is not a constant.
    """
    graph = model.graph
    names = {node.input[1] for node in quantising}
    given = {tensor.name: tensor for tensor in graph.initializer if tensor.name in names}
    if missing := sorted(names - given.keys()):
        text = f"graph {graph.name!r} computes the scale {missing[0]!r}, which must be a constant"
        raise BundleError(text, "export the checkpoint again with this version")
    for name, tensor in given.items():
        values = numpy_helper.to_array(tensor, str(folder)).astype(ml_dtypes.bfloat16)
        graph.initializer.append(numpy_helper.from_array(values, f"{name}.bf16"))
    replace(graph.initializer, [t for t in graph.initializer if t.name not in names])
    replace(graph.value_info, [value for value in graph.value_info if value.name not in names])
    return {name: f"{name}.bf16" for name in names}


def attention_in_bf16(model: ModelProto) -> ModelProto:
    """Return `model` with the standard's Attention in bf16, and its softmax scale in q.

    TensorRT has no fused kernel for float32. Its parser multiplies q and k each by the root of the
    scale, rounded to their type: at head_dim 128 in bf16 that is 0.29 % too little. Here q is
    multiplied in float32, before it is rounded. Raises BundleError if q has no shape.
    """
    lowered = ModelProto()
    lowered.CopyFrom(model)
    graph = lowered.graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.value_info}
    casts, nodes = _Casts("attention_bf16"), list[NodeProto]()
    for node in graph.node:
        if node.op_type != ATTENTION:
            nodes.append(node)
            continue
        scale = next((a.f for a in node.attribute if a.name == "scale"), None)
        if scale is None:
            if not (dims := shapes.get(node.input[0])):
                text = f"graph {graph.name!r} does not tell the shape of {node.input[0]!r}"
                raise BundleError(text, "export the checkpoint again with this version")
            scale = 1 / math.sqrt(dims[-1].dim_value)
        q, scaled = node.input[0], f"{node.output[0]}.q"
        factor = np.array(scale, np.float32)
        graph.initializer.append(numpy_helper.from_array(factor, f"{scaled}.scale"))
        nodes.append(helper.make_node("Mul", [q, f"{scaled}.scale"], [scaled], f"{scaled}.scaled"))
        for index, name in enumerate((scaled, *node.input[1:3])):
            node.input[index], new = casts.of(name)
            nodes += new
        replace(node.attribute, [a for a in node.attribute if a.name != "scale"])
        node.attribute.append(helper.make_attribute("scale", 1.0))
        nodes += _returning_float(node)
    replace(graph.node, nodes)
    return lowered


def _returning_float(node: NodeProto) -> list[NodeProto]:
    """Return `node`, which computes in bf16, and a cast of its output to float32."""
    out = node.output[0]
    node.output[0] = f"{out}.in_bf16"
    return [node, _cast(node.output[0], out, f"{out}.from_bf16", TensorProto.FLOAT)]


def _cast(source: str, target: str, name: str, dtype: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name, to=dtype)


def dequantised(name: str, made: dict[str, NodeProto]) -> NodeProto | None:
    """Return the DequantizeLinear behind tensor `name`, past operators that only move numbers."""
    node = made.get(name)
    while node is not None and node.op_type in PASSING:
        node = made.get(node.input[0])
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def fp8_products(model: ModelProto) -> dict[str, list[str]]:
    """Return the names of the products that the graph quantises, by what they read.

    Products of one input with one scale may become one layer of a plan. So a plan has at least
    as many FP8 layers as there are entries.
    """
    made = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, list[str]] = {}
    for node in model.graph.node:
        dq = dequantised(node.input[0], made) if node.op_type in PRODUCTS else None
        if dq is not None:
            quantise = made.get(dq.input[0])
            source = quantise.input[0] if quantise is not None else dq.input[0]
            found.setdefault(source, []).append(node.name)
    return found


def free_outputs(graph: GraphProto, names: Iterable[str]) -> dict[str, str]:
    """Rename what computes the outputs `names`, for another node to write them.

    Return the new names by the old ones.
    """
    renamed = {name: f"{name}.float" for name in names}
    for node in graph.node:
        for field in (node.input, node.output):
            for index, name in enumerate(field):
                field[index] = renamed.get(name, name)
    for value in graph.value_info:
        value.name = renamed.get(value.name, value.name)
    return renamed


def outputs_in_bf16(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """Return `model` with the outputs `names` in bf16."""
    lowered = ModelProto()
    lowered.CopyFrom(model)
    graph = lowered.graph
    renamed = free_outputs(graph, names)
    kept: list[ValueInfoProto] = []
    for value in graph.output:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        narrow = helper.make_tensor_value_info(value.name, BF16, shape)
        kept.append(narrow if value.name in renamed else value)
    replace(graph.output, kept)
    casts = [_cast(old, name, f"{name}.to_bf16", BF16) for name, old in renamed.items()]
    graph.node.extend(casts)
    return lowered
