"""BlockCausalAttention in ONNX: what its node means, in standard operators.

An exported graph has the node alone.

    attach   adds the meaning as a model-local function: the file runs wherever opset 24 runs
    strip    removes the function: TensorRT must refuse a bare node, not take a slow body

Both return a new model. backends/ort/lower.py and backends/trt/lower_attention.py replace the node
by what their runtimes execute; `check_interface` is for them.

Why ONNX Runtime's in-place form looks as it does (ONNX Runtime 1.32, two threads, fp32, H = 4,
D = 64, ring full, one layer, best of 400, ms):

    cache                             T=84 S=676   T=144 S=2448
    [1, S, H, D], nonpad_kv_seqlen      0.34          2.02      the contract's own layout; chosen
    [1, S, H, D], Slice                 0.39          2.16      copies the valid prefix of K and V;
                                                                a quarter-full ring takes a third
    [1, S, H*D], Slice                  0.39          2.18
    [1, H, S, D], Slice                 0.38          2.12      transposes K and V for every block

`TensorScatter` writes one block, for any S, and `Attention` reads the cache in place: nothing
copies it. The price is that rows beyond `valid` are multiplied by zero instead of left out, so they
must be finite. A runtime fills a cache with zeros before its first use.
"""

from collections import Counter
from typing import Any, NoReturn

from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, parser

from aapt_deploy.errors import BundleError
from aapt_deploy.ops.block_causal_attention import DOMAIN, NAME, Ring
from aapt_deploy.ops.block_causal_attention import OPSET as OPSET

PORTABLE = f"""
<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>
{NAME} <scale, plugin_namespace, plugin_version>
    (q, k, v, k_cache, v_cache, cache_len) => (out, k_block, v_block) {{
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
    """Add the node's meaning to `model` as a local function.

    Raises BundleError if the graph is of another opset.
    """
    attached = strip(model)
    _require_opset(attached)
    attached.functions.append(portable())
    return attached


def portable() -> FunctionProto:
    """Return the model-local function."""
    return parser.parse_function(PORTABLE)


def strip(model: ModelProto) -> ModelProto:
    """Return `model` without local functions of this domain."""
    stripped = ModelProto()
    stripped.CopyFrom(model)
    kept = [function for function in stripped.functions if function.domain != DOMAIN]
    replace(stripped.functions, kept)
    return stripped


def check_interface(model: ModelProto, ours: list[NodeProto], ring: Ring) -> tuple[int, int]:
    """Return heads and head_dim of the caches.

    Raises BundleError unless every cache is an input of the graph and every block an output.
    """
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
                kind = TensorProto.DataType.Name(inputs[cache].elem_type)
                _refuse(model, f"has cache {cache!r} of {kind}; the in-place form is for FLOAT")
            shapes.add(tuple(dim.dim_value for dim in inputs[cache].shape.dim))
    lengths = {node.input[5] for node in ours}
    if len(lengths) != 1 or not lengths <= inputs.keys() or readers[ours[0].input[5]] != len(ours):
        wanted = "one graph input that serves only this"
        _refuse(model, f"takes its cache length from {sorted(lengths)}, not from {wanted}")
    tokens = ring.with_in_place(False).tokens
    shape = min(shapes)
    if len(shapes) != 1 or len(shape) != 4 or shape[:2] != (1, tokens):
        needed = f"the profile's ring needs one shape [1, {tokens}, heads, head_dim]"
        _refuse(model, f"has caches of shape {sorted(shapes)}; {needed}")
    return shape[2], shape[3]


def _require_opset(model: ModelProto) -> None:
    opset = {entry.domain: entry.version for entry in model.opset_import}.get("", 0)
    if opset != OPSET:
        _refuse(model, f"is of opset {opset}, not {OPSET}")


def _refuse(model: ModelProto, reason: str) -> NoReturn:
    hint = "export the checkpoint again with this version"
    raise BundleError(f"graph {model.graph.name!r} {reason}", hint)


def is_ours(node: NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type == NAME


def replace(field: Any, values: list[Any]) -> None:
    """Set a repeated protobuf field; `values` may come from the field itself."""
    del field[:]
    field.extend(values)
