"""Checkpoint -> bundle: every graph as ONNX, each proved equal to PyTorch before the bundle exists.

The graphs are portable: opset 24, BlockCausalAttention as a node of domain `aapt` with its meaning attached as a local function. What suits a
backend best is `build`'s business.
"""

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from aapt_deploy import __version__, bundle
from aapt_deploy.errors import ParityError
from aapt_deploy.graph_file import save_model
from aapt_deploy.models.checkpoint import Checkpoint
from aapt_deploy.models.graphs import graph_modules, random_inputs
from aapt_deploy.ops.block_causal_attention import onnx_function
from aapt_deploy.profiles import Profile
from aapt_deploy.signature import NEXT, GraphSignature, signatures
from aapt_deploy.video import write_image

FP32_TOLERANCE = 2e-4  # largest difference relative to the output's largest value; fp32 graphs differ by about 1e-6
PIXEL_TOLERANCE = 1  # of 255: a value on the edge of two may round either way

Report = Callable[[str], None]


class Parity(NamedTuple):
    """How far one graph in ONNX Runtime is from PyTorch."""

    graph: str
    case: str
    error: float  # largest absolute difference over all outputs
    relative: float  # the same, relative to the largest value of the output
    ok: bool


def export_bundle(checkpoint: Checkpoint, folder: Path, overwrite: bool, report: Report) -> list[Parity]:
    """Export every graph of `checkpoint` into a new bundle at `folder`. Returns the parity table.

    Raises ParityError, and leaves nothing behind, when a graph disagrees with PyTorch; OutputError when `folder` cannot be written.
    """
    profile = checkpoint.profile
    modules = graph_modules(profile, checkpoint.generator, checkpoint.vae)
    table: list[Parity] = []
    with bundle.create(folder, profile, overwrite=overwrite) as draft:
        for name, signature in signatures(profile).items():
            report(f"exporting {name}")
            path = draft.path / f"{name}.onnx"
            model = to_onnx(modules[name], signature, profile)
            _describe(model, checkpoint)
            save_model(model, path)
            report(f"checking {name} against PyTorch")
            table += check_parity(path, modules[name], signature, profile)
        bad = [row for row in table if not row.ok]
        if bad:
            rows = "; ".join(f"{row.graph} ({row.case}) differs by {row.error:.2e}" for row in bad)
            raise ParityError(
                f"exported graphs disagree with PyTorch: {rows}", "report this with the checkpoint's profile; the bundle was not written"
            )
        shutil.copyfile(checkpoint.path, draft.path / bundle.Bundle.CHECKPOINT)
        (draft.path / "start").mkdir()
        for name, frame in checkpoint.start_frames.items():
            write_image(draft.path / "start" / f"{name}.png", frame.image.numpy())
        draft.manifest["start_frames"] = {name: frame.prompt for name, frame in checkpoint.start_frames.items()}
        draft.manifest["source"] = {"checkpoint": checkpoint.path.name, "sha256": checkpoint.sha256}
        draft.manifest["precision"] = "fp32"
        draft.manifest["cache_layout"] = "token_major"
        draft.manifest["versions"] = {"aapt_deploy": __version__, "torch": torch.__version__.split("+")[0], "onnx": onnx.__version__}
        draft.manifest["parity"] = [row._asdict() for row in table]
    return table


def to_onnx(module: nn.Module, signature: GraphSignature, profile: Profile) -> onnx.ModelProto:
    """Trace one graph with static shapes. Inputs are the signature's inputs, then its state; outputs likewise."""
    specs = [*signature.inputs, *signature.state]
    example = random_inputs([(s.name, s.shape, s.dtype) for s in specs], seed=0, cache_len=profile.cache_tokens)
    recurrent = [s.name + NEXT for s in signature.state] if signature.name == "decoder" else []
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module, tuple(example), dynamo=True, opset_version=onnx_function.OPSET, verbose=False,
            input_names=[s.name for s in specs], output_names=[*(s.name for s in signature.outputs), *recurrent],
        )  # fmt: skip
    assert program is not None, "torch.onnx.export returned nothing"
    model = program.model_proto
    return onnx_function.attach(model) if signature.name == "generator" else model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter talks to both streams and warns about its own internals; none of it is about the user's checkpoint."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _describe(model: onnx.ModelProto, checkpoint: Checkpoint) -> None:
    """Replace the exporter's notes, stack traces with this machine's paths among them, by ours."""
    for graph in (model.graph, *model.functions):
        values = (*graph.input, *graph.output) if isinstance(graph, onnx.GraphProto) else ()
        for item in (graph, *graph.node, *graph.value_info, *values):
            item.ClearField("metadata_props")
    facts = {"aapt.version": __version__, "aapt.profile": checkpoint.profile.name, "aapt.checkpoint_sha256": checkpoint.sha256}
    model.producer_name, model.producer_version = "aapt_deploy", __version__
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=value)


def parity_cases(signature: GraphSignature, profile: Profile) -> list[tuple[str, int]]:
    """(name, valid cache tokens) of the inputs that a graph is checked on."""
    if signature.name != "generator":
        return [("random", 0)]
    return [("empty cache", profile.text.tokens), ("half-full cache", profile.cache_tokens // 2), ("full cache", profile.cache_tokens)]


def check_parity(path: Path, module: nn.Module, signature: GraphSignature, profile: Profile) -> list[Parity]:
    """Run one exported graph in ONNX Runtime and in PyTorch on the same random inputs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    specs = [*signature.inputs, *signature.state]
    rows = []
    for seed, (case, cache_len) in enumerate(parity_cases(signature, profile), start=1):
        inputs = random_inputs([(s.name, s.shape, s.dtype) for s in specs], seed, cache_len)
        with torch.no_grad():
            wanted = module(*inputs)
        got = session.run(None, {s.name: x.numpy() for s, x in zip(specs, inputs, strict=True)})
        rows.append(compare(signature.name, case, list(wanted) if isinstance(wanted, tuple) else [wanted], got))
    return rows


def compare(graph: str, case: str, wanted: list[Tensor], got: list[np.ndarray]) -> Parity:
    """Differences between two sets of outputs; uint8 pictures may differ by PIXEL_TOLERANCE, numbers by FP32_TOLERANCE of their range."""
    error = relative = 0.0
    ok = len(wanted) == len(got)
    for want, have in zip(wanted, got, strict=True):
        difference = float(np.abs(want.numpy().astype(np.float64) - have.astype(np.float64)).max())
        largest = max(float(np.abs(want.numpy().astype(np.float64)).max()), 1e-9)
        error, relative = max(error, difference), max(relative, difference / largest)
        within = difference <= PIXEL_TOLERANCE if want.dtype == torch.uint8 else difference <= FP32_TOLERANCE * largest
        ok = ok and within and have.shape == tuple(want.shape) and bool(np.isfinite(have).all())
    return Parity(graph, case, error, relative, ok)
