"""Export a checkpoint into a bundle: ONNX graphs, each proved equal to PyTorch first.

The graphs are portable: opset 24, BlockCausalAttention as a node of domain `aapt` with its meaning
attached as a local function. `build` chooses what suits a backend best. With scales, the linear
layers that have some are in FP8, between standard Q/DQ nodes.

Memory: a graph is traced with hollow weights, which take none, then written weight by weight from
the checkpoint's file. Only the check needs the weights of one graph twice, in PyTorch and in ONNX
Runtime, and its activations. If the machine lacks the room, a copy of the graph with two blocks,
the first and the last, is checked instead, or the VAE on a small picture. The table names it.
"""

import contextlib
import dataclasses
import io
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from onnxscript import optimizer
from torch import Tensor, nn

from aapt_deploy import __version__
from aapt_deploy.backends.trial import Report
from aapt_deploy.bundle import bundle, graph_file, scales
from aapt_deploy.bundle.files import free_memory_bytes
from aapt_deploy.bundle.scales import Scales
from aapt_deploy.bundle.signature import GraphSignature
from aapt_deploy.errors import InputError, ParityError
from aapt_deploy.export.parity import Parity, check_parity, check_products
from aapt_deploy.models import checkpoint as checkpoints
from aapt_deploy.models import cost, fp8
from aapt_deploy.models.checkpoint import Stored
from aapt_deploy.models.family import family_of
from aapt_deploy.models.inputs import random_inputs
from aapt_deploy.ops.block_causal_attention import NEXT, onnx_function
from aapt_deploy.profiles import Profile
from aapt_deploy.video.pictures import write_image

# Bytes of memory that a check takes for each byte of a graph's weights in fp32: PyTorch, ONNX
# Runtime, its repacked copy.
ROOM = 3.5
SMALL_TOKENS = 4  # on each side of the picture that a large VAE is checked on


@dataclass(frozen=True)
class Weights:
    """The weights of a graph, by their names in it, from a checkpoint's file.

    Those of linear layers with scales are in e4m3.
    """

    stored: Stored
    scales: Scales | None
    # of a graph with fewer blocks: its block -> the checkpoint's
    blocks: dict[int, int] = dataclasses.field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        place = lambda m: f"{m[1]}{self.blocks.get(int(m[2]), int(m[2]))}"
        stacks = "|".join(family_of(self.stored.profile).stacks)
        source = re.sub(rf"^(generator\.(?:{stacks})\.)(\d+)", place, name)
        value = self.stored.tensor(source)
        path = source.removeprefix("generator.").removesuffix(".weight")
        own = self.scales.linear.get(path) if self.scales and source.endswith(".weight") else None
        return fp8.encode_weight(value, own) if own else value


def export_bundle(
    checkpoint: Stored,
    folder: Path,
    overwrite: bool,
    report: Report,
    fp8_scales: Scales | None = None,
) -> list[Parity]:
    """Export every graph of `checkpoint` into a new bundle. Return the parity table.

    Raises ParityError, and leaves nothing behind, if a graph disagrees with PyTorch.
    Raises OutputError if `folder` cannot be written.
    Raises InputError if the scales are of other layers.
    """
    profile = checkpoint.profile
    weights = Weights(checkpoint, fp8_scales)
    table: list[Parity] = []
    with bundle.create(folder, profile, overwrite=overwrite) as draft:
        modules = hollow_graphs(profile, fp8_scales)
        for name, signature in family_of(profile).signatures(profile).items():
            report(f"exporting {name}")
            path = draft.path / f"{name}.onnx"
            model = to_onnx(modules[name], signature, profile)
            _describe(model, checkpoint)
            used = _write(model, path, modules[name], weights)
            report(f"checking {name} against PyTorch")
            count = sum(modules[name].state_dict()[n].numel() for n in used)
            needed = ROOM * 4 * count + activation_bytes(profile, name)
            if needed > free_memory_bytes():
                size = f"{name} would take {needed / 1e9:.0f} GB to check"
                report(f"{size}; a smaller copy takes its place")
                table += _check_reduced(draft.path, signature.name, profile, weights)
            else:
                table += _check_whole(path, modules[name], signature, profile, used, weights)
        bad = [row for row in table if not row.ok]
        if bad:
            rows = "; ".join(f"{row.graph} ({row.case}) differs by {row.error:.2e}" for row in bad)
            raise ParityError(
                f"exported graphs disagree with PyTorch: {rows}",
                "report this with the checkpoint's profile; the bundle was not written",
            )
        _finish(draft, checkpoint, table, fp8_scales)
    return table


def _finish(
    draft: bundle.Draft, checkpoint: Stored, table: list[Parity], fp8_scales: Scales | None
) -> None:
    """Write what belongs to a bundle beside its graphs."""
    shutil.copyfile(checkpoint.path, draft.path / bundle.Bundle.CHECKPOINT)
    (draft.path / "start").mkdir()
    for name, frame in checkpoint.start_frames.items():
        write_image(draft.path / "start" / f"{name}.png", frame.image.numpy())
    if fp8_scales:
        scales.save(fp8_scales, draft.path / scales.FILE)
    draft.manifest["start_frames"] = {
        name: frame.prompt for name, frame in checkpoint.start_frames.items()
    }
    draft.manifest["source"] = {"checkpoint": checkpoint.path.name, "sha256": checkpoint.sha256}
    draft.manifest["precision"] = "fp8" if fp8_scales else "fp32"
    draft.manifest["cache_layout"] = "token_major"
    draft.manifest["versions"] = {
        "aapt_deploy": __version__,
        "torch": torch.__version__.split("+")[0],
        "onnx": onnx.__version__,
    }
    draft.manifest["parity"] = [row._asdict() for row in table]


def hollow_graphs(profile: Profile, fp8_scales: Scales | None) -> dict[str, nn.Module]:
    """Return the graphs' modules without weights. Raises InputError if scales do not fit."""
    generator, vae = checkpoints.hollow(profile)
    if fp8_scales:
        try:
            fp8.apply(generator, fp8_scales, quantise=False)
        except ValueError as error:
            raise InputError(
                f"these scales are not of this checkpoint: {error}",
                "calibrate again: leave --scales out",
            ) from None
    return family_of(profile).networks().graph_modules(profile, generator, vae)


def coverage(profile: Profile, fp8_scales: Scales | None) -> list[fp8.Coverage]:
    """Return the share of each graph's operations in FP8; empty without scales."""
    if fp8_scales is None:
        return []
    modules = hollow_graphs(profile, fp8_scales)
    return fp8.coverage(profile, modules, cast("Any", modules["generator"]).generator)


def to_onnx(module: nn.Module, signature: GraphSignature, profile: Profile) -> onnx.ModelProto:
    """Trace one graph with static shapes and hollow weights.

    Inputs are the signature's inputs, then its state; outputs likewise.
    """
    specs = signature.read
    shapes = [(s.name, s.shape, s.dtype) for s in specs]
    example = random_inputs(shapes, seed=0, cache_len=profile.cache_tokens)
    recurrent = [s.name + NEXT for s in signature.state] if signature.name == "decoder" else []
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(example),
            dynamo=True,
            opset_version=onnx_function.OPSET,
            verbose=False,
            optimize=False,
            input_names=[s.name for s in specs],
            output_names=[*(s.name for s in signature.outputs), *recurrent],
        )
        assert program is not None, "torch.onnx.export returned nothing"
        graph = program.model.graph
        names = [name for name in module.state_dict() if name in graph.initializers]
        weights = [graph.initializers.pop(name) for name in names]
        for weight in weights:  # an input while the graph is simplified: it cannot be folded away
            weight.const_value = None
            graph.inputs.append(weight)
        optimizer.optimize(program.model)
    model = program.model_proto
    _hollow_out(model, {weight.name for weight in weights})
    return onnx_function.attach(model) if signature.name == "generator" else model


def _hollow_out(model: onnx.ModelProto, weights: set[str | None]) -> None:
    """Turn the inputs `weights` into hollow constants, without those that nothing reads."""
    graph = model.graph
    read = {name for node in graph.node for name in node.input}
    kept = [value for value in graph.input if value.name in weights]
    for value in kept:
        graph.input.remove(value)
        if value.name in read:
            kind = value.type.tensor_type
            shape = [d.dim_value for d in kind.shape.dim]
            graph.initializer.append(graph_file.hollow(value.name, kind.elem_type, shape))


def _write(model: onnx.ModelProto, path: Path, module: nn.Module, weights: Weights) -> list[str]:
    """Write a graph with its weights. Return their names in the module."""
    names = [tensor.name for tensor in graph_file.hollows(model)]
    # float weights of a MatMul, which engines want as [in, out]
    turned = graph_file.turn_weights(model)

    def read(name: str) -> graph_file.Bytes:
        value = weights.tensor(name)
        value = value.T.contiguous() if name in turned else value.contiguous()
        return value.reshape(-1).view(torch.uint8).numpy()

    graph_file.write(model, path, read)
    return names


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's exporter, which prints to both streams and warns of its internals.

    None of it is about the user's checkpoint.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    to, err = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with warnings.catch_warnings(), to, err:
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _describe(model: onnx.ModelProto, checkpoint: Stored) -> None:
    """Replace the exporter's notes, which have this machine's paths, by ours."""
    for graph in (model.graph, *model.functions):
        values = (*graph.input, *graph.output) if isinstance(graph, onnx.GraphProto) else ()
        for item in (graph, *graph.node, *graph.value_info, *values):
            item.ClearField("metadata_props")
    facts = {
        "aapt.version": __version__,
        "aapt.profile": checkpoint.profile.name,
        "aapt.checkpoint_sha256": checkpoint.sha256,
    }
    model.producer_name, model.producer_version = "aapt_deploy", __version__
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=value)


def _check_whole(
    path: Path, module: nn.Module, signature: GraphSignature, profile: Profile, used: list[str],
    weights: Weights,
) -> list[Parity]:  # fmt: skip
    """Fill the module, compare, and empty it again."""
    shapes = {name: module.state_dict()[name] for name in used}
    for name in used:
        checkpoints.put(module, name, weights.tensor(name))
    try:
        rows = check_parity(path, module, signature, profile, weights.scales is not None)
        if any(isinstance(m, fp8.Linear8) for m in _users(module, used)):
            rows.append(check_products(path, module, signature, profile))
        return rows
    finally:
        for name, empty in shapes.items():
            checkpoints.put(module, name, empty)


def _users(module: nn.Module, used: list[str]) -> Iterator[nn.Module]:
    return (module.get_submodule(name.rpartition(".")[0]) for name in used)


def _check_reduced(folder: Path, graph: str, profile: Profile, weights: Weights) -> list[Parity]:
    """Export and check the graph with its first and its last block alone, or on small pictures.

    The window is one block if attention over the whole one does not fit.
    """
    depth, video, window = profile.model.depth, profile.video, profile.window
    case = f"2 of {depth} blocks"
    if graph in ("encoder", "decoder"):
        side = SMALL_TOKENS * video.spatial_stride * profile.model.patch
        size = {"width": min(side, video.width), "height": min(side, video.height)}
        small = profile.replace(video=dataclasses.replace(video, **size))
        case = f"{size['width']}x{size['height']}"
    else:
        small = profile.replace(model=dataclasses.replace(profile.model, depth=min(2, depth)))
        if activation_bytes(small, graph) > free_memory_bytes():
            one = dataclasses.replace(window, frames=video.block_frames)
            small, case = small.replace(window=one), f"{case}, 1 in the window"
    few = Weights(weights.stored, weights.scales, {1: depth - 1})
    module = hollow_graphs(small, _reduced(weights.scales, small, profile))[graph]
    signature = family_of(small).signatures(small)[graph]
    with tempfile.TemporaryDirectory(prefix=".check-", dir=folder) as scratch:
        path = Path(scratch) / f"{graph}.onnx"
        used = _write(to_onnx(module, signature, small), path, module, few)
        rows = _check_whole(path, module, signature, small, used, few)
    return [row._replace(case=f"{row.case}, {case}") for row in rows]


def activation_bytes(profile: Profile, graph: str) -> int:
    """Estimate the memory of one run in float32, in ONNX Runtime with all scores of attention."""
    bytes_ = cost.live_bytes(profile, graph)
    if graph == "generator":
        scores = profile.block_tokens * (profile.cache_tokens + profile.block_tokens)
        bytes_ += 2 * 4 * profile.model.heads * scores
    return bytes_


def _reduced(whole: Scales | None, small: Profile, profile: Profile) -> Scales | None:
    """Return the scales of the first and the last block, as a generator's with two."""
    if whole is None or small.model.depth == profile.model.depth:
        return whole
    linear, stacks, last = {}, family_of(profile).stacks, profile.model.depth - 1
    for path, own in whole.linear.items():
        stream, index, *rest = [*path.split("."), ""]
        if stream not in stacks:
            linear[path] = own
        elif int(index) in (0, last):
            linear[".".join([stream, str(int(bool(int(index)))), *rest[:-1]])] = own
    return Scales(linear, [whole.attention[0], whole.attention[-1]], whole.metadata)
