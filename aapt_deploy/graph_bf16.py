"""An exported graph for tensor cores: products in bf16, or in FP8 where the graph already says so; everything else stays float32.

A strongly typed TensorRT network computes in the types that the graph has, so this is where the choice is made. Every MatMul, Gemm and Conv that is
not quantised gets its operands cast to bf16 and its result cast back; TensorRT folds the casts of weights and fuses the others into their
neighbours. Sums along the residual path, norms and modulation keep float32: they cost memory traffic, not tensor-core time, and errors there add
up over blocks.

A product that reads DequantizeLinear is left exactly as it was exported, because a cast between the two would keep TensorRT from computing it in FP8.
"""

from collections.abc import Sequence

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

PRODUCTS = ("MatMul", "Gemm", "Conv")
PASSING = ("Transpose", "Reshape")  # between a weight's DequantizeLinear and its product


def products_in_bf16(model: ModelProto) -> ModelProto:
    """`model` with its float32 products in bf16. Weights keep their float32 bytes, wherever they lie; TensorRT rounds them while it builds."""
    lowered = ModelProto()
    lowered.CopyFrom(model)
    graph = lowered.graph
    made = {name: node for node in graph.node for name in node.output}
    casts: dict[str, NodeProto] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type not in PRODUCTS or any(dequantised(name, made) for name in node.input):
            nodes.append(node)
            continue
        for index, name in enumerate(node.input):
            if name and name not in casts:
                casts[name] = helper.make_node("Cast", [name], [f"{name}.bf16"], f"{name}.to_bf16", to=TensorProto.BFLOAT16)
                nodes.append(casts[name])
            if name:
                node.input[index] = f"{name}.bf16"
        out = node.output[0]
        node.output[0] = f"{out}.in_bf16"
        nodes += [node, helper.make_node("Cast", [node.output[0]], [out], f"{out}.from_bf16", to=TensorProto.FLOAT)]
    del graph.node[:]
    graph.node.extend(nodes)
    return lowered


def dequantised(name: str, made: dict[str, NodeProto]) -> NodeProto | None:
    """The DequantizeLinear that tensor `name` comes from, by way of operators that only move numbers."""
    node = made.get(name)
    while node is not None and node.op_type in PASSING:
        node = made.get(node.input[0])
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def fp8_products(model: ModelProto) -> dict[str, list[str]]:
    """Names of the products that the graph quantises, by what they read.

    Products of one input with one scale may become one layer of a plan, so a plan has at least as many FP8 layers as this has entries.
    """
    made = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, list[str]] = {}
    for node in model.graph.node:
        activations = [dq for name in node.input[:1] if node.op_type in PRODUCTS and (dq := dequantised(name, made))]
        for dq in activations:
            quantise = made.get(dq.input[0])
            source = quantise.input[0] if quantise is not None else dq.input[0]
            found.setdefault(source, []).append(node.name)
    return found


def outputs_in_bf16(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """`model` whose outputs `names` leave as bf16."""
    lowered = ModelProto()
    lowered.CopyFrom(model)
    graph = lowered.graph
    renamed = {name: f"{name}.float" for name in names}
    for node in graph.node:
        for field in (node.input, node.output):
            for index, name in enumerate(field):
                field[index] = renamed.get(name, name)
    for value in graph.value_info:
        value.name = renamed.get(value.name, value.name)
    kept: list[ValueInfoProto] = []
    for value in graph.output:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        kept.append(helper.make_tensor_value_info(value.name, TensorProto.BFLOAT16, shape) if value.name in renamed else value)
    del graph.output[:]
    graph.output.extend(kept)
    graph.node.extend(helper.make_node("Cast", [old], [name], f"{name}.to_bf16", to=TensorProto.BFLOAT16) for name, old in renamed.items())
    return lowered
