"""Lower the op's node to the three forms that TensorRT reads.

    lower_for_plugin  one node of our plugin, with its scales
    split_for_aot     the same as two ahead-of-time plugins, with kernels inside the plan
    lower_native      TensorRT's own attention: one mask of valid tokens, static shapes, standard
                      operators. A build falls back to it, and ONNX Runtime can test its arithmetic

The portable body (onnx_function.PORTABLE) cuts the cache to its valid prefix. That shape depends on
data, and TensorRT would not capture it into a CUDA graph. Here every shape is fixed and the rest of
the cache is masked, so it must be finite: the runtime fills it with zeros.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from aapt_deploy.ops.block_causal_attention import (
    DOMAIN,
    NAME,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    Ring,
    hopper_fp8,
)
from aapt_deploy.ops.block_causal_attention.onnx_function import (
    _refuse,
    _require_opset,
    check_interface,
    is_ours,
    replace,
    strip,
)

# bool [1, 1, 1, S + T]: TensorRT broadcasts it to every query; ONNX Runtime needs T rows.
MASK = f"{DOMAIN}.mask"
_POSITIONS = f"{DOMAIN}.positions"


def lower_native(model: ModelProto, ring: Ring, dtype: int) -> ModelProto:
    """Return `model` with attention in standard operators over the whole cache, no functions.

    Attention, caches [1, S, H, D] and blocks [1, T, H, D] are of `dtype` (TensorProto.BFLOAT16
    or FLOAT). `out` keeps q's type, which is FLOAT. Every q needs a shape. Raises BundleError if
    a cache is not a float32 graph input of the ring's size. Raises BundleError if a block is not
    a graph output.
    """
    lowered = strip(model)
    graph = lowered.graph
    ours = [node for node in graph.node if is_ours(node)]
    heads, head_dim = check_interface(lowered, ours, ring)
    for node in ours:
        scale = next(attribute.f for attribute in node.attribute if attribute.name == "scale")
        constant = numpy_helper.from_array(np.array(scale, np.float32), f"{node.output[0]}.scale")
        graph.initializer.append(constant)
    mask = add_mask(graph, ring, ours[0].input[5])
    replace(graph.node, [mask, *_each(graph.node, lambda node: _native_nodes(node, dtype))])
    describe_caches(graph, ours, ring, dtype, [heads, head_dim])
    return lowered


def add_mask(graph: GraphProto, ring: Ring, cache_len: str) -> NodeProto:
    """Add the positions of all tokens to `graph`; return the node that makes MASK of them.

    The block's own tokens lie before any length, so they are always attended to.
    """
    positions = np.append(np.arange(ring.tokens), np.full(ring.block_tokens, -1))
    shaped = positions.astype(np.int32)[None, None, None]
    graph.initializer.append(numpy_helper.from_array(shaped, _POSITIONS))
    return helper.make_node("Less", [_POSITIONS, cache_len], [MASK], MASK)


def describe_caches(
    graph: GraphProto, ours: Iterable[NodeProto], ring: Ring, kind: int, heads: list[int]
) -> None:
    """Give the caches [1, S, H, D] and blocks [1, T, H, D] of `ours` the type `kind`.

    `heads` is [H, D].
    """
    caches = {name for node in ours for name in node.input[3:5]}
    blocks = {name for node in ours for name in node.output[1:3]}
    for field, names, length in (
        (graph.input, caches, ring.tokens),
        (graph.output, blocks, ring.block_tokens),
    ):
        tensor, size = helper.make_tensor_value_info, [1, length, *heads]
        described = {name: tensor(name, kind, size) for name in names}
        replace(field, [described.get(value.name, value) for value in field])
    kept = [value for value in graph.value_info if value.name not in caches | blocks]
    replace(graph.value_info, kept)


def _each(
    nodes: Iterable[NodeProto], lowered: Callable[[NodeProto], Iterable[NodeProto]]
) -> Iterator[NodeProto]:
    """Yield `nodes`, those of our op `lowered`."""
    for node in nodes:
        yield from lowered(node) if is_ours(node) else [node]


def _native_nodes(node: NodeProto, dtype: int) -> list[NodeProto]:
    """Return nodes for k_block, v_block and the attention of one layer."""
    q, k, v, k_cache, v_cache, _ = node.input
    out, k_block, v_block = node.output
    scale, q_scaled, q_heads, k_all, k_heads, v_all, v_heads, q_cast, answer, tokens = (
        f"{out}.{part}"
        for part in (
            "scale", "q.scaled", "q.heads", "k.all", "k.heads", "v.all", "v.heads", "q", "heads",
            "tokens",
        )
    )  # fmt: skip
    turned: dict[str, Any] = {"perm": [0, 2, 1, 3]}
    node_of = helper.make_node
    nodes = [
        # Scaled in float32: TensorRT's parser would round the scale's root to `dtype`.
        node_of("Mul", [q, scale], [q_scaled]),
        node_of("Cast", [q_scaled], [q_cast], to=dtype),  # [1, T, H, D]
        node_of("Cast", [k], [k_block], to=dtype),
        node_of("Cast", [v], [v_block], to=dtype),
        node_of("Concat", [k_cache, k_block], [k_all], axis=1),  # [1, S + T, H, D]
        node_of("Concat", [v_cache, v_block], [v_all], axis=1),
        node_of("Transpose", [q_cast], [q_heads], **turned),  # [1, H, T, D]
        node_of("Transpose", [k_all], [k_heads], **turned),  # [1, H, S + T, D]
        node_of("Transpose", [v_all], [v_heads], **turned),
        node_of("Attention", [q_heads, k_heads, v_heads, MASK], [answer], scale=1.0),
        node_of("Transpose", [answer], [tokens], **turned),  # [1, T, H, D]
        node_of("Cast", [tokens], [out], to=TensorProto.FLOAT),
    ]
    for new in nodes:
        new.name = f"{node.name}.{new.op_type}.{new.output[0]}"
    return nodes


def split_for_aot(model: ModelProto) -> ModelProto:
    """Split every node of lower_for_plugin's graph into the plugins Pack and Attend.

    The graph must have scales and caches that are not packed.
    """
    split = ModelProto()
    split.CopyFrom(model)
    replace(split.graph.node, [*_each(split.graph.node, _aot_nodes)])
    return split


def _aot_nodes(node: NodeProto) -> Iterable[NodeProto]:
    assert len(node.input) == 10, f"{node.name} has no FP8 caches: {len(node.input)} inputs"
    q, k, v, k_cache, v_cache, cache_len, q_scale, k_scale, v_scale, k_mean = node.input
    out, k_block, v_block = node.output
    attributes: dict[str, Any] = {
        "plugin_namespace": PLUGIN_NAMESPACE,
        "plugin_version": PLUGIN_VERSION,
        "aot": 1,  # the kernel goes into the plan
    }
    past = [k_cache, v_cache, cache_len]
    rows = (
        ("Pack", [k, v, k_scale, k_mean, v_scale], [k_block, v_block]),
        ("Attend", [q, k_block, v_block, *past, q_scale, k_scale, v_scale], [out]),
    )
    nodes = []
    for part, reads, writes in rows:
        name, label = f"{NAME}{part}", f"{node.name}.{part}"
        nodes.append(helper.make_node(name, reads, writes, label, domain=DOMAIN, **attributes))
    return nodes


# Inputs of the plugin behind the op's own six, in layout hopper_fp8.
PLUGIN_SCALES = ("q_scale", "k_scale", "v_scale", "k_mean")


def lower_for_plugin(
    model: ModelProto, ring: Ring, scales: Sequence[hopper_fp8.Scales] | None, packed: bool = False
) -> ModelProto:
    """Return `model` with attention as our TensorRT plugin reads it, no functions.

        scales None      token_major: caches and blocks bf16
        scales, a layer  hopper_fp8: caches and blocks [1, S, H, D] -> e4m3 [H, tiles, 64 * D]
                         (`packed`: int32 [H, tiles, 16 * D], the same bytes); the layer's
                         scales become constants and inputs 7 to 10 of its node
        both             q, k, v are cast to bf16, and `out` back if the graph's type differs

    Every q needs a shape and a type. Raises BundleError if a cache is not a float32 graph input of
    the ring's size. Raises BundleError if a block is not a graph output, or the layout has no such
    head_dim.
    """
    assert not ring.in_place, f"{ring} is in place; the plugin leaves a cache alone"
    lowered = strip(model)
    _require_opset(lowered)
    graph = lowered.graph
    ours = [node for node in graph.node if is_ours(node)]
    heads, head_dim = check_interface(lowered, ours, ring)
    if scales is not None and head_dim not in hopper_fp8.HEAD_DIMS:
        known_dims = " and ".join(map(str, hopper_fp8.HEAD_DIMS))
        _refuse(model, f"has head_dim {head_dim}; {hopper_fp8.NAME} is for {known_dims}")
    if scales is not None and len(scales) != len(ours):
        _refuse(model, f"has {len(ours)} attention layers and there are scales for {len(scales)}")
    known = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info)}
    ranks = {name: len(kind.shape.dim) for name, kind in known.items()}
    undescribed = [node.input[0] for node in ours if ranks.get(node.input[0]) != 4]
    if undescribed:
        _refuse(model, f"does not tell the shape of {undescribed[0]!r}")

    tensors: dict[str, ValueInfoProto] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if not is_ours(node):
            nodes.append(node)
            continue
        q = known[node.input[0]]
        block_tokens = q.shape.dim[1].dim_value
        for names, tokens in ((node.input[3:5], ring.tokens), (node.output[1:3], block_tokens)):
            kind, shape = _plugin_cache(scales is not None, packed, tokens, heads, head_dim)
            tensors |= {name: helper.make_tensor_value_info(name, kind, shape) for name in names}
        layer, fields = ours.index(node), {}
        if scales is not None:
            names_ = {field: f"{DOMAIN}.{field}.{layer}" for field in PLUGIN_SCALES}
            fields = {name: getattr(scales[layer], field) for field, name in names_.items()}
        constants = [numpy_helper.from_array(value, name) for name, value in fields.items()]
        graph.initializer.extend(constants)
        nodes += _plugin_nodes(node, q.elem_type, list(fields))
    replace(graph.node, nodes)
    for field in (graph.input, graph.output):
        replace(field, [tensors.get(value.name, value) for value in field])
    replace(graph.value_info, [value for value in graph.value_info if value.name not in tensors])
    return lowered


def _plugin_cache(
    hopper: bool, packed: bool, tokens: int, heads: int, head_dim: int
) -> tuple[int, list[int]]:
    """Return type and shape of a cache or block of `tokens`."""
    if not hopper:
        return TensorProto.BFLOAT16, [1, tokens, heads, head_dim]
    *outer, tile_bytes = hopper_fp8.image_shape(heads, tokens, head_dim)
    if packed:
        return TensorProto.INT32, [*outer, tile_bytes // 4]
    return TensorProto.FLOAT8E4M3FN, [*outer, tile_bytes]


def _plugin_nodes(node: NodeProto, dtype: int, constants: list[str]) -> list[NodeProto]:
    """Return the node with its constants, between casts if the graph's type is not bf16."""
    new = NodeProto()
    new.CopyFrom(node)
    new.input.extend(constants)
    if dtype == TensorProto.BFLOAT16:
        return [new]
    out = f"{node.output[0]}.bf16"
    names = [f"{name}.bf16.{node.output[0]}" for name in node.input[:3]]
    half, new_node = TensorProto.BFLOAT16, helper.make_node
    pairs = zip(node.input[:3], names, strict=True)
    before = [new_node("Cast", [x], [cast], f"{node.name}.{cast}", to=half) for x, cast in pairs]
    for index, cast in enumerate(names):
        new.input[index] = cast
    new.output[0] = out
    back = new_node("Cast", [out], [node.output[0]], f"{node.name}.{out}", to=dtype)
    return [*before, new, back]
