"""How far an exported graph in ONNX Runtime is from the PyTorch module that it came from.

A graph in float32 is compared as a whole, and to the last digits. In FP8 a sum that falls on the edge of two e4m3 codes may round either way,
6 to 12 % apart, and what follows differs by that: two right graphs are some hundredths apart. So a graph in FP8 is compared as a whole for gross
mistakes, and each of its FP8 products alone, on the very input that ONNX Runtime had there, to the last digits.
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
from aapt_deploy.models.aapt.graphs import random_inputs
from aapt_deploy.models.fp8 import Linear8
from aapt_deploy.profiles import Profile

FP32_TOLERANCE = 2e-4  # largest difference relative to the output's largest value; fp32 graphs differ by about 1e-6
FP8_TOLERANCE = 0.1  # root mean square, relative to the output's; the demo's is 0.03 apart, and 0.05 from float32
PIXEL_TOLERANCE = 1  # of 255: a value on the edge of two may round either way


class Parity(NamedTuple):
    """How far one graph in ONNX Runtime is from PyTorch."""

    graph: str
    case: str
    error: float  # largest absolute difference over all outputs
    relative: float  # relative to the output: of the largest values; in FP8, of root mean squares
    ok: bool


def parity_cases(signature: GraphSignature, profile: Profile) -> list[tuple[str, int]]:
    """(name, valid cache tokens) of the inputs that a graph is checked on."""
    if signature.name != "generator":
        return [("random", 0)]
    return [
        ("empty cache", profile.text.tokens),
        ("half-full cache", profile.cache_tokens // 2),
        ("full cache", profile.cache_tokens),
    ]


def check_parity(
    path: Path, module: nn.Module, signature: GraphSignature, profile: Profile, in_fp8: bool = False
) -> list[Parity]:
    """Run one exported graph in ONNX Runtime and in PyTorch on the same random inputs."""
    session = _session(path)
    specs = [*signature.inputs, *signature.state]
    rows = []
    for seed, (case, cache_len) in enumerate(parity_cases(signature, profile), start=1):
        inputs = random_inputs([(s.name, s.shape, s.dtype) for s in specs], seed, cache_len)
        with torch.no_grad():
            wanted = module(*inputs)
        got = session.run(None, {s.name: x.numpy() for s, x in zip(specs, inputs, strict=True)})
        rows.append(
            compare(
                signature.name,
                case,
                list(wanted) if isinstance(wanted, tuple) else [wanted],
                got,
                in_fp8,
            )
        )
    return rows


def compare(
    graph: str, case: str, wanted: list[Tensor], got: list[np.ndarray], in_fp8: bool = False
) -> Parity:
    """Differences between two sets of outputs; uint8 pictures may differ by PIXEL_TOLERANCE, numbers by FP32_TOLERANCE of their range, and those
    of a graph in FP8 by FP8_TOLERANCE of their root mean square."""
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
    """Each FP8 product of a graph against PyTorch, on the input that it has in ONNX Runtime; a full cache where there is one."""
    model = onnx.load(path, load_external_data=False)
    makers = {name: node for node in model.graph.node for name in node.output}
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, Linear8)}
    products: dict[
        str, tuple[str, str]
    ] = {}  # layer -> its input before Q, its output before the bias
    for node in model.graph.node:
        if (
            node.op_type == "MatMul"
            and (name := _weight_of(node, makers).removesuffix(".weight")) in layers
        ):
            products[name] = (makers[makers[node.input[0]].input[0]].input[0], node.output[0])
    inputs = {value.name for value in model.graph.input}
    watched = sorted(
        {name for pair in products.values() for name in pair}
        - {value.name for value in model.graph.output}
        - inputs
    )
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in watched
    )
    specs = [*signature.inputs, *signature.state]
    fed = random_inputs([(s.name, s.shape, s.dtype) for s in specs], 0, profile.cache_tokens)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, suffix=".onnx"
    ) as file:  # beside the graph, whose external data it shares
        file.write(model.SerializeToString())
        file.flush()
        found = dict(
            zip(
                watched,
                _session(Path(file.name)).run(
                    watched, {s.name: x.numpy() for s, x in zip(specs, fed, strict=True)}
                ),
                strict=True,
            )
        )
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
    """The FP8 constant behind a MatMul: MatMul <- Transpose <- DequantizeLinear <- constant. "" where there is none."""
    turned = makers.get(product.input[1])
    scaled = (
        makers.get(turned.input[0])
        if turned is not None and turned.op_type == "Transpose"
        else None
    )
    return (
        str(scaled.input[0]) if scaled is not None and scaled.op_type == "DequantizeLinear" else ""
    )


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.disable_quant_qdq", "1"
    )  # or Q/DQ pairs wander through the graph, and round twice
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
