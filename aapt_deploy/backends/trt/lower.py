"""Lower a bundle's graphs for TensorRT, and note what plans of them must contain.

Weights are never read here. They stay in the file beside their graph, which is linked into the
folder, so lowering a graph takes the memory of its structure only. graph_file.read_structure
checks that every external constant is in that file.

    precision  fp8   as exported, with FP8 products; the rest's products in bf16
               bf16  all products in bf16
               fp32  as exported
    form       how the generator's attention runs: see doctor/receipts.py and lower_attention.py
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from aapt_deploy.backends.trt import lower_attention
from aapt_deploy.backends.trt.doctor.receipts import AOT, NATIVE, Choice
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.bundle.graph_file import read_structure
from aapt_deploy.bundle.signature import layer_names
from aapt_deploy.errors import BundleError
from aapt_deploy.ops.block_causal_attention import Ring, hopper_fp8
from aapt_deploy.ops.block_causal_attention.onnx_function import is_ours, strip

LAYERS_OF_A_NODE = {AOT: 2}  # plugin layers; one in the other form, none in TensorRT's own


@dataclass(frozen=True)
class Lowered:
    """Graph that is ready for TensorRT's parser."""

    path: Path
    plugin_layers: int  # that the parsed network and the plan must have
    attention_layers: int  # nodes of TensorRT's own attention
    fp8_products: dict[str, list[str]]  # by what they read; a plan has >= 1 FP8 layer for each
    products: int  # all of them


def lower(
    bundle: Bundle,
    graph: str,
    precision: str,
    choice: Choice,
    scales: list[hopper_fp8.Scales] | None,
    folder: Path,
) -> Lowered:
    """Write `graph` into `folder`, in `precision` and (generator) the form of `choice`.

    `scales` are the generator's, one a layer; only the forms with our kernels read them. Raises
    BundleError if the graph is damaged, reads files outside, or is not the profile's.
    """
    source = bundle.checked(f"{graph}.onnx")
    weights = f"{graph}.onnx.data"
    # With our function inside, a parser without the plugin would take its slow body.
    model = strip(read_structure(source, bundle.listed_bytes(weights)))
    native = choice.form == NATIVE
    nodes = sum(is_ours(node) for node in model.graph.node)
    if graph == "generator":
        if nodes != bundle.profile.model.depth:
            hint = "export the checkpoint again with this version"
            depth = bundle.profile.model.depth
            raise BundleError(f"{source} has {nodes} attention layers, the profile {depth}", hint)
        model = _attention(model, Ring.of(bundle.profile), precision, choice, scales)
    if precision != "fp32":
        model = products_in_bf16(model)
    if graph == "prompt" and precision != "fp32":
        names = [*layer_names("text_k", bundle.profile), *layer_names("text_v", bundle.profile)]
        model = outputs_in_bf16(model, names)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / source.name
    path.write_bytes(model.SerializeToString())
    if weights in bundle.manifest["files"]:
        _link(bundle.checked(weights), folder / weights)
    return Lowered(
        path,
        plugin_layers=0 if native else nodes * LAYERS_OF_A_NODE.get(choice.form, 1),
        attention_layers=nodes if native else 0,
        fp8_products=fp8_products(model),
        products=sum(node.op_type in PRODUCTS for node in model.graph.node),
    )


def _attention(
    model: onnx.ModelProto,
    ring: Ring,
    precision: str,
    choice: Choice,
    scales: list[hopper_fp8.Scales] | None,
) -> onnx.ModelProto:
    if choice.form == NATIVE:
        dtype = TensorProto.FLOAT if precision == "fp32" else TensorProto.BFLOAT16
        return lower_attention.lower_native(model, ring, dtype)
    assert scales is not None, f"{choice.form} reads scales"
    lowered = lower_attention.lower_for_plugin(model, ring, scales, packed=choice.packed)
    return lower_attention.split_for_aot(lowered) if choice.form == AOT else lowered


def _link(source: Path, target: Path) -> None:
    """Link the file under another name; copy it if the file system cannot."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


PRODUCTS = ("MatMul", "Gemm", "Conv")
PASSING = ("Transpose", "Reshape")  # between a weight's DequantizeLinear and its product


def products_in_bf16(model: ModelProto) -> ModelProto:
    """Return `model` with its float32 products in bf16.

    Weights stay float32 on disk; TensorRT rounds them while it builds.
    """
    lowered = ModelProto()
    lowered.CopyFrom(model)
    graph = lowered.graph
    made = {name: node for node in graph.node for name in node.output}
    casts: dict[str, NodeProto] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type not in PRODUCTS or any(dequantised(name, made) for name in node.input):
            nodes.append(node)
            continue
        for index, name in enumerate(node.input):
            if name and name not in casts:
                casts[name] = _cast(name, f"{name}.bf16", f"{name}.to_bf16", TensorProto.BFLOAT16)
                nodes.append(casts[name])
            if name:
                node.input[index] = f"{name}.bf16"
        out = node.output[0]
        node.output[0] = f"{out}.in_bf16"
        back = _cast(node.output[0], out, f"{out}.from_bf16", TensorProto.FLOAT)
        nodes += [node, back]
    del graph.node[:]
    graph.node.extend(nodes)
    return lowered


def _is_product(node: NodeProto) -> bool:
    return node.op_type in PRODUCTS and len(node.input) > 0


def _cast(source: str, target: str, name: str, dtype: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name, to=dtype)


def dequantised(name: str, made: dict[str, NodeProto]) -> NodeProto | None:
    """Return the DequantizeLinear behind tensor `name`, past operators that only move numbers."""
    node = made.get(name)
    while node is not None and node.op_type in PASSING:
        node = made.get(node.input[0])
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def fp8_products(model: ModelProto) -> dict[str, list[str]]:
    """Return the names of the products that the graph quantises, by what they read.

    Products of one input with one scale may become one layer of a plan. So a plan has at least
    as many FP8 layers as there are entries.
    """
    made = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, list[str]] = {}
    for node in model.graph.node:
        dq = dequantised(node.input[0], made) if _is_product(node) else None
        if dq is not None:
            quantise = made.get(dq.input[0])
            source = quantise.input[0] if quantise is not None else dq.input[0]
            found.setdefault(source, []).append(node.name)
    return found


def outputs_in_bf16(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """Return `model` with the outputs `names` in bf16."""
    lowered = ModelProto()
    lowered.CopyFrom(model)
    graph = lowered.graph
    renamed = {name: f"{name}.float" for name in names}
    for node in graph.node:
        for field in (node.input, node.output):
            for index, name in enumerate(field):
                field[index] = renamed.get(name, name)
    for value in graph.value_info:
        value.name = renamed.get(value.name, value.name)
    kept: list[ValueInfoProto] = []
    half = TensorProto.BFLOAT16
    for value in graph.output:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        narrow = helper.make_tensor_value_info(value.name, half, shape)
        kept.append(narrow if value.name in renamed else value)
    del graph.output[:]
    graph.output.extend(kept)
    casts = [_cast(old, name, f"{name}.to_bf16", half) for name, old in renamed.items()]
    graph.node.extend(casts)
    return lowered
