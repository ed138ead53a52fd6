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
from typing import Any, NoReturn

from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, parser

from aapt_deploy.errors import BundleError
from aapt_deploy.ops.block_causal_attention import DOMAIN, NAME, Ring
from aapt_deploy.ops.block_causal_attention import OPSET as OPSET

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
    replace(
        stripped.functions,
        [function for function in stripped.functions if function.domain != DOMAIN],
    )
    return stripped


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
                _refuse(
                    model,
                    f"has cache {cache!r} of {TensorProto.DataType.Name(inputs[cache].elem_type)}; the in-place form is for FLOAT",
                )
            shapes.add(tuple(dim.dim_value for dim in inputs[cache].shape.dim))
    lengths = {node.input[5] for node in ours}
    if len(lengths) != 1 or not lengths <= inputs.keys() or readers[ours[0].input[5]] != len(ours):
        _refuse(
            model,
            f"takes its cache length from {sorted(lengths)}, not from one graph input that serves only this",
        )
    tokens = ring.with_in_place(False).tokens
    shape = min(shapes)
    if len(shapes) != 1 or len(shape) != 4 or shape[:2] != (1, tokens):
        _refuse(
            model,
            f"has caches of shape {sorted(shapes)}; the profile's ring needs one shape [1, {tokens}, heads, head_dim]",
        )
    return shape[2], shape[3]


def _require_opset(model: ModelProto) -> None:
    opset = {entry.domain: entry.version for entry in model.opset_import}.get("", 0)
    if opset != OPSET:
        _refuse(model, f"is of opset {opset}, not {OPSET}")


def _refuse(model: ModelProto, reason: str) -> NoReturn:
    raise BundleError(
        f"graph {model.graph.name!r} {reason}", "export the checkpoint again with this version"
    )


def is_ours(node: NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type == NAME


def replace(field: Any, values: list[Any]) -> None:
    """Give a repeated protobuf field new contents; `values` may come from the field itself."""
    del field[:]
    field.extend(values)
