"""The op's node in the two other forms that TensorRT may be given; onnx_function.lower_for_plugin makes the first.

    lower_native    TensorRT's own attention: one mask of valid tokens, static shapes, standard operators. It needs nothing of ours at run time, is
                    what a build falls back to, and, because ONNX Runtime runs it too, the form whose arithmetic is tested without TensorRT
    split_for_aot   the plugin's node as the two ahead-of-time plugins, whose kernels the plan then holds

The portable body (onnx_function.PORTABLE) cuts the cache to its valid prefix; that is a shape which depends on data, and TensorRT would not let a
CUDA graph hold it. Here every shape is fixed and the rest of the cache is masked, so it must hold finite numbers: the runtime fills it with zeros.

Neither form was run on TensorRT by us.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

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
    graph.initializer.append(
        numpy_helper.from_array(np.arange(total, dtype=np.int32).reshape(shape), _POSITIONS)
    )
    graph.initializer.append(numpy_helper.from_array(own.reshape(shape), _OWN))
    mask = [
        helper.make_node("Less", [_POSITIONS, ours[0].input[5]], [_PAST], _PAST),
        helper.make_node("Or", [_PAST, _OWN], [MASK], MASK),
    ]
    replace(
        graph.node,
        [
            *mask,
            *(
                new
                for node in graph.node
                for new in (_native_nodes(node, dtype) if is_ours(node) else [node])
            ),
        ],
    )
    for field, names, length in (
        (graph.input, caches, ring.tokens),
        (graph.output, blocks, tokens),
    ):
        described = {
            name: helper.make_tensor_value_info(name, dtype, [1, length, heads, head_dim])
            for name in names
        }
        replace(field, [described.get(value.name, value) for value in field])
    replace(
        graph.value_info, [value for value in graph.value_info if value.name not in caches | blocks]
    )
    return lowered


def _native_nodes(node: NodeProto, dtype: int) -> list[NodeProto]:
    """k_block, v_block and the attention of one layer."""
    q, k, v, k_cache, v_cache, _ = node.input
    out, k_block, v_block = node.output
    scale = next(attribute.f for attribute in node.attribute if attribute.name == "scale")
    name = {
        part: f"{out}.{part}"
        for part in ("q", "q.heads", "k.all", "k.heads", "v.all", "v.heads", "heads", "tokens")
    }
    turned: dict[str, Any] = {"perm": [0, 2, 1, 3]}
    nodes = [
        helper.make_node("Cast", [q], [name["q"]], to=dtype),  # [1, T, H, D]
        helper.make_node("Cast", [k], [k_block], to=dtype),
        helper.make_node("Cast", [v], [v_block], to=dtype),
        helper.make_node("Concat", [k_cache, k_block], [name["k.all"]], axis=1),  # [1, S + T, H, D]
        helper.make_node("Concat", [v_cache, v_block], [name["v.all"]], axis=1),
        helper.make_node("Transpose", [name["q"]], [name["q.heads"]], **turned),  # [1, H, T, D]
        helper.make_node(
            "Transpose", [name["k.all"]], [name["k.heads"]], **turned
        ),  # [1, H, S + T, D]
        helper.make_node("Transpose", [name["v.all"]], [name["v.heads"]], **turned),
        helper.make_node(
            "Attention",
            [name["q.heads"], name["k.heads"], name["v.heads"], MASK],
            [name["heads"]],
            scale=scale,
        ),
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
    replace(
        split.graph.node,
        [
            new
            for node in split.graph.node
            for new in (_aot_nodes(node) if is_ours(node) else [node])
        ],
    )
    return split


def _aot_nodes(node: NodeProto) -> Iterable[NodeProto]:
    assert len(node.input) == 10, (
        f"{node.name} has {len(node.input)} inputs; the ahead-of-time form is for FP8 caches"
    )
    q, k, v, k_cache, v_cache, cache_len, q_scale, k_scale, v_scale, k_mean = node.input
    out, k_block, v_block = node.output
    attributes: dict[str, Any] = {
        "plugin_namespace": PLUGIN_NAMESPACE,
        "plugin_version": PLUGIN_VERSION,
        "aot": 1,
    }  # 1: the kernel goes into the plan
    rows = (
        ("Pack", [k, v, k_scale, k_mean, v_scale], [k_block, v_block]),
        (
            "Attend",
            [q, k_block, v_block, k_cache, v_cache, cache_len, q_scale, k_scale, v_scale],
            [out],
        ),
    )
    return [
        helper.make_node(
            f"{NAME}{part}", reads, writes, f"{node.name}.{part}", domain=DOMAIN, **attributes
        )
        for part, reads, writes in rows
    ]


PLUGIN_SCALES = (
    "q_scale",
    "k_scale",
    "v_scale",
    "k_mean",
)  # inputs of the plugin behind the op's own six, in layout hopper_fp8


def lower_for_plugin(
    model: ModelProto, ring: Ring, scales: Sequence[hopper_fp8.Scales] | None, packed: bool = False
) -> ModelProto:
    """`model` with every BlockCausalAttention node as our TensorRT plugin reads it, functions removed. Needs the shape and type of every q.

        scales None      token_major: caches and blocks bf16
        scales, a layer  hopper_fp8: caches [1, S, H, D] -> e4m3 [H, tiles, 64 * D] (`packed`: int32 [H, tiles, 16 * D], the same bytes),
                         blocks likewise; the layer's scales become constants and inputs 7 to 10 of its node
        both             q, k, v are cast to bf16 and `out` back, where the graph computes in another type

    Raises BundleError if a cache is not a float32 graph input of the ring's size, a block is not a graph output, q is not described, or the layout
    has no such head_dim.
    """
    assert not ring.in_place, f"{ring} is in place; the plugin leaves a cache alone"
    lowered = strip(model)
    _require_opset(lowered)
    graph = lowered.graph
    ours = [node for node in graph.node if is_ours(node)]
    heads, head_dim = check_interface(lowered, ours, ring)
    if scales is not None and head_dim not in hopper_fp8.HEAD_DIMS:
        _refuse(
            model,
            f"has head_dim {head_dim}; {hopper_fp8.NAME} is for {' and '.join(map(str, hopper_fp8.HEAD_DIMS))}",
        )
    if scales is not None and len(scales) != len(ours):
        _refuse(model, f"has {len(ours)} attention layers and there are scales for {len(scales)}")
    known = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info)}
    undescribed = [
        node.input[0]
        for node in ours
        if len(known[node.input[0]].shape.dim if node.input[0] in known else ()) != 4
    ]
    if undescribed:
        _refuse(model, f"does not tell the shape of {undescribed[0]!r}")

    tensors: dict[str, ValueInfoProto] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if not is_ours(node):
            nodes.append(node)
            continue
        q = known[node.input[0]]
        for names, tokens in (
            (node.input[3:5], ring.tokens),
            (node.output[1:3], q.shape.dim[1].dim_value),
        ):
            kind, shape = _plugin_cache(scales is not None, packed, tokens, heads, head_dim)
            tensors |= {name: helper.make_tensor_value_info(name, kind, shape) for name in names}
        layer = ours.index(node)
        fields = (
            {}
            if scales is None
            else {
                f"{DOMAIN}.{field}.{layer}": getattr(scales[layer], field)
                for field in PLUGIN_SCALES
            }
        )
        graph.initializer.extend(
            numpy_helper.from_array(value, name) for name, value in fields.items()
        )
        nodes += _plugin_nodes(node, q.elem_type, list(fields))
    replace(graph.node, nodes)
    for field in (graph.input, graph.output):
        replace(field, [tensors.get(value.name, value) for value in field])
    replace(graph.value_info, [value for value in graph.value_info if value.name not in tensors])
    return lowered


def _plugin_cache(
    hopper: bool, packed: bool, tokens: int, heads: int, head_dim: int
) -> tuple[int, list[int]]:
    """Type and shape of a cache or block of `tokens`."""
    if not hopper:
        return TensorProto.BFLOAT16, [1, tokens, heads, head_dim]
    *outer, tile_bytes = hopper_fp8.image_shape(heads, tokens, head_dim)
    return (
        (TensorProto.INT32, [*outer, tile_bytes // 4])
        if packed
        else (TensorProto.FLOAT8E4M3FN, [*outer, tile_bytes])
    )


def _plugin_nodes(node: NodeProto, dtype: int, constants: list[str]) -> list[NodeProto]:
    """The node with its constants, between casts where the graph computes in another type than bf16."""
    new = NodeProto()
    new.CopyFrom(node)
    new.input.extend(constants)
    if dtype == TensorProto.BFLOAT16:
        return [new]
    out = f"{node.output[0]}.bf16"
    names = [f"{name}.bf16.{node.output[0]}" for name in node.input[:3]]
    pairs = zip(node.input[:3], names, strict=True)
    before = [
        helper.make_node("Cast", [name], [cast], f"{node.name}.{cast}", to=TensorProto.BFLOAT16)
        for name, cast in pairs
    ]
    for index, cast in enumerate(names):
        new.input[index] = cast
    new.output[0] = out
    return [
        *before,
        new,
        helper.make_node("Cast", [out], [node.output[0]], f"{node.name}.{out}", to=dtype),
    ]
