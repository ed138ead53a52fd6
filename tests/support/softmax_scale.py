"""The softmax scale that TensorRT gives to attention, from a lowered graph.

TensorRT's attention has no scale of its own. Its parser multiplies q and k each by the root of the
node's `scale`, in the tensor's own type: in bf16 both the root and the products are rounded. So a
scale on the node is not the kernel's. Here an attention node becomes what the parser makes of it,
in standard operators. Its scores leave the graph, and a fit over random queries and keys gives
their factor.
"""

import math

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from aapt_deploy.backends.trt.lower_fp8_attention import ATTENTION
from aapt_deploy.backends.trt.state import from_bf16, to_bf16
from tests.support.lowered_graphs import computed
from tests.support.native_fp8 import documented

BF16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT
KINDS = ("Attention", ATTENTION)
SCORES = "scores"


def attention_nodes(model: ModelProto) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type in KINDS]


def scores(
    model: ModelProto, index: int, given: dict[str, np.ndarray], q: str, k: str
) -> np.ndarray:
    """Compute the scores of attention node `index` of a lowered `model`: [1, H, T, keys].

    The graph is cut at the tensors `q` and `k`: they become inputs, and `given` has them.
    """
    cut = ModelProto()
    cut.CopyFrom(onnx.shape_inference.infer_shapes(model))
    graph = cut.graph
    node = attention_nodes(cut)[index]
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    narrow = kinds[node.input[0]] == BF16
    assert narrow == (kinds[node.input[1]] == BF16)
    graph.initializer.append(numpy_helper.from_array(_root(node, q, given[q], narrow), "root"))
    nodes = [other for other in graph.node if not {q, k} & set(other.output)]
    nodes = [other for other in nodes if other.op_type not in KINDS]
    inputs = {value.name for value in graph.input}
    graph.input.extend(
        helper.make_tensor_value_info(name, FLOAT, given[name].shape) for name in {q, k} - inputs
    )
    halves = []
    for name in node.input[:2]:
        product, rounded = f"{name}.times_root", f"{name}.in_type"
        nodes.append(helper.make_node("Mul", [name, "root"], [product]))
        nodes.append(helper.make_node("Cast", [product], [rounded], to=BF16 if narrow else FLOAT))
        halves.append(rounded)
    nodes.append(helper.make_node("Transpose", [halves[1]], ["k.turned"], perm=[0, 1, 3, 2]))
    nodes.append(helper.make_node("MatMul", [halves[0], "k.turned"], [SCORES]))
    nodes = _needed([NodeProto.FromString(n.SerializeToString()) for n in nodes], SCORES)
    for field, kept in ((graph.node, nodes), (graph.output, [])):
        del field[:]
        field.extend(kept)
    del graph.value_info[:]
    graph.output.append(helper.make_tensor_value_info(SCORES, FLOAT, None))
    read = {name for other in nodes for name in other.input}
    used = [value for value in graph.input if value.name in read]
    del graph.input[:]
    graph.input.extend(used)
    values = {value.name: given[value.name] for value in used}
    return computed(documented(cut), 1)(values)[SCORES]


def _root(node: NodeProto, q: str, values: np.ndarray, narrow: bool) -> np.ndarray:
    """The factor that the parser puts on q and on k."""
    head_dim = values.shape[-1]
    scale = next((a.f for a in node.attribute if a.name == "scale"), head_dim**-0.5)
    root = np.float32(math.sqrt(scale))
    return from_bf16(to_bf16(root)) if narrow else root


def _needed(nodes: list[NodeProto], name: str) -> list[NodeProto]:
    """Those of `nodes`, in order, that tensor `name` is made of."""
    wanted, kept = {name}, []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]


def fitted(found: np.ndarray, q: np.ndarray, k: np.ndarray) -> float:
    """The factor between q . k and the scores found; q [1, H, T, D], k [1, H, keys, D]."""
    exact = q.astype(np.float64) @ k.astype(np.float64).swapaxes(2, 3)
    return float((found * exact).sum() / np.square(exact).sum())
