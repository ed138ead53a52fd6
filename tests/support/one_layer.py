"""One layer of attention as an export leaves it, of any size."""

from typing import Any

from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from aapt_deploy.ops.block_causal_attention import (
    DOMAIN,
    NAME,
    OPSET,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    Ring,
    softmax_scale,
)


def one_layer(ring: Ring, heads: int, head_dim: int) -> ModelProto:
    """q, k, v, k_cache, v_cache, cache_len -> out, k_block, v_block; float32, no function."""
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
    names, reads = [value.name for value in outputs], [value.name for value in inputs]
    node = helper.make_node(NAME, reads, names, "attention", domain=DOMAIN, **attributes)
    graph = helper.make_graph([node], "probe", inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _tensor(name: str, shape: list[int]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
