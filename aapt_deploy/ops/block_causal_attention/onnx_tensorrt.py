"""The op's node in the two other forms that TensorRT may be given; onnx_function.lower_for_plugin makes the first.

    lower_native    TensorRT's own attention: one mask of valid tokens, static shapes, standard operators. It needs nothing of ours at run time, is
                    what a build falls back to, and, because ONNX Runtime runs it too, the form whose arithmetic is tested without TensorRT
    split_for_aot   the plugin's node as the two ahead-of-time plugins, whose kernels the plan then holds

The portable body (onnx_function.PORTABLE) cuts the cache to its valid prefix; that is a shape which depends on data, and TensorRT would not let a
CUDA graph hold it. Here every shape is fixed and the rest of the cache is masked, so it must hold finite numbers: the runtime fills it with zeros.

Neither form was run on TensorRT by us.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from aapt_deploy.ops.block_causal_attention import DOMAIN, NAME, PLUGIN_NAMESPACE, PLUGIN_VERSION, Ring
from aapt_deploy.ops.block_causal_attention.onnx_function import check_interface, is_ours, replace, strip

MASK = f"{DOMAIN}.mask"  # bool [1, 1, 1, S + T]: one row for every query; ONNX Runtime wants T of them, TensorRT broadcasts
_POSITIONS, _OWN, _PAST = (f"{DOMAIN}.{name}" for name in ("positions", "own", "past"))


def lower_native(model: ModelProto, ring: Ring, dtype: int) -> ModelProto:
    """`model` with every BlockCausalAttention node as standard operators over the whole cache, functions removed. Needs the shape of every q.

    Attention, caches [1, S, H, D] and blocks [1, T, H, D] are of `dtype` (TensorProto.BFLOAT16 or FLOAT); `out` keeps q's type, which is FLOAT.

    Raises BundleError if a cache is not a float32 graph input of the ring's size, or a block is not a graph output.
    """
    lowered = strip(model)
    graph = lowered.graph
    ours = [node for node in graph.node if is_ours(node)]
    heads, head_dim = check_interface(lowered, ours, ring)
    caches = {name for node in ours for name in node.input[3:5]}
    blocks = {name for node in ours for name in node.output[1:3]}
    tokens, total = ring.frame_tokens, ring.tokens + ring.frame_tokens

    own = np.arange(total) >= ring.tokens  # the block itself is always attended to
    shape = (1, 1, 1, total)
    graph.initializer.append(numpy_helper.from_array(np.arange(total, dtype=np.int32).reshape(shape), _POSITIONS))
    graph.initializer.append(numpy_helper.from_array(own.reshape(shape), _OWN))
    mask = [helper.make_node("Less", [_POSITIONS, ours[0].input[5]], [_PAST], _PAST), helper.make_node("Or", [_PAST, _OWN], [MASK], MASK)]
    replace(graph.node, [*mask, *(new for node in graph.node for new in (_native_nodes(node, dtype) if is_ours(node) else [node]))])
    for field, names, length in ((graph.input, caches, ring.tokens), (graph.output, blocks, tokens)):
        described = {name: helper.make_tensor_value_info(name, dtype, [1, length, heads, head_dim]) for name in names}
        replace(field, [described.get(value.name, value) for value in field])
    replace(graph.value_info, [value for value in graph.value_info if value.name not in caches | blocks])
    return lowered


def _native_nodes(node: NodeProto, dtype: int) -> list[NodeProto]:
    """k_block, v_block and the attention of one layer."""
    q, k, v, k_cache, v_cache, _ = node.input
    out, k_block, v_block = node.output
    scale = next(attribute.f for attribute in node.attribute if attribute.name == "scale")
    name = {part: f"{out}.{part}" for part in ("q", "q.heads", "k.all", "k.heads", "v.all", "v.heads", "heads", "tokens")}
    turned: dict[str, Any] = {"perm": [0, 2, 1, 3]}
    nodes = [
        helper.make_node("Cast", [q], [name["q"]], to=dtype),  # [1, T, H, D]
        helper.make_node("Cast", [k], [k_block], to=dtype),
        helper.make_node("Cast", [v], [v_block], to=dtype),
        helper.make_node("Concat", [k_cache, k_block], [name["k.all"]], axis=1),  # [1, S + T, H, D]
        helper.make_node("Concat", [v_cache, v_block], [name["v.all"]], axis=1),
        helper.make_node("Transpose", [name["q"]], [name["q.heads"]], **turned),  # [1, H, T, D]
        helper.make_node("Transpose", [name["k.all"]], [name["k.heads"]], **turned),  # [1, H, S + T, D]
        helper.make_node("Transpose", [name["v.all"]], [name["v.heads"]], **turned),
        helper.make_node("Attention", [name["q.heads"], name["k.heads"], name["v.heads"], MASK], [name["heads"]], scale=scale),
        helper.make_node("Transpose", [name["heads"]], [name["tokens"]], **turned),  # [1, T, H, D]
        helper.make_node("Cast", [name["tokens"]], [out], to=TensorProto.FLOAT),
    ]
    for new in nodes:
        new.name = f"{node.name}.{new.op_type}.{new.output[0]}"
    return nodes


def split_for_aot(model: ModelProto) -> ModelProto:
    """A graph that lower_for_plugin made with scales (and not packed), every node split into the ahead-of-time plugins Pack and Attend."""
    split = ModelProto()
    split.CopyFrom(model)
    replace(split.graph.node, [new for node in split.graph.node for new in (_aot_nodes(node) if is_ours(node) else [node])])
    return split


def _aot_nodes(node: NodeProto) -> Iterable[NodeProto]:
    assert len(node.input) == 10, f"{node.name} has {len(node.input)} inputs; the ahead-of-time form is for FP8 caches"
    q, k, v, k_cache, v_cache, cache_len, q_scale, k_scale, v_scale, k_mean = node.input
    out, k_block, v_block = node.output
    attributes: dict[str, Any] = {
        "plugin_namespace": PLUGIN_NAMESPACE,
        "plugin_version": PLUGIN_VERSION,
        "aot": 1,
    }  # 1: the kernel goes into the plan
    rows = (
        ("Pack", [k, v, k_scale, k_mean, v_scale], [k_block, v_block]),
        ("Attend", [q, k_block, v_block, k_cache, v_cache, cache_len, q_scale, k_scale, v_scale], [out]),
    )
    return [helper.make_node(f"{NAME}{part}", reads, writes, f"{node.name}.{part}", domain=DOMAIN, **attributes) for part, reads, writes in rows]
