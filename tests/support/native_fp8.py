"""The form `native-fp8` without a GPU: its graph in ONNX Runtime, and its arithmetic in NumPy.

TensorRT documents what `TRT_QuantizedAttention` computes: softmax, its result quantised and
dequantised, and the product with V. `documented` writes that in standard operators.

How the kernel computes it is not documented. A kernel that visits tiles of keys quantises P
relative to the maximum so far, and the order of its visits is unknown. `attend` models all of
them, and a tensor core's accumulator as well.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from aapt_deploy.backends.trt.lower_attention import MASK
from aapt_deploy.backends.trt.lower_fp8_attention import ATTENTION, P_SCALE, ZERO, q_factors
from aapt_deploy.ops.block_causal_attention import DOMAIN, emulator, hopper_fp8, softmax_scale
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import Floats
from tests.support.attention_data import Case
from tests.support.lowered_graphs import computed

FP8, BF16, FLOAT = TensorProto.FLOAT8E4M3FN, TensorProto.BFLOAT16, TensorProto.FLOAT
UNIT, LOWEST = "unit", "lowest"  # a scale of 1; the score where the mask is false


def documented(model: ModelProto, quantised: bool = True) -> ModelProto:
    """A copy of `model` in standard operators and float32, for ONNX Runtime.

    ONNX Runtime moves no FP8 tensors. So caches, blocks and all that is made of them are float32
    here, with the values of their codes. `quantised` if P is rounded to e4m3.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    graph, nodes = copy.graph, []
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.float32(1), UNIT),
            numpy_helper.from_array(np.float32(-np.inf), LOWEST),
        ]
    )
    for node in graph.node:
        nodes += _standard(node, quantised)
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == FP8:
            value.type.tensor_type.elem_type = FLOAT
    for constant in graph.initializer:
        if _is_ours(constant.name) and constant.data_type == BF16:  # bf16 holds it exactly
            scale = numpy_helper.to_array(constant).astype(np.float32)
            constant.CopyFrom(numpy_helper.from_array(scale, constant.name))
    del graph.value_info[:]
    return copy


def _is_ours(scale: str) -> bool:
    """Whether a scale is attention's. Products have their own, and stay as they are."""
    return scale.startswith(f"{DOMAIN}.")


def _standard(node: NodeProto, quantised: bool) -> list[NodeProto]:
    node_of = helper.make_node
    if node.op_type == ATTENTION:
        return _attention(node, quantised)
    if node.op_type == "QuantizeLinear" and _is_ours(node.input[1]):
        (out,) = node.output
        codes = f"{out}.codes"
        return [
            node_of("QuantizeLinear", list(node.input), [codes]),
            node_of("DequantizeLinear", [codes, UNIT], [out]),
        ]
    if node.op_type == "DequantizeLinear" and _is_ours(node.input[1]):
        return [node_of("Mul", list(node.input), list(node.output))]
    return [node]


def _attention(node: NodeProto, quantised: bool) -> list[NodeProto]:
    q, k, v, mask, p_scale = node.input
    assert mask == MASK and [a.f for a in node.attribute if a.name == "scale"] == [1.0]
    (out,) = node.output
    part, node_of = lambda name: f"{out}.{name}", helper.make_node
    kind: dict[str, Any] = {"perm": [0, 1, 3, 2]}
    nodes = [
        node_of("Transpose", [k], [part("kt")], **kind),
        node_of("MatMul", [q, part("kt")], [part("scores")]),
        node_of("Where", [mask, part("scores"), LOWEST], [part("masked")]),
        node_of("Softmax", [part("masked")], [part("p")], axis=-1),
    ]
    p = part("p")
    if quantised:
        reads, codes, p = [p, p_scale, ZERO], part("p.codes"), part("p.rounded")
        nodes.append(node_of("QuantizeLinear", reads, [codes]))
        nodes.append(node_of("DequantizeLinear", [codes, p_scale], [p]))
    nodes.append(node_of("MatMul", [p, v], [out]))
    return nodes


def computed_fp8(
    model: ModelProto, tokens: int, quantised: bool = True
) -> Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]:
    """Runs `model` in ONNX Runtime; its FP8 tensors are given and returned as their bytes."""
    run = computed(documented(model, quantised), tokens)
    eight = {
        value.name
        for value in (*model.graph.input, *model.graph.output)
        if value.type.tensor_type.elem_type == FP8
    }

    def compute(given: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        decode, encode = hopper_fp8.decode, hopper_fp8.encode
        found = run({name: decode(x) if name in eight else x for name, x in given.items()})
        return {name: encode(x) if name in eight else x for name, x in found.items()}

    return compute


DOCUMENTED, ASCENDING, DESCENDING = "documented", "ascending", "descending"
ORDERS = (DOCUMENTED, ASCENDING, DESCENDING)
TILE = 64  # keys that a kernel may visit at once


def attend(case: Case, order: str, bits: int | None = None) -> Floats:
    """Attend with a case's queries as the graph does, P quantised in `order`: [R, H, D].

    `bits` is the width of P.V's accumulator, one level for all keys; None: exact.
    """
    scales, head_dim = case.scales, case.q.shape[-1]
    factors, code_scale = q_factors(softmax_scale(head_dim), scales)
    scaled = case.q * factors[:, None] / np.float32(code_scale)
    q = hopper_fp8.decode(hopper_fp8.encode(scaled)).swapaxes(0, 1)  # [H, R, D]
    images = ((case.cache, case.cache_len), (case.block, case.tokens))
    parts = [hopper_fp8.unpack_codes(*image, tokens) for image, tokens in images]
    k, v = (
        hopper_fp8.decode(np.concatenate(codes)).swapaxes(0, 1)  # [H, S + T, D]
        for codes in zip(*parts, strict=True)
    )
    scores = np.float32(code_scale) * (q @ k.swapaxes(1, 2))  # [H, R, S + T]
    keys = scores.shape[-1]
    highest = np.full((*scores.shape[:2], 1), -np.inf, np.float32)
    total, out = np.zeros_like(highest), np.zeros_like(q)
    tiles = [slice(0, keys)]
    if order == DOCUMENTED:
        highest = scores.max(-1, keepdims=True)
        highest = highest + np.log(np.exp(scores - highest).sum(-1, keepdims=True))
    else:
        tiles = [slice(first, first + TILE) for first in range(0, keys, TILE)]
        tiles = tiles[::-1] if order == DESCENDING else tiles
    for tile in tiles:
        higher = np.maximum(highest, scores[..., tile].max(-1, keepdims=True))
        p, rescale = np.exp(scores[..., tile] - higher), np.exp(highest - higher)
        highest, total = higher, total * rescale + p.sum(-1, keepdims=True)
        codes = hopper_fp8.decode(hopper_fp8.encode(p / np.float32(P_SCALE)))
        out = emulator.matmul(codes, v[:, tile], out * rescale, bits)
    out = out * np.float32(P_SCALE) / total
    return emulator.to_bf16(out.swapaxes(0, 1)) * scales.v_scale
