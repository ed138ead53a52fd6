"""A bundle's graphs as TensorRT is to read them: files in a folder of their own, and what the plans made from them must contain.

Weights are never read here. They stay in the file beside their graph, which is linked into the folder, so a graph of any size is lowered in the
memory that its structure takes. That file comes from a bundle, so every constant must lie in exactly that file, inside its length.

    precision  fp8   as exported, with FP8 products; the rest's products in bf16
               bf16  all products in bf16
               fp32  as exported
    form       how the generator's attention runs: see backends/trt/doctor/receipts.py and ops/block_causal_attention
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
from aapt_deploy.errors import BundleError
from aapt_deploy.models.aapt.signature import layer_names
from aapt_deploy.ops.block_causal_attention import Ring, hopper_fp8
from aapt_deploy.ops.block_causal_attention.onnx_function import is_ours, strip

LAYERS_OF_A_NODE = {AOT: 2}  # plugin layers; one in the other form, none in TensorRT's own


@dataclass(frozen=True)
class Lowered:
    """One graph, ready for TensorRT's parser."""

    path: Path
    plugin_layers: int  # that the parsed network and the plan must have
    attention_layers: int  # nodes of TensorRT's own attention
    fp8_products: dict[
        str, list[str]
    ]  # quantised products by what they read; a plan has an FP8 layer for each entry at least
    products: int  # all of them


def lower(
    bundle: Bundle,
    graph: str,
    precision: str,
    choice: Choice,
    scales: list[hopper_fp8.Scales] | None,
    folder: Path,
) -> Lowered:
    """Write `graph` into `folder`, in the types of `precision` and, for the generator, the form of `choice`.

    `scales` are the generator's, one a layer; only the forms with our kernels read them. Raises BundleError when the graph is damaged, keeps
    constants elsewhere, or is not what the profile says.
    """
    source = bundle.checked(f"{graph}.onnx")
    weights = f"{graph}.onnx.data"
    # With our function inside, a parser without the plugin would take its slow body.
    model = strip(read_structure(source, bundle.listed_bytes(weights)))
    native = choice.form == NATIVE
    nodes = sum(is_ours(node) for node in model.graph.node)
    if graph == "generator":
        if nodes != bundle.profile.model.depth:
            raise BundleError(
                f"{source} has {nodes} attention layers, the profile {bundle.profile.model.depth}",
                "export the checkpoint again with this version",
            )
        model = _attention(model, Ring.of(bundle.profile), precision, choice, scales)
    if precision != "fp32":
        model = products_in_bf16(model)
    if graph == "prompt" and precision != "fp32":
        names = [
            name for kind in ("text_k", "text_v") for name in layer_names(kind, bundle.profile)
        ]
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
        return lower_attention.lower_native(
            model, ring, TensorProto.FLOAT if precision == "fp32" else TensorProto.BFLOAT16
        )
    assert scales is not None, f"{choice.form} reads scales"
    lowered = lower_attention.lower_for_plugin(model, ring, scales, packed=choice.packed)
    return lower_attention.split_for_aot(lowered) if choice.form == AOT else lowered


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system cannot."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


PRODUCTS = ("MatMul", "Gemm", "Conv")


PASSING = ("Transpose", "Reshape")  # between a weight's DequantizeLinear and its product


def products_in_bf16(model: ModelProto) -> ModelProto:
    """`model` with its float32 products in bf16. Weights keep their float32 bytes, wherever they lie; TensorRT rounds them while it builds."""
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
                casts[name] = helper.make_node(
                    "Cast", [name], [f"{name}.bf16"], f"{name}.to_bf16", to=TensorProto.BFLOAT16
                )
                nodes.append(casts[name])
            if name:
                node.input[index] = f"{name}.bf16"
        out = node.output[0]
        node.output[0] = f"{out}.in_bf16"
        nodes += [
            node,
            helper.make_node(
                "Cast", [node.output[0]], [out], f"{out}.from_bf16", to=TensorProto.FLOAT
            ),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    return lowered


def dequantised(name: str, made: dict[str, NodeProto]) -> NodeProto | None:
    """The DequantizeLinear that tensor `name` comes from, by way of operators that only move numbers."""
    node = made.get(name)
    while node is not None and node.op_type in PASSING:
        node = made.get(node.input[0])
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def fp8_products(model: ModelProto) -> dict[str, list[str]]:
    """Names of the products that the graph quantises, by what they read.

    Products of one input with one scale may become one layer of a plan, so a plan has at least as many FP8 layers as this has entries.
    """
    made = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, list[str]] = {}
    for node in model.graph.node:
        activations = [
            dq
            for name in node.input[:1]
            if node.op_type in PRODUCTS and (dq := dequantised(name, made))
        ]
        for dq in activations:
            quantise = made.get(dq.input[0])
            source = quantise.input[0] if quantise is not None else dq.input[0]
            found.setdefault(source, []).append(node.name)
    return found


def outputs_in_bf16(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """`model` whose outputs `names` leave as bf16."""
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
    for value in graph.output:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        kept.append(
            helper.make_tensor_value_info(value.name, TensorProto.BFLOAT16, shape)
            if value.name in renamed
            else value
        )
    del graph.output[:]
    graph.output.extend(kept)
    graph.node.extend(
        helper.make_node("Cast", [old], [name], f"{name}.to_bf16", to=TensorProto.BFLOAT16)
        for name, old in renamed.items()
    )
    return lowered
