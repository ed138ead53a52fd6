"""Rewrite an exported generator for ONNX Runtime, which updates the cache in place.

The operator's node becomes `TensorScatter`, which writes the block into the bound buffer, and `Attention`, which reads it.
"""

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from aapt_deploy.ops.block_causal_attention import DOMAIN, NEXT, SLOT, VALID, Ring
from aapt_deploy.ops.block_causal_attention.onnx_function import _require_opset, check_interface, is_ours, replace, strip

# Constants that all lowered nodes share.
_FLAT, _HEADS = (f"{DOMAIN}.{name}" for name in ("flat", "heads"))


def lower_in_place(model: ModelProto, ring: Ring) -> ModelProto:
    """`model` with every BlockCausalAttention node replaced by standard operators that update the cache where it lies.

    The graph's interface changes as follows; all else stays.

        input   k_cache.NN [1, S, H, D]  ->  k_cache.NN [1, ring.tokens, H, D]              (v_cache.NN likewise)
        output  k_block.NN [1, T, H, D]  ->  k_cache.NN.next, which a runtime binds to the buffer of k_cache.NN
        input   cache_len int32 [1]      ->  slot int64 [1], valid int64 [1]                (`Place.slot`, `Place.valid` of the in-place ring)

    Raises BundleError if a cache is not a float32 graph input of the ring's alias-free size, or a block is not a graph output. Caches of other
    types are refused because they are slower on a CPU: the casts around them cost more than the bytes they save.
    """
    assert ring.in_place, f"{ring} is alias-free; use ring.with_in_place(True)"
    lowered = strip(model)
    _require_opset(lowered)
    graph = lowered.graph
    ours = [node for node in graph.node if is_ours(node)]
    heads, head_dim = check_interface(lowered, ours, ring)

    cache_shape = [1, ring.tokens, heads, head_dim]
    inputs: dict[str, list[ValueInfoProto]] = {}
    outputs: dict[str, ValueInfoProto] = {}
    for node in ours:
        for cache, block in zip(node.input[3:5], node.output[1:3], strict=True):
            inputs[cache] = [helper.make_tensor_value_info(cache, TensorProto.FLOAT, cache_shape)]
            outputs[block] = helper.make_tensor_value_info(cache + NEXT, TensorProto.FLOAT, cache_shape)
    inputs[ours[0].input[5]] = [helper.make_tensor_value_info(name, TensorProto.INT64, [1]) for name in (SLOT, VALID)]

    nodes = [new for node in graph.node for new in (_in_place_nodes(node, heads) if is_ours(node) else [node])]
    replace(graph.node, nodes)
    replace(graph.input, [new for old in graph.input for new in inputs.get(old.name, [old])])
    replace(graph.output, [outputs.get(old.name, old) for old in graph.output])
    replace(lowered.opset_import, [entry for entry in lowered.opset_import if entry.domain != DOMAIN])
    for name, values in ((_FLAT, [0, 0, -1]), (_HEADS, [0, 0, heads, head_dim])):
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
    return lowered


def _in_place_nodes(node: NodeProto, heads: int) -> list[NodeProto]:
    """Write the block to `slot`, attend to the first `valid` tokens."""
    q, k, v, k_cache, v_cache, _ = node.input
    out = node.output[0]
    scale = next(attribute.f for attribute in node.attribute if attribute.name == "scale")
    nodes = []
    for new, cache in ((k, k_cache), (v, v_cache)):
        nodes += [
            helper.make_node("TensorScatter", [cache, new, SLOT], [cache + NEXT], axis=1),  # [1, S, H, D]
            helper.make_node("Reshape", [cache + NEXT, _FLAT], [f"{cache}.flat"]),  # [1, S, H * D], no copy
        ]
    nodes += [
        helper.make_node("Reshape", [q, _FLAT], [f"{out}.q"]),  # [1, T, H * D]
        helper.make_node(
            "Attention",
            [f"{out}.q", f"{k_cache}.flat", f"{v_cache}.flat", "", "", "", VALID],  # the last one is nonpad_kv_seqlen
            [f"{out}.flat"],
            scale=scale,
            q_num_heads=heads,
            kv_num_heads=heads,
        ),
        helper.make_node("Reshape", [f"{out}.flat", _HEADS], [out]),  # [1, T, H, D]
    ]
    for new_node in nodes:
        new_node.name = f"{node.name}.{new_node.op_type}.{new_node.output[0]}"
    return nodes
