"""The micro-graphs of `aapt doctor --tensorrt`, with their answers in NumPy, in float64.

One attention layer in every form that a build may use, and one product in FP8. The forms are
made by the functions that a build uses; only the sizes are small.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from aapt_deploy.backends.trt.doctor.receipts import AOT, NATIVE, PYTHON
from aapt_deploy.backends.trt.lower_attention import lower_for_plugin, lower_native, split_for_aot
from aapt_deploy.backends.trt.lower_fp8_attention import lower_native_fp8
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

RING = Ring(text_tokens=32, block_tokens=96, sink_blocks=1, window_blocks=2)
LONG = Ring(text_tokens=32, block_tokens=96, sink_blocks=1, window_blocks=49)  # 4832 keys
HEADS, HEAD_DIM = 2, 64
VALID = 32 + 2 * 96  # of the cache's 320 tokens; the rest holds numbers that must not matter
CACHE_LEN = np.array([VALID], np.int32)
ROWS, INNER, COLUMNS = 128, 256, 128  # of the FP8 product
SLOT = 32 + 96  # a token of the cache where a block may begin


@dataclass(frozen=True)
class Case:
    """Graph, inputs and outputs, with arrays as on the device: bf16 uint16, FP8 uint8."""

    model: ModelProto
    inputs: dict[str, np.ndarray]
    plugin_layers: int
    out: np.ndarray  # float64
    blocks: dict[str, np.ndarray] = field(default_factory=dict)  # exact bytes of these outputs


def portable_model(ring: Ring = RING, heads: int = HEADS, head_dim: int = HEAD_DIM) -> ModelProto:
    """Return one layer as an export leaves it: float32, with its function attached."""
    block, cache = [1, ring.block_tokens, heads, head_dim], [1, ring.tokens, heads, head_dim]
    shapes = {"q": block, "k": block, "v": block, "k_cache": cache, "v_cache": cache}
    inputs = [_tensor(name, shape) for name, shape in shapes.items()]
    inputs.append(helper.make_tensor_value_info("cache_len", TensorProto.INT32, [1]))
    outputs = [_tensor(name, block) for name in ("out", "k_block", "v_block")]
    attributes: dict[str, Any] = {
        "scale": softmax_scale(head_dim),
        "plugin_namespace": PLUGIN_NAMESPACE,
        "plugin_version": PLUGIN_VERSION,
    }
    names = [value.name for value in outputs]
    reads = [*shapes, "cache_len"]
    node = helper.make_node(NAME, reads, names, "attention", domain=DOMAIN, **attributes)
    return attach(_model(helper.make_graph([node], "probe", inputs, outputs)))


def _tensor(name: str, shape: Sequence[int]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _tokens(ring: Ring = RING) -> tuple[np.ndarray, ...]:
    """Return q, k, v of a block and a full cache's keys and values, rounded to bf16.

    float32 [1, T or S, H, D].
    """
    rng = np.random.default_rng(0)
    lengths = (ring.block_tokens,) * 3 + (ring.tokens,) * 2
    arrays = (rng.standard_normal((1, n, HEADS, HEAD_DIM), np.float32) for n in lengths)
    return tuple(from_bf16(to_bf16(array)) for array in arrays)


def native() -> Case:
    """TensorRT's own attention, in bf16."""
    q, k, v, k_cache, v_cache = _tokens()
    out, _, _ = block_causal_attention(q, k, v, k_cache, v_cache, CACHE_LEN)
    caches = {"k_cache": to_bf16(k_cache), "v_cache": to_bf16(v_cache)}
    blocks = {"k_block": to_bf16(k), "v_block": to_bf16(v)}
    model = lower_native(portable_model(), RING, TensorProto.BFLOAT16)
    return Case(model, {"q": q, "k": k, "v": v, **caches, "cache_len": CACHE_LEN}, 0, out, blocks)


def plugin(packed: bool = False, aot: bool = False, with_function: bool = False) -> Case:
    """Our kernels with FP8 caches, in the Python plugin or (`aot`) in the plan.

    `with_function` attaches the slow body too, which must not be taken.
    """
    q, k, v, k_cache, v_cache = _tokens()
    # The block's tokens beyond the cache's range saturate.
    scales = hopper_fp8.calibrate(_padded(q[0]), k_cache[0], v_cache[0])
    out, _, _ = block_causal_attention(q, k, v, k_cache, v_cache, CACHE_LEN)
    images = hopper_fp8.pack(k_cache[0], v_cache[0], scales)
    blocks = hopper_fp8.pack(k[0], v[0], scales)
    stored = [image.view(np.int32) if packed else image for image in (*images, *blocks)]
    model = lower_for_plugin(portable_model(), RING, [scales], packed=packed)
    if aot:
        model = split_for_aot(model)
    if with_function:
        model.functions.append(portable())
    caches = {"k_cache": stored[0], "v_cache": stored[1], "cache_len": CACHE_LEN}
    inputs = {"q": q, "k": k, "v": v, **caches}
    return Case(model, inputs, 2 if aot else 1, out, {"k_block": stored[2], "v_block": stored[3]})


def _padded(q: np.ndarray) -> np.ndarray:
    """Return as many queries as there are keys, for calibration: [S, H, D]."""
    return np.resize(q, (RING.tokens, HEADS, HEAD_DIM))


def fp8_product() -> Case:
    """Quantise, dequantise and multiply by FP8 weights [out, in], as an fp8 export does."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((ROWS, INNER), np.float32)
    weight = rng.standard_normal((COLUMNS, INNER), np.float32)
    x_scale = np.float32(np.abs(x).max() / hopper_fp8.E4M3_MAX)
    scales = (np.abs(weight).max(1) / hopper_fp8.E4M3_MAX).astype(np.float32)  # [out]
    codes = hopper_fp8.encode(weight / scales[:, None])
    fp8, node = TensorProto.FLOAT8E4M3FN, helper.make_node
    constants = [
        numpy_helper.from_array(np.asarray(x_scale), "x.scale"),
        helper.make_tensor("zero", fp8, [], b"\0", raw=True),
        helper.make_tensor("weight", fp8, [COLUMNS, INNER], codes.tobytes(), raw=True),
        numpy_helper.from_array(scales, "weight.scale"),
    ]
    stored = ["weight", "weight.scale"]
    nodes = [
        node("QuantizeLinear", ["x", "x.scale", "zero"], ["x.codes"], "x.q"),
        node("DequantizeLinear", ["x.codes", "x.scale"], ["x.fp8"], "x.dq"),
        node("DequantizeLinear", stored, ["weight.fp8"], "weight.dq", axis=0),
        node("Transpose", ["weight.fp8"], ["weight.t"], "weight.transpose", perm=[1, 0]),
        node("MatMul", ["x.fp8", "weight.t"], ["out"], "product"),
    ]
    ends = [_tensor("x", [ROWS, INNER])], [_tensor("out", [ROWS, COLUMNS])]
    graph = helper.make_graph(nodes, "probe", *ends, constants)
    decoded = hopper_fp8.decode(hopper_fp8.encode(x / x_scale)).astype(np.float64) * x_scale
    answer = decoded @ (hopper_fp8.decode(codes).astype(np.float64) * scales[:, None]).T
    return Case(_model(graph), {"x": x}, 0, answer)


def fp8_attention() -> Case:
    """TensorRT's FP8 attention over caches of codes.

    There are enough keys to tell a kernel that sums in few bits: 0.06 of the size, not below 0.01.
    """
    q, k, v, k_cache, v_cache = _tokens(LONG)
    scales = hopper_fp8.calibrate(np.resize(q[0], k_cache[0].shape), k_cache[0], v_cache[0])
    length = np.array([LONG.tokens], np.int32)
    out, _, _ = block_causal_attention(q, k, v, k_cache, v_cache, length)
    caches = {"k_cache": scales.quantise_k(k_cache), "v_cache": scales.quantise_v(v_cache)}
    blocks = {"k_block": scales.quantise_k(k), "v_block": scales.quantise_v(v)}
    model = lower_native_fp8(portable_model(LONG), LONG, [scales])
    return Case(model, {"q": q, "k": k, "v": v, **caches, "cache_len": length}, 0, out, blocks)


PACKED = "python, int32 caches"
WITH_PLUGIN = (PYTHON, PACKED)
# Of every form that a portable plan may have: the case, and the kind of its rounding (bench.py).
PORTABLE: dict[str, tuple[Callable[[], Case], str]] = {
    NATIVE: (native, "bf16"),
    PYTHON: (plugin, "fp8"),
    PACKED: (lambda: plugin(packed=True), "fp8"),
    AOT: (lambda: plugin(aot=True), "fp8"),
}


def small_plugin(name: str, columns: int) -> Case:
    """Compute x [columns] -> 2 x by the ahead-of-time plugin `name` of this domain."""
    x = np.arange(columns, dtype=np.float32)
    attributes: dict[str, Any] = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": "1"}
    node = helper.make_node(name, ["x"], ["out"], "probe", domain=DOMAIN, aot=1, **attributes)
    tensors = [_tensor(tensor, [columns]) for tensor in ("x", "out")]
    graph = helper.make_graph([node], "probe", tensors[:1], tensors[1:])
    return Case(_model(graph), {"x": x}, 1, 2 * x.astype(np.float64))


def _model(graph: Any) -> ModelProto:
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
