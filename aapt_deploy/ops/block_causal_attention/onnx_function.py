"""BlockCausalAttention in ONNX: what its node means in standard operators, and the form in which ONNX Runtime runs it without copying a cache.

An exported graph holds the node alone. From there on:

    attach           adds the meaning as a model-local function: the file now runs wherever opset 24 runs; parity checks use it
    lower_in_place   replaces every node by operators that update the cache where it lies; ONNX Runtime streams with it
    strip            removes the function; TensorRT gets the bare node, so that a missing plugin is an error and never a silent slow body
    lower_for_plugin the bare node with the types, cache layout and scales that our TensorRT plugin reads

All four return a new model. Nothing here runs a graph or knows a bundle.

Why the in-place form looks as it does (ONNX Runtime 1.32, two threads, fp32, H = 4, D = 64, ring full, one layer, best of 400, ms):

    cache held as                                  T=84 S=676   T=144 S=2448
    [1, S, H, D], nonpad_kv_seqlen                    0.34          2.02      the contract's own layout; chosen
    [1, S, H, D], Slice                               0.39          2.16      copies the valid prefix of K and V; a quarter-full ring takes a third
    [1, S, H*D], Slice                                0.39          2.18
    [1, H, S, D], Slice                               0.38          2.12      needs K and V transposed for every block

`TensorScatter` writes one block, whatever S is, and `Attention` reads the cache where it lies: nothing copies it. The price is that rows beyond
`valid` are multiplied by zero instead of left out, so they must hold finite numbers; a runtime fills a cache with zeros before its first use.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper, parser

from aapt_deploy.errors import BundleError
from aapt_deploy.ops.block_causal_attention import DOMAIN, NAME, NEXT, SLOT, VALID, Ring, hopper_fp8

OPSET = 24  # the first one with TensorScatter

PORTABLE = f"""
<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>
{NAME} <scale, plugin_namespace, plugin_version> (q, k, v, k_cache, v_cache, cache_len) => (out, k_block, v_block) {{
    k_block = CastLike(k, k_cache)
    v_block = CastLike(v, v_cache)
    zero = Constant <value_ints = [0]> ()
    axis = Constant <value_ints = [1]> ()
    end = Cast <to = 7> (cache_len)
    k_stored = Slice(k_cache, zero, end, axis)
    v_stored = Slice(v_cache, zero, end, axis)
    k_past = CastLike(k_stored, k)
    v_past = CastLike(v_stored, v)
    k_all = Concat <axis = 1> (k_past, k)
    v_all = Concat <axis = 1> (v_past, v)
    q_heads = Transpose <perm = [0, 2, 1, 3]> (q)
    k_heads = Transpose <perm = [0, 2, 1, 3]> (k_all)
    v_heads = Transpose <perm = [0, 2, 1, 3]> (v_all)
    out_heads = Attention <scale: float = @scale> (q_heads, k_heads, v_heads)
    out = Transpose <perm = [0, 2, 1, 3]> (out_heads)
}}
"""

# Constants that all lowered nodes share.
_FLAT, _HEADS = (f"{DOMAIN}.{name}" for name in ("flat", "heads"))


def attach(model: ModelProto) -> ModelProto:
    """`model` with the node's meaning as a local function. Raises BundleError if the graph is of another opset."""
    attached = strip(model)
    _require_opset(attached)
    attached.functions.append(portable())
    return attached


def portable() -> FunctionProto:
    """The model-local function."""
    return parser.parse_function(PORTABLE)


def strip(model: ModelProto) -> ModelProto:
    """`model` without local functions of this domain."""
    stripped = ModelProto()
    stripped.CopyFrom(model)
    replace(stripped.functions, [function for function in stripped.functions if function.domain != DOMAIN])
    return stripped


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


PLUGIN_SCALES = ("q_scale", "k_scale", "v_scale", "k_mean")  # inputs of the plugin behind the op's own six, in layout hopper_fp8


def lower_for_plugin(model: ModelProto, ring: Ring, scales: Sequence[hopper_fp8.Scales] | None, packed: bool = False) -> ModelProto:
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
        _refuse(model, f"has head_dim {head_dim}; {hopper_fp8.NAME} is for {' and '.join(map(str, hopper_fp8.HEAD_DIMS))}")
    if scales is not None and len(scales) != len(ours):
        _refuse(model, f"has {len(ours)} attention layers and there are scales for {len(scales)}")
    known = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info)}
    undescribed = [node.input[0] for node in ours if len(known[node.input[0]].shape.dim if node.input[0] in known else ()) != 4]
    if undescribed:
        _refuse(model, f"does not tell the shape of {undescribed[0]!r}")

    tensors: dict[str, ValueInfoProto] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if not is_ours(node):
            nodes.append(node)
            continue
        q = known[node.input[0]]
        for names, tokens in ((node.input[3:5], ring.tokens), (node.output[1:3], q.shape.dim[1].dim_value)):
            kind, shape = _plugin_cache(scales is not None, packed, tokens, heads, head_dim)
            tensors |= {name: helper.make_tensor_value_info(name, kind, shape) for name in names}
        layer = ours.index(node)
        fields = {} if scales is None else {f"{DOMAIN}.{field}.{layer}": getattr(scales[layer], field) for field in PLUGIN_SCALES}
        graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in fields.items())
        nodes += _plugin_nodes(node, q.elem_type, list(fields))
    replace(graph.node, nodes)
    for field in (graph.input, graph.output):
        replace(field, [tensors.get(value.name, value) for value in field])
    replace(graph.value_info, [value for value in graph.value_info if value.name not in tensors])
    return lowered


def _plugin_cache(hopper: bool, packed: bool, tokens: int, heads: int, head_dim: int) -> tuple[int, list[int]]:
    """Type and shape of a cache or block of `tokens`."""
    if not hopper:
        return TensorProto.BFLOAT16, [1, tokens, heads, head_dim]
    *outer, tile_bytes = hopper_fp8.image_shape(heads, tokens, head_dim)
    return (TensorProto.INT32, [*outer, tile_bytes // 4]) if packed else (TensorProto.FLOAT8E4M3FN, [*outer, tile_bytes])


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
    before = [helper.make_node("Cast", [name], [cast], f"{node.name}.{cast}", to=TensorProto.BFLOAT16) for name, cast in pairs]
    for index, cast in enumerate(names):
        new.input[index] = cast
    new.output[0] = out
    return [*before, new, helper.make_node("Cast", [out], [node.output[0]], f"{node.name}.{out}", to=dtype)]


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


def check_interface(model: ModelProto, ours: list[NodeProto], ring: Ring) -> tuple[int, int]:
    """Heads and head_dim of the caches. Raises BundleError unless every cache enters, and every block leaves, by the graph itself."""
    if not ours:
        _refuse(model, f"has no {DOMAIN}::{NAME} node to lower")
    inputs = {value.name: value.type.tensor_type for value in model.graph.input}
    outputs = {value.name for value in model.graph.output}
    readers = Counter(name for node in model.graph.node for name in node.input)
    shapes = set()
    for node in ours:
        for cache, block in zip(node.input[3:5], node.output[1:3], strict=True):
            if cache not in inputs or readers[cache] != 1:
                _refuse(model, f"reads cache {cache!r}, which is not a graph input of its own")
            if block not in outputs or readers[block]:
                _refuse(model, f"computes block {block!r}, which is not a graph output alone")
            if inputs[cache].elem_type != TensorProto.FLOAT:
                _refuse(model, f"has cache {cache!r} of {TensorProto.DataType.Name(inputs[cache].elem_type)}; the in-place form is for FLOAT")
            shapes.add(tuple(dim.dim_value for dim in inputs[cache].shape.dim))
    lengths = {node.input[5] for node in ours}
    if len(lengths) != 1 or not lengths <= inputs.keys() or readers[ours[0].input[5]] != len(ours):
        _refuse(model, f"takes its cache length from {sorted(lengths)}, not from one graph input that serves only this")
    tokens = ring.with_in_place(False).tokens
    shape = min(shapes)
    if len(shapes) != 1 or len(shape) != 4 or shape[:2] != (1, tokens):
        _refuse(model, f"has caches of shape {sorted(shapes)}; the profile's ring needs one shape [1, {tokens}, heads, head_dim]")
    return shape[2], shape[3]


def _require_opset(model: ModelProto) -> None:
    opset = {entry.domain: entry.version for entry in model.opset_import}.get("", 0)
    if opset != OPSET:
        _refuse(model, f"is of opset {opset}, not {OPSET}")


def _refuse(model: ModelProto, reason: str) -> NoReturn:
    raise BundleError(f"graph {model.graph.name!r} {reason}", "export the checkpoint again with this version")


def is_ours(node: NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type == NAME


def replace(field: Any, values: list[Any]) -> None:
    """Give a repeated protobuf field new contents; `values` may come from the field itself."""
    del field[:]
    field.extend(values)
