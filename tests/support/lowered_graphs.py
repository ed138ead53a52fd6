"""A plan's graph, as `backends/trt/lower.py` leaves it, computed without TensorRT.

What is bf16 there is float32 rounded to bf16 here.

ONNX Runtime has no bf16 products on a CPU, and nobody but TensorRT knows our plugin. So every cast
to bf16 is followed by one back, and a graph with the plugin's nodes is run by onnx's own reference
evaluator, in which the node is the kernel's arithmetic in NumPy (`emulator`), on the same bytes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from aapt_deploy.backends.trt.state import from_bf16, to_bf16
from aapt_deploy.ops.block_causal_attention import DOMAIN, NAME, emulator, hopper_fp8
from tests.support.native_attention import for_onnxruntime

BF16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT


class BlockCausalAttention(OpRun):
    """The plugin's node with FP8 caches."""

    op_domain = DOMAIN

    def _run(
        self,
        q: Any,
        k: Any,
        v: Any,
        k_cache: Any,
        v_cache: Any,
        cache_len: Any,
        *parts: Any,
        **attributes: Any,
    ) -> tuple[Any, Any, Any]:
        scales = hopper_fp8.Scales(
            **dict(zip(("q_scale", "k_scale", "v_scale", "k_mean"), parts, strict=True))
        )
        blocks = hopper_fp8.pack(k[0], v[0], scales)
        out = emulator.attend(
            q[0], *blocks, q.shape[1], k_cache, v_cache, int(cache_len[0]), scales, emulator.EXACT
        )
        return out[None], *blocks


class BlockCausalAttentionPack(OpRun):
    """The first half of the ahead-of-time form: a block's keys and values as images of codes."""

    op_domain = DOMAIN

    def _run(
        self, k: Any, v: Any, k_scale: Any, k_mean: Any, v_scale: Any, **attributes: Any
    ) -> tuple[Any, Any]:
        return hopper_fp8.pack(
            k[0], v[0], hopper_fp8.Scales(np.ones_like(k_scale), k_scale, k_mean, v_scale)
        )


class BlockCausalAttentionAttend(OpRun):
    """The second half: attention over the cache and the block's images."""

    op_domain = DOMAIN

    def _run(
        self,
        q: Any,
        k_block: Any,
        v_block: Any,
        k_cache: Any,
        v_cache: Any,
        cache_len: Any,
        q_scale: Any,
        k_scale: Any,
        v_scale: Any,
        **attributes: Any,
    ) -> tuple[Any]:
        scales = hopper_fp8.Scales(q_scale, k_scale, np.zeros_like(v_scale), v_scale)
        out = emulator.attend(
            q[0], k_block, v_block, q.shape[1], k_cache, v_cache, int(cache_len[0]), scales,
            emulator.EXACT,
        )  # fmt: skip
        return (out[None],)


PLUGINS = (BlockCausalAttention, BlockCausalAttentionPack, BlockCausalAttentionAttend)
assert BlockCausalAttention.__name__ == NAME


def computed(
    model: ModelProto, tokens: int
) -> Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]:
    """Runs `model`.

    Its tensors in bf16 are given and returned as their bits, FP8 tensors as their bytes.
    """
    halves = {
        value.name
        for value in (*model.graph.input, *model.graph.output)
        if value.type.tensor_type.elem_type == BF16
    }
    plain = in_float(for_onnxruntime(model, tokens))
    names = [value.name for value in plain.graph.output]
    run: Callable[..., Any]
    if any(node.domain == DOMAIN for node in plain.graph.node):
        run = ReferenceEvaluator(plain, new_ops=list(PLUGINS)).run
    else:
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        run = onnxruntime.InferenceSession(
            plain.SerializeToString(), options, providers=["CPUExecutionProvider"]
        ).run

    def compute(given: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        floats = {
            name: from_bf16(array) if name in halves else array for name, array in given.items()
        }
        found = dict(zip(names, run(None, floats), strict=True))
        return {name: to_bf16(array) if name in halves else array for name, array in found.items()}

    return compute


def in_float(model: ModelProto) -> ModelProto:
    """A copy of `model` without tensors in bf16."""
    copy = ModelProto()
    copy.CopyFrom(model)
    graph, nodes = copy.graph, []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "Cast" and node.attribute[0].i == BF16:
            (name,) = node.output
            node.output[0] = f"{name}.rounded"
            nodes.append(helper.make_node("Cast", [node.output[0]], [name], to=FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    for tensor in graph.initializer:
        if tensor.data_type == BF16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == BF16:
            value.type.tensor_type.elem_type = FLOAT
    del graph.value_info[:]
    return copy
