"""Lower a bundle's graphs for TensorRT, and note what plans of them must contain.

Weights are never read here. They stay in the file beside their graph, which is linked into the
folder, so lowering a graph takes the memory of its structure only. graph_file.read_structure
checks that every external constant is in that file.

    precision  fp8   as exported, with FP8 products; other products and attention in bf16
               bf16  all products and attention in bf16
               fp32  as exported
    form       how the generator's attention runs: see doctor/receipts.py and lower_attention.py
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from aapt_deploy.backends.trt import lower_attention, lower_fp8_attention, lower_products
from aapt_deploy.backends.trt.doctor.receipts import AOT, NATIVE, NATIVE_FP8, PYTHON, Choice
from aapt_deploy.backends.trt.lower_fp8_attention import text_in_fp8
from aapt_deploy.backends.trt.lower_products import (
    PRODUCTS,
    attention_in_bf16,
    fp8_products,
    outputs_in_bf16,
    products_in_bf16,
)
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.bundle.graph_file import read_structure
from aapt_deploy.bundle.signature import layer_names
from aapt_deploy.errors import BundleError
from aapt_deploy.ops.block_causal_attention import DOMAIN, Ring, hopper_fp8
from aapt_deploy.ops.block_causal_attention.onnx_function import is_ours, strip

LAYERS_OF_A_NODE = {PYTHON: 1, AOT: 2}  # plugin layers; none in TensorRT's own forms
TENSORRTS = (lower_products.ATTENTION, lower_fp8_attention.ATTENTION)


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

    `scales` are the generator's, one a layer; the forms with FP8 caches read them. Raises
    BundleError if the graph is damaged, reads files outside, or is not the profile's.
    """
    source = bundle.checked(f"{graph}.onnx")
    weights = f"{graph}.onnx.data"
    # With our function inside, a parser without the plugin would take its slow body.
    model = strip(read_structure(source, bundle.listed_bytes(weights)))
    if precision != "fp32":
        model = attention_in_bf16(model)
    plugin_layers = 0
    if graph == "generator":
        nodes = sum(is_ours(node) for node in model.graph.node)
        if nodes != bundle.profile.model.depth:
            hint = "export the checkpoint again with this version"
            depth = bundle.profile.model.depth
            raise BundleError(f"{source} has {nodes} attention layers, the profile {depth}", hint)
        model = _attention(model, Ring.of(bundle.profile), precision, choice, scales)
        plugin_layers = nodes * LAYERS_OF_A_NODE.get(choice.form, 0)
    _refuse_left_over(model, source, plugin_layers)
    if precision != "fp32":
        model = products_in_bf16(model, source.parent)
    if graph == "prompt" and precision != "fp32":
        pairs = [layer_names(f"text_{kind}", bundle.profile) for kind in ("k", "v")]
        if choice.form == NATIVE_FP8 and bundle.profile.text.attention == "joint":
            assert scales is not None, f"{choice.form} reads scales"
            model = text_in_fp8(model, list(zip(*pairs, strict=True)), scales)
        else:
            model = outputs_in_bf16(model, [*pairs[0], *pairs[1]])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / source.name
    path.write_bytes(model.SerializeToString())
    if weights in bundle.manifest["files"]:
        _link(bundle.checked(weights), folder / weights)
    return Lowered(
        path,
        plugin_layers,
        attention_layers=sum(node.op_type in TENSORRTS for node in model.graph.node),
        fp8_products=fp8_products(model),
        products=sum(node.op_type in PRODUCTS for node in model.graph.node),
    )


def _refuse_left_over(model: onnx.ModelProto, source: Path, wanted: int) -> None:
    """Raise BundleError for nodes of our domain that were not lowered.

    TensorRT-RTX has no plugins: its parser would end the process at one that it is offered.
    """
    found = [node for node in model.graph.node if node.domain == DOMAIN]
    if len(found) > wanted:
        text = (
            f"{source} has {found[0].op_type} node {found[0].name!r}, which a {source.stem} has not"
        )
        raise BundleError(text, "export the checkpoint again with this version")


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
    if choice.form == NATIVE_FP8:
        return lower_fp8_attention.lower_native_fp8(model, ring, scales)
    lowered = lower_attention.lower_for_plugin(model, ring, scales, packed=choice.packed)
    return lower_attention.split_for_aot(lowered) if choice.form == AOT else lowered


def _link(source: Path, target: Path) -> None:
    """Link the file under another name; copy it if the file system cannot."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
