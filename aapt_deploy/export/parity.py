"""Compare an exported graph in ONNX Runtime with the PyTorch module that it came from.

A graph in float32 is compared as a whole, and to the last digits. In FP8 a sum on the edge of two
e4m3 codes may round either way, 6 to 12 % apart, and what follows differs by that. Two right graphs
are some hundredths apart. So a graph in FP8 is compared as a whole for gross mistakes. Each of its
FP8 products is compared alone, on the very input that ONNX Runtime had there, to the last digits.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt_deploy.bundle.signature import GraphSignature
from aapt_deploy.models.fp8 import Linear8
from aapt_deploy.models.inputs import random_inputs
from aapt_deploy.profiles import Profile

# Largest difference relative to the output's largest value; fp32 graphs differ by about 1e-6.
FP32_TOLERANCE = 2e-4
# Root mean square, relative to the output's; the demo's is 0.03 apart, and 0.05 from float32.
FP8_TOLERANCE = 0.1
RESET = "after a reset"  # a case: the state is zero
PIXEL_TOLERANCE = 1  # of 255: a value on the edge of two may round either way


class Parity(NamedTuple):
    """How far one graph in ONNX Runtime is from PyTorch."""

    graph: str
    case: str
    error: float  # largest absolute difference over all outputs
    relative: float  # relative to the output: of the largest values; in FP8, of root mean squares
    ok: bool


def parity_cases(signature: GraphSignature, profile: Profile) -> list[tuple[str, int]]:
    """Return (name, valid cache tokens) of the inputs that a graph is checked on."""
    if signature.name == "decoder":
        return [("random", 0), (RESET, 0)]
    if signature.name != "generator":
        return [("random", 0)]
    return [
        ("empty cache", profile.cached_text_tokens),
        ("half-full cache", profile.cache_tokens // 2),
        ("full cache", profile.cache_tokens),
    ]


def check_parity(
    path: Path, module: nn.Module, signature: GraphSignature, profile: Profile, in_fp8: bool = False
) -> list[Parity]:
    """Run one exported graph in ONNX Runtime and in PyTorch on the same random inputs."""
    session = _session(path)
    specs = signature.read
    rows = []
    for seed, (case, cache_len) in enumerate(parity_cases(signature, profile), start=1):
        inputs = random_inputs([(s.name, s.shape, s.dtype) for s in specs], seed, cache_len)
        if case == RESET:
            state = {spec.name for spec in signature.state}
            pairs = zip(specs, inputs, strict=True)
            inputs = [x * 0 if spec.name in state else x for spec, x in pairs]
        with torch.no_grad():
            wanted = module(*inputs)
        got = session.run(None, {s.name: x.numpy() for s, x in zip(specs, inputs, strict=True)})
        outputs = list(wanted) if isinstance(wanted, tuple) else [wanted]
        rows.append(compare(signature.name, case, outputs, got, in_fp8))
    return rows


def compare(
    graph: str, case: str, wanted: list[Tensor], got: list[np.ndarray], in_fp8: bool = False
) -> Parity:
    """Compare two sets of outputs.

    uint8 pictures may differ by PIXEL_TOLERANCE, numbers by FP32_TOLERANCE of their range. Those of
    a graph in FP8 may differ by FP8_TOLERANCE of their root mean square.
    """
    error = relative = 0.0
    ok = len(wanted) == len(got)
    for want, have in zip(wanted, got, strict=True):
        w, h = want.numpy().astype(np.float64), have.astype(np.float64)
        sound = h.shape == w.shape and bool(np.isfinite(h).all())
        difference = np.abs(w - h)
        largest = float(difference.max())
        if want.dtype == torch.uint8:
            share, within = largest / max(float(w.max()), 1e-9), largest <= PIXEL_TOLERANCE
        elif in_fp8:
            share = float(np.sqrt(np.square(difference).mean() / max(np.square(w).mean(), 1e-18)))
            within = share <= FP8_TOLERANCE
        else:
            share = largest / max(float(np.abs(w).max()), 1e-9)
            within = share <= FP32_TOLERANCE
        error, relative = max(error, largest), max(relative, share)
        ok = ok and within and sound
    return Parity(graph, case, error, relative, ok)


def check_products(
    path: Path, module: nn.Module, signature: GraphSignature, profile: Profile
) -> Parity:
    """Compare each FP8 product of a graph with PyTorch, on its input in ONNX Runtime.

    The cache is full if there is one.
    """
    model = onnx.load(path, load_external_data=False)
    makers = {name: node for node in model.graph.node for name in node.output}
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, Linear8)}
    # layer -> its input before Q, its output before the bias
    products: dict[str, tuple[str, str]] = {}
    for node in model.graph.node:
        weight = _weight_of(node, makers) if node.op_type == "MatMul" else ""
        if (name := weight.removesuffix(".weight")) in layers:
            products[name] = (makers[makers[node.input[0]].input[0]].input[0], node.output[0])
    known = {value.name for value in (*model.graph.output, *model.graph.input)}
    watched = sorted({name for pair in products.values() for name in pair} - known)
    new = [onnx.helper.make_tensor_value_info(x, onnx.TensorProto.FLOAT, None) for x in watched]
    model.graph.output.extend(new)
    specs = signature.read
    inputs = random_inputs([(s.name, s.shape, s.dtype) for s in specs], 0, profile.cache_tokens)
    fed = {s.name: x.numpy() for s, x in zip(specs, inputs, strict=True)}
    # beside the graph, whose external data it shares
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".onnx") as file:
        file.write(model.SerializeToString())
        file.flush()
        outputs = _session(Path(file.name)).run(watched, fed)
    found = fed | dict(zip(watched, outputs, strict=True))
    wanted, got = [], []
    for name, (x, y) in products.items():
        layer = layers[name]
        with torch.no_grad():
            wanted.append(F.linear(layer.rounded(torch.from_numpy(found[x])), layer.dequantised()))
        got.append(found[y])
    row = compare(signature.name, f"{len(products)} FP8 products", wanted, got)
    expected = sum(f"{name}.weight" in {t.name for t in model.graph.initializer} for name in layers)
    return row._replace(ok=row.ok and 0 < len(products) == expected)


def _weight_of(product: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> str:
    """Return the FP8 constant behind a MatMul; "" if there is none.

    MatMul <- Transpose <- DequantizeLinear <- constant
    """
    turned = makers.get(product.input[1])
    if turned is None or turned.op_type != "Transpose":
        return ""
    scaled = makers.get(turned.input[0])
    if scaled is None or scaled.op_type != "DequantizeLinear":
        return ""
    return str(scaled.input[0])


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # else Q/DQ pairs move through the graph, and round twice
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
