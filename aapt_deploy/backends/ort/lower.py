"""Rewrite an exported generator for ONNX Runtime, which updates the cache in place.

Each of our nodes becomes `TensorScatter`, which writes the block into the bound buffer, and
`Attention`, which reads it.
"""

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from aapt_deploy.ops.block_causal_attention import DOMAIN, NEXT, SLOT, VALID, Ring, onnx_function
from aapt_deploy.ops.block_causal_attention.onnx_function import is_ours, replace

# Constants that all lowered nodes share.
_FLAT, _HEADS = (f"{DOMAIN}.{name}" for name in ("flat", "heads"))


def lower_in_place(model: ModelProto, ring: Ring) -> ModelProto:
    """Replace every BlockCausalAttention node by standard operators that write in place.

    The graph's interface changes as follows, for v like for k; all else stays.

        input   k_cache.NN [1, S, H, D]  ->  k_cache.NN [1, ring.tokens, H, D]
        output  k_block.NN [1, T, H, D]  ->  k_cache.NN.next, to be bound to k_cache.NN's buffer
        input   cache_len int32 [1]      ->  slot int64 [1], valid int64 [1], as in `Place`

    Raises BundleError if a cache is not a float32 graph input of the ring's alias-free size.
    Raises BundleError if a block is not a graph output.
    Caches of other types are slower on a CPU: the casts cost more than the saved bytes.
    """
    assert ring.in_place, f"{ring} is alias-free; use ring.with_in_place(True)"
    lowered = onnx_function.strip(model)
    onnx_function._require_opset(lowered)
    graph = lowered.graph
    ours = [node for node in graph.node if is_ours(node)]
    heads, head_dim = onnx_function.check_interface(lowered, ours, ring)

    cache_shape, tensor = [1, ring.tokens, heads, head_dim], helper.make_tensor_value_info
    inputs: dict[str, list[ValueInfoProto]] = {}
    outputs: dict[str, ValueInfoProto] = {}
    for node in ours:
        for cache, block in zip(node.input[3:5], node.output[1:3], strict=True):
            inputs[cache] = [tensor(cache, TensorProto.FLOAT, cache_shape)]
            outputs[block] = tensor(cache + NEXT, TensorProto.FLOAT, cache_shape)
    inputs[ours[0].input[5]] = [tensor(name, TensorProto.INT64, [1]) for name in (SLOT, VALID)]

    lists = (_in_place_nodes(node, heads) if is_ours(node) else [node] for node in graph.node)
    replace(graph.node, [node for nodes in lists for node in nodes])
    replace(graph.input, [new for old in graph.input for new in inputs.get(old.name, [old])])
    replace(graph.output, [outputs.get(old.name, old) for old in graph.output])
    opsets = [entry for entry in lowered.opset_import if entry.domain != DOMAIN]
    replace(lowered.opset_import, opsets)
    for name, values in ((_FLAT, [0, 0, -1]), (_HEADS, [0, 0, heads, head_dim])):
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
    return lowered


def _in_place_nodes(node: NodeProto, heads: int) -> list[NodeProto]:
    """Write the block to `slot` and attend to the first `valid` tokens."""
    q, k, v, k_cache, v_cache, _ = node.input
    out = node.output[0]
    scale = next(attribute.f for attribute in node.attribute if attribute.name == "scale")
    nodes = []
    for new, cache in ((k, k_cache), (v, v_cache)):
        written, flat = cache + NEXT, f"{cache}.flat"  # [1, S, H, D], [1, S, H * D] without a copy
        nodes.append(helper.make_node("TensorScatter", [cache, new, SLOT], [written], axis=1))
        nodes.append(helper.make_node("Reshape", [written, _FLAT], [flat]))
    # The last input is nonpad_kv_seqlen.
    reads = [f"{out}.q", f"{k_cache}.flat", f"{v_cache}.flat", "", "", "", VALID]
    nodes += [
        helper.make_node("Reshape", [q, _FLAT], [f"{out}.q"]),  # [1, T, H * D]
        helper.make_node(
            "Attention", reads, [f"{out}.flat"], scale=scale, q_num_heads=heads, kv_num_heads=heads
        ),
        helper.make_node("Reshape", [f"{out}.flat", _HEADS], [out]),  # [1, T, H, D]
    ]
    for new_node in nodes:
        new_node.name = f"{node.name}.{new_node.op_type}.{new_node.output[0]}"
    return nodes
