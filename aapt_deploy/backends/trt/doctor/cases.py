"""The micro-graphs of `aapt doctor --tensorrt`: one attention layer in every form that a build may use, and one product in FP8, with their answers.

The forms are made by the very functions that a build uses; only the sizes are small. Answers are NumPy's, in float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from aapt_deploy.backends.trt.lower_attention import lower_for_plugin, lower_native, split_for_aot
from aapt_deploy.backends.trt.state import from_bf16, to_bf16
from aapt_deploy.ops.block_causal_attention import (
    DOMAIN,
    NAME,
    OPSET,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    Ring,
    hopper_fp8,
    softmax_scale,
)
from aapt_deploy.ops.block_causal_attention.onnx_function import attach, portable
from aapt_deploy.ops.block_causal_attention.reference import block_causal_attention

RING = Ring(text_tokens=32, frame_tokens=96, sink_frames=1, window_frames=2)
HEADS, HEAD_DIM = 2, 64
VALID = 32 + 2 * 96  # of the cache's 320 tokens; the rest holds numbers that must not matter
ROWS, INNER, COLUMNS = 128, 256, 128  # of the FP8 product
SLOT = 32 + 96  # a token of the cache where a block may begin


@dataclass(frozen=True)
class Case:
    """A graph, what it is given, and what must come out. Arrays are as the device holds them: bf16 as uint16, FP8 as uint8."""

    model: ModelProto
    inputs: dict[str, np.ndarray]
    plugin_layers: int
    out: np.ndarray  # float64
    blocks: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # bytes that must come out as they are


def portable_model() -> ModelProto:
    """One layer as an export leaves it: q, k, v and caches float32, the function that gives the node its meaning attached."""
    block, cache = [1, RING.frame_tokens, HEADS, HEAD_DIM], [1, RING.tokens, HEADS, HEAD_DIM]
    shapes = {"q": block, "k": block, "v": block, "k_cache": cache, "v_cache": cache}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    ]
    inputs.append(helper.make_tensor_value_info("cache_len", TensorProto.INT32, [1]))
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, block)
        for name in ("out", "k_block", "v_block")
    ]
    attributes: dict[str, Any] = {
        "scale": softmax_scale(HEAD_DIM),
        "plugin_namespace": PLUGIN_NAMESPACE,
        "plugin_version": PLUGIN_VERSION,
    }
    node = helper.make_node(
        NAME,
        [*shapes, "cache_len"],
        ["out", "k_block", "v_block"],
        "attention",
        domain=DOMAIN,
        **attributes,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return attach(
        helper.make_model(
            helper.make_graph([node], "probe", inputs, outputs), opset_imports=opsets, ir_version=10
        )
    )


def _tokens() -> tuple[np.ndarray, ...]:
    """q, k, v of a block and a full cache's keys and values, as bf16 holds them: float32 [1, T or S, H, D]."""
    rng = np.random.default_rng(0)
    lengths = (RING.frame_tokens,) * 3 + (RING.tokens,) * 2
    return tuple(
        from_bf16(to_bf16(rng.standard_normal((1, length, HEADS, HEAD_DIM), np.float32)))
        for length in lengths
    )


def native() -> Case:
    """TensorRT's own attention, in bf16."""
    q, k, v, k_cache, v_cache = _tokens()
    out, _, _ = block_causal_attention(q, k, v, k_cache, v_cache, np.array([VALID], np.int32))
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "k_cache": to_bf16(k_cache),
        "v_cache": to_bf16(v_cache),
        "cache_len": np.array([VALID], np.int32),
    }
    return Case(
        lower_native(portable_model(), RING, TensorProto.BFLOAT16),
        inputs,
        0,
        out,
        {"k_block": to_bf16(k), "v_block": to_bf16(v)},
    )


def plugin(packed: bool = False, aot: bool = False, with_function: bool = False) -> Case:
    """Our kernels with FP8 caches: inside the Python plugin, or held by the plan; `with_function`: the slow body comes along, and must lose."""
    q, k, v, k_cache, v_cache = _tokens()
    scales = hopper_fp8.calibrate(
        _padded(q[0]), k_cache[0], v_cache[0]
    )  # the block's tokens beyond the cache's range saturate
    out, _, _ = block_causal_attention(q, k, v, k_cache, v_cache, np.array([VALID], np.int32))
    images, blocks = (
        hopper_fp8.pack(k_cache[0], v_cache[0], scales),
        hopper_fp8.pack(k[0], v[0], scales),
    )
    stored = [image.view(np.int32) if packed else image for image in (*images, *blocks)]
    model = lower_for_plugin(portable_model(), RING, [scales], packed=packed)
    if aot:
        model = split_for_aot(model)
    if with_function:
        model.functions.append(portable())
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "k_cache": stored[0],
        "v_cache": stored[1],
        "cache_len": np.array([VALID], np.int32),
    }
    return Case(model, inputs, 2 if aot else 1, out, {"k_block": stored[2], "v_block": stored[3]})


def _padded(q: np.ndarray) -> np.ndarray:
    """As many queries as there are keys, for calibration: [S, H, D]."""
    return np.resize(q, (RING.tokens, HEADS, HEAD_DIM))


def fp8_product() -> Case:
    """x -> QuantizeLinear -> DequantizeLinear -> MatMul with FP8 weights [out, in], as an fp8 export has them."""
    rng = np.random.default_rng(1)
    x, weight = (
        rng.standard_normal((ROWS, INNER), np.float32),
        rng.standard_normal((COLUMNS, INNER), np.float32),
    )
    x_scale = np.float32(np.abs(x).max() / hopper_fp8.E4M3_MAX)
    scales = (np.abs(weight).max(1) / hopper_fp8.E4M3_MAX).astype(np.float32)  # [out]
    codes = hopper_fp8.encode(weight / scales[:, None])
    constants = [
        numpy_helper.from_array(np.asarray(x_scale), "x.scale"),
        helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True),
        helper.make_tensor(
            "weight", TensorProto.FLOAT8E4M3FN, [COLUMNS, INNER], codes.tobytes(), raw=True
        ),
        numpy_helper.from_array(scales, "weight.scale"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x.scale", "zero"], ["x.codes"], "x.q"),
        helper.make_node("DequantizeLinear", ["x.codes", "x.scale"], ["x.fp8"], "x.dq"),
        helper.make_node(
            "DequantizeLinear", ["weight", "weight.scale"], ["weight.fp8"], "weight.dq", axis=0
        ),
        helper.make_node(
            "Transpose", ["weight.fp8"], ["weight.t"], "weight.transpose", perm=[1, 0]
        ),
        helper.make_node("MatMul", ["x.fp8", "weight.t"], ["out"], "product"),
    ]
    shapes = {"x": [ROWS, INNER], "out": [ROWS, COLUMNS]}
    tensors = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    }
    graph = helper.make_graph(nodes, "probe", [tensors["x"]], [tensors["out"]], constants)
    decoded = hopper_fp8.decode(hopper_fp8.encode(x / x_scale)).astype(np.float64) * x_scale
    answer = decoded @ (hopper_fp8.decode(codes).astype(np.float64) * scales[:, None]).T
    return Case(_model(graph), {"x": x}, 0, answer)


def fp8_attention() -> Case:
    """TensorRT's own attention between QuantizeLinear and DequantizeLinear: does it become one FP8 kernel?"""
    rng = np.random.default_rng(2)
    names, shape = ("q", "k", "v"), (1, HEADS, 256, HEAD_DIM)
    given = {name: rng.standard_normal(shape, np.float32) for name in names}
    scale = np.float32(6 / hopper_fp8.E4M3_MAX)
    constants = [
        helper.make_tensor(
            "scale", TensorProto.BFLOAT16, [], to_bf16(np.asarray(scale)).tobytes(), raw=True
        ),
        helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True),
    ]
    nodes = []
    for name in names:
        nodes += [
            helper.make_node(
                "Cast", [name], [f"{name}.bf16"], f"{name}.cast", to=TensorProto.BFLOAT16
            ),
            helper.make_node(
                "QuantizeLinear",
                [f"{name}.bf16", "scale", "zero"],
                [f"{name}.codes"],
                f"{name}.quantise",
            ),
            helper.make_node(
                "DequantizeLinear",
                [f"{name}.codes", "scale"],
                [f"{name}.fp8"],
                f"{name}.dequantise",
            ),
        ]
    nodes.append(
        helper.make_node(
            "Attention",
            [f"{name}.fp8" for name in names],
            ["heads"],
            "attention",
            scale=softmax_scale(HEAD_DIM),
        )
    )
    nodes.append(helper.make_node("Cast", ["heads"], ["out"], "out.cast", to=TensorProto.FLOAT))
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in (*names, "out")
    ]
    graph = helper.make_graph(nodes, "probe", tensors[:3], tensors[3:], constants)
    turned: Mapping[str, np.ndarray] = {name: array.swapaxes(1, 2) for name, array in given.items()}
    empty = np.zeros((1, 0, HEADS, HEAD_DIM), np.float32)
    out, _, _ = block_causal_attention(
        turned["q"], turned["k"], turned["v"], empty, empty, np.array([0], np.int32)
    )
    return Case(_model(graph), given, 0, out.swapaxes(1, 2))


def small_plugin(name: str, columns: int) -> Case:
    """x [columns] -> 2 x, by the ahead-of-time plugin `name` of this domain."""
    x = np.arange(columns, dtype=np.float32)
    node = helper.make_node(
        name,
        ["x"],
        ["out"],
        "probe",
        domain=DOMAIN,
        plugin_namespace=PLUGIN_NAMESPACE,
        plugin_version="1",
        aot=1,
    )
    tensors = [
        helper.make_tensor_value_info(tensor, TensorProto.FLOAT, [columns])
        for tensor in ("x", "out")
    ]
    graph = helper.make_graph([node], "probe", tensors[:1], tensors[1:])
    return Case(_model(graph), {"x": x}, 1, 2 * x.astype(np.float64))


def _model(graph: Any) -> ModelProto:
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
