"""Lower attention to TensorRT's own FP8 kernel, which needs no plugin: the form `native-fp8`.

    lower_native_fp8   generator: caches and blocks e4m3 [1, S, H, D], `TRT_QuantizedAttention`
    text_in_fp8        prompt: its keys and values leave as the codes that the caches hold

The codes are those of layout hopper_fp8, in token order. A code is e4m3((k - k_mean) / k_scale) or
e4m3(v / v_scale), with a scale per head for K and per channel for V.

TensorRT takes one scale a tensor: a scale per head does not build. So the scales leave the kernel.
K's factor multiplies q before q is quantised, and V's factor multiplies the result. Both products
are in float32. What is left is the scale of q. It is a power of two, because the kernel reads it
in bf16, and a rounded scale would change the softmax temperature.

The caches are token-major, so a commit is one copy. TensorRT concatenates cache and block into
scratch memory, and its kernel reads that in token order: the transposes cost nothing.
docs/log.md has the measurements, and those of `KVCacheUpdate`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from aapt_deploy.backends.trt.lower_attention import MASK, add_mask, describe_caches
from aapt_deploy.backends.trt.lower_products import free_outputs
from aapt_deploy.ops.block_causal_attention import DOMAIN, Ring
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import E4M3_MAX, Scales
from aapt_deploy.ops.block_causal_attention.onnx_function import (
    _refuse,
    _require_opset,
    check_interface,
    is_ours,
    replace,
    strip,
)

ATTENTION = "TRT_QuantizedAttention"
TRT_DOMAIN = "trt"  # of operators that only TensorRT's parser knows
P_SCALE = 1 / E4M3_MAX  # of softmax's results, which are at most 1
# RTX 1.7 refuses 12 and 512. It takes 20 and 24, which NVIDIA's Model Optimizer does not quantise.
HEAD_DIMS = range(16, 257, 16)
FP8, BF16, FLOAT = TensorProto.FLOAT8E4M3FN, TensorProto.BFLOAT16, TensorProto.FLOAT

_ONE, _ONE_BF16, ZERO, _P_SCALE = (
    f"{DOMAIN}.{name}" for name in ("one", "one.bf16", "zero.fp8", "p_scale")
)


def lower_native_fp8(model: ModelProto, ring: Ring, scales: Sequence[Scales]) -> ModelProto:
    """Return `model` with attention in TensorRT's FP8 kernel, no functions.

        caches   float32 [1, S, H, D] -> e4m3 [1, S, H, D]
        blocks   float32 [1, T, H, D] -> e4m3 [1, T, H, D]
        scales   one a layer; they become constants

    `out` keeps q's type, which is FLOAT. A cache must be finite behind its valid tokens. Raises
    BundleError if a cache is not a float32 graph input of the ring's size. Raises BundleError if a
    block is not a graph output. Raises BundleError if the kernel has no such head_dim, or the
    number of scales differs from that of layers.
    """
    assert not ring.in_place, f"{ring} is in place; TensorRT leaves a cache alone"
    lowered = strip(model)
    _require_opset(lowered)
    graph = lowered.graph
    ours = [node for node in graph.node if is_ours(node)]
    heads, head_dim = check_interface(lowered, ours, ring)
    if head_dim not in HEAD_DIMS:
        _refuse(model, f"has head_dim {head_dim}; FP8 attention needs a multiple of 16 up to 256")
    if len(scales) != len(ours):
        _refuse(model, f"has {len(ours)} attention layers and there are scales for {len(scales)}")

    graph.initializer.extend(_shared())
    nodes = [add_mask(graph, ring, ours[0].input[5])]
    for node in graph.node:
        if is_ours(node):
            layer = ours.index(node)
            constants, made = _layer(node, layer, scales[layer])
            graph.initializer.extend(constants)
            nodes += made
        else:
            nodes.append(node)
    replace(graph.node, nodes)
    lowered.opset_import.append(helper.make_opsetid(TRT_DOMAIN, 1))

    describe_caches(graph, ours, ring, FP8, [heads, head_dim])
    return lowered


def text_in_fp8(
    model: ModelProto, names: Sequence[tuple[str, str]], scales: Sequence[Scales]
) -> ModelProto:
    """Return a prompt graph whose float32 outputs `names` leave as e4m3, in the caches' codes.

    `names` are a layer's keys and values [1, L, H, D]; `scales` are one a layer.
    """
    lowered = ModelProto()
    lowered.CopyFrom(model)
    graph = lowered.graph
    renamed = free_outputs(graph, [name for pair in names for name in pair])
    graph.initializer.extend(_shared()[:2])
    for layer, ((k, v), of_layer) in enumerate(zip(names, scales, strict=True)):
        constants, fields = _of_layer(layer, of_layer)
        graph.initializer.extend(constants)
        graph.node.extend(_quantised(renamed[k], k, fields["k_scale"], fields["k_mean"]))
        graph.node.extend(_quantised(renamed[v], v, fields["v_scale"]))
    for value in graph.output:
        if value.name in renamed:
            value.type.tensor_type.elem_type = FP8
    return lowered


def q_factors(scale: float, scales: Scales) -> tuple[np.ndarray, float]:
    """Return the factors [H] on q before its quantisation, and the scale of its codes.

    `scale` is the softmax's. A score is code scale * (q's code . k's code). The code scale is the
    smallest power of two at which no calibrated q saturates.
    """
    factors = scale * scales.k_scale.astype(np.float64)
    largest = float((factors * scales.q_scale).max())  # of q * factor, over 448
    return factors.astype(np.float32), 2.0 ** math.ceil(math.log2(largest))


def _layer(
    node: NodeProto, layer: int, scales: Scales
) -> tuple[list[TensorProto], list[NodeProto]]:
    """Return the constants and nodes for k_block, v_block and the attention of one layer."""
    q, k, v, k_cache, v_cache, _ = node.input
    out, k_block, v_block = node.output
    scale = next(attribute.f for attribute in node.attribute if attribute.name == "scale")
    constants, fields = _of_layer(layer, scales)
    factors, code_scale = q_factors(scale, scales)
    q_factor, q_scale = (f"{DOMAIN}.{name}.{layer}" for name in ("q_factor", "q_code_scale"))
    constants += [
        _constant(q_factor, factors[None, None, :, None]),
        _constant(q_scale, np.float32(code_scale)),
        _bf16(f"{q_scale}.bf16", code_scale),
    ]
    q_scaled, q_codes, k_codes, v_codes, heads, tokens, answer = (
        f"{out}.{part}"
        for part in ("q.scaled", "q.codes", "k.codes", "v.codes", "heads", "tokens", "float")
    )
    turned: dict[str, Any] = {"perm": [0, 2, 1, 3]}
    kind: dict[str, Any] = {"scale": 1.0, "normalization_quantize_to_type": FP8}
    node_of, reads = helper.make_node, []
    nodes = [
        node_of("Mul", [q, q_factor], [q_scaled]),  # [1, T, H, D]
        node_of("QuantizeLinear", [q_scaled, q_scale, ZERO], [q_codes]),
        *_quantised(k, k_block, fields["k_scale"], fields["k_mean"]),
        *_quantised(v, v_block, fields["v_scale"]),
        node_of("Concat", [k_cache, k_block], [k_codes], axis=1),  # [1, S + T, H, D]
        node_of("Concat", [v_cache, v_block], [v_codes], axis=1),
    ]
    scaled = ((q_codes, f"{q_scale}.bf16"), (k_codes, _ONE_BF16), (v_codes, _ONE_BF16))
    for codes, code_scale_name in scaled:
        nodes.append(node_of("Transpose", [codes], [f"{codes}.heads"], **turned))
        reads.append(f"{codes}.values")  # [1, H, T or S + T, D]
        nodes.append(node_of("DequantizeLinear", [f"{codes}.heads", code_scale_name], reads[-1:]))
    nodes += [
        node_of(ATTENTION, [*reads, MASK, _P_SCALE], [heads], domain=TRT_DOMAIN, **kind),
        node_of("Transpose", [heads], [tokens], **turned),  # [1, T, H, D]
        node_of("Cast", [tokens], [answer], to=FLOAT),
        node_of("Mul", [answer, fields["v_scale"]], [out]),
    ]
    for new in nodes:
        new.name = f"{node.name}.{new.op_type}.{new.output[0]}"
    return constants, nodes


def _quantised(x: str, codes: str, scale: str, mean: str = "") -> list[NodeProto]:
    """Return nodes for codes = e4m3((x - mean) / scale)."""
    node = helper.make_node
    centred, divided = f"{codes}.centred" if mean else x, f"{codes}.divided"
    nodes = [node("Sub", [x, mean], [centred], f"{codes}.centre")] if mean else []
    return [
        *nodes,
        node("Div", [centred, scale], [divided], f"{codes}.divide"),
        node("QuantizeLinear", [divided, _ONE, ZERO], [codes], f"{codes}.quantise"),
    ]


def _of_layer(layer: int, scales: Scales) -> tuple[list[TensorProto], dict[str, str]]:
    """Return a layer's scales as constants, and their names by field."""
    fields = {field: f"{DOMAIN}.{field}.{layer}" for field in ("k_scale", "k_mean", "v_scale")}
    shaped = {
        "k_scale": scales.k_scale[None, None, :, None],  # [1, 1, H, 1]
        "k_mean": scales.k_mean[None, None],  # [1, 1, H, D]
        "v_scale": scales.v_scale[None, None],
    }
    return [_constant(name, shaped[field]) for field, name in fields.items()], fields


def _shared() -> list[TensorProto]:
    """Return the constants of every layer; those of a quantisation come first."""
    return [
        _constant(_ONE, np.float32(1)),
        helper.make_tensor(ZERO, FP8, [], b"\0", raw=True),
        _bf16(_ONE_BF16, 1),
        _constant(_P_SCALE, np.float32(P_SCALE)),
    ]


def _constant(name: str, value: Any) -> TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(value), name)


def _bf16(name: str, value: float) -> TensorProto:
    """Return a scalar that bf16 holds exactly."""
    bits = np.float32(value).view(np.uint32)
    assert not bits & 0xFFFF, f"{value} is not a bf16 value"
    return helper.make_tensor(name, BF16, [], np.uint16(bits >> 16).tobytes(), raw=True)
