"""Build ONNX Runtime's engines: lower the graphs, quantise them, find the best threads.

Caches are written in place. int8 has dynamic linears and a statically calibrated decoder, and is
compared with fp32. A bundle in fp8 gets only an fp8 engine, computed in fp32 between the
roundings. It shows what FP8 costs in pictures, and is not fast.
"""

import contextlib
import itertools
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aapt_deploy.backends.cpu import SAFE_WEIGHT_BITS, WEIGHT_BITS, adds_int8_exactly, cores
from aapt_deploy.backends.ort import lower
from aapt_deploy.backends.ort.engine import BACKEND, OrtEngine, OrtEngines, Threads
from aapt_deploy.backends.table import open_engines
from aapt_deploy.backends.trial import (
    BuildOptions,
    Built,
    Report,
    left_and_right,
    mean_psnr_db,
    median_step_ms,
)
from aapt_deploy.bundle.bundle import Bundle, Stage, export_again
from aapt_deploy.bundle.graph_file import load_model, refuse_other, save_model
from aapt_deploy.models.family import family_of
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.engine import Engines, Tapped
from aapt_deploy.rollout.starts import Start, all_starts

CALIBRATION_BLOCKS = 8  # per start frame
LINEAR_PATH = ".decoder.linear."  # in the names of its weights


def build(bundle: Bundle, precisions: Sequence[str], options: BuildOptions) -> list[Built]:
    """Build the engines of `precisions`.

    fp32 is built before int8, which is calibrated on it and compared with it. Raises BusyError
    if another build has locked the bundle, BundleError for a damaged bundle.
    """
    has_fp32 = "fp32" in precisions or f"{BACKEND}-fp32" in bundle.engines
    if "int8" in precisions and not has_fp32:
        precisions = ("fp32", *precisions)
    return [_build(bundle, precision, options.report) for precision in precisions]


def _build(bundle: Bundle, precision: str, report: Report) -> Built:
    key, began = f"{BACKEND}-{precision}", time.monotonic()
    with bundle.add_engine(key) as stage:
        starts = all_starts(bundle)
        report(f"{key}: lowering the graphs")
        graphs = _lower(bundle, stage, precision, starts, report)
        named = lambda text: report(f"{key}: {text}")
        threads, step_ms = _tune(bundle.profile, graphs, precision, starts[0], named)
        engines, psnr = OrtEngines(bundle.profile, graphs, threads, precision), None
        if precision != "fp32":
            report(f"{key}: comparing with fp32")
            reference = _reference(bundle, precision, report)
            psnr = mean_psnr_db(reference, engines, bundle.profile, starts)
            reference.close()
        engines.close()
        built = Built(
            key, round(step_ms, 2), stage.size, threads.count, threads.spinning, psnr,
            round(time.monotonic() - began, 1),
        )  # fmt: skip
        stage.entry |= {
            "backend": BACKEND, "precision": precision, "cache_layout": "token_major",
            "graphs": {name: f"{stage.relative}/{path.name}" for name, path in graphs.items()},
        }  # fmt: skip
        if precision == "int8":
            # Opening an engine reads this.
            stage.entry["weight_bits"] = WEIGHT_BITS if adds_int8_exactly() else SAFE_WEIGHT_BITS
        stage.entry |= asdict(built)
    return built


def _reference(bundle: Bundle, precision: str, report: Report) -> Engines:
    """Return what an engine is compared with: fp32, or torch for a bundle without fp32 graphs."""
    if precision == "int8":
        return open_engines(bundle, BACKEND, "fp32", report)
    from aapt_deploy.backends import torch_eager

    return torch_eager.EagerEngines(torch_eager.checkpoint_of(bundle), cores(), "fp32")


def _lower(
    bundle: Bundle, stage: Stage, precision: str, starts: list[Start], report: Report
) -> dict[str, Path]:
    """Write the backend's form of every graph below `stage.path`."""
    profile, graphs = bundle.profile, {}
    for name, signature in family_of(profile).signatures(profile).items():
        source, graphs[name] = bundle.checked(f"{name}.onnx"), stage.path / f"{name}.onnx"
        weights = f"{name}.onnx.data"
        if (bundle.path / weights).exists() or weights in bundle.manifest["files"]:
            bundle.checked(weights)
        model = load_model(source, bundle.listed_bytes(weights))
        refuse_other(model, signature, source, export_again(bundle.path))
        if name == "generator":
            model = lower.lower_in_place(model, Ring.of(profile, in_place=True))
        save_model(model, graphs[name])  # not a copy of the file: its weights may lie beside it
    if precision == "int8":
        report("onnxruntime-int8: quantising the linear layers")
        _quantise_linears(graphs["generator"])
        report("onnxruntime-int8: calibrating the decoder on its own rollouts")
        _quantise_decoder(graphs["decoder"], list(_decoder_inputs(bundle, starts, report)))
    return graphs


def _quantise_linears(path: Path) -> None:
    """Quantise weights to int8. Activations are quantised at run time; attention stays fp32."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet(), _in_float(path) as source:
        quantize_dynamic(
            source, path, op_types_to_quantize=["MatMul"], per_channel=True,
            weight_type=QuantType.QInt8, reduce_range=not adds_int8_exactly(),
            extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip


def _quantise_decoder(path: Path, samples: list[dict[str, np.ndarray]]) -> None:
    """Quantise convolutions to int8 (QDQ), calibrated on `samples`.

    These are the latents and memories of the bundle's own rollouts in fp32. The linear path
    stays in float. It makes nearly all of the picture for a few percent of the products, and
    pictures that are darker than the start frames would leave its calibrated range
    (docs/log.md).
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    with _quiet(), _in_float(path) as source:
        nodes = load_model(source).graph.node
        linear = [n.name for n in nodes if any(LINEAR_PATH in name for name in n.input)]
        quantize_static(
            source, path, Samples(samples), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv"], reduce_range=not adds_int8_exactly(),
            nodes_to_exclude=linear, extra_options={"CalibMovingAverage": True},
        )  # fmt: skip


@contextlib.contextmanager
def _in_float(path: Path) -> Iterator[Path]:
    """Move the graph at `path`, and weights beside it, away; remove them at the end."""
    folder = path.with_suffix("")
    folder.mkdir()
    for file in (path, path.with_name(f"{path.name}.data")):
        if file.exists():
            file.rename(folder / file.name)
    yield folder / path.name
    shutil.rmtree(folder)


class Samples:
    """Input sets as onnxruntime's CalibrationDataReader returns them."""

    def __init__(self, samples: list[dict[str, np.ndarray]]) -> None:
        self.rest = iter(samples)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rest, None)


def _decoder_inputs(
    bundle: Bundle, starts: list[Start], report: Report
) -> Iterator[dict[str, np.ndarray]]:
    """Yield every input set that the fp32 decoder gets in short rollouts."""
    engines, seen = open_engines(bundle, BACKEND, "fp32", report), list[dict[str, np.ndarray]]()
    decoder = engines["decoder"]
    assert isinstance(decoder, OrtEngine)
    for start in starts:
        tapped = Tapped(engines, partial(_record, decoder, seen))
        frames = left_and_right(tapped, bundle.profile, start)
        for _ in itertools.islice(frames, 1 + CALIBRATION_BLOCKS):
            yield from seen
            seen.clear()
    engines.close()


def _record(
    decoder: OrtEngine, seen: list[dict[str, np.ndarray]],
    graph: str, method: str, call: Callable[..., Any], inputs: dict[str, Any],
) -> Any:  # fmt: skip
    """Record every input set of the decoder, its memory included (a tap)."""
    if (graph, method) == ("decoder", "run"):
        memory = {name: array.copy() for name, array in decoder.memory.items()}
        seen.append({"latent": np.array(inputs["latent"], np.float32), **memory})
    return call(**inputs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop the advice that onnxruntime.quantization logs through the root logger."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _tune(
    profile: Profile, graphs: dict[str, Path], precision: str, start: Start, report: Report
) -> tuple[Threads, float]:
    """Return the fastest thread setting and its median step."""
    results: dict[Threads, float] = {}
    counts = sorted({1, min(2, cores()), cores()})
    settings = [Threads(count, spinning) for count in counts for spinning in (False, True)]
    for threads in (one for one in settings if one.count > 1 or not one.spinning):
        engines = OrtEngines(profile, graphs, threads, precision)
        results[threads] = median_step_ms(engines, profile, start)
        engines.close()
        setting = f"thread{'s' * (threads.count > 1)}{', spinning' * threads.spinning}"
        report(f"{threads.count} {setting}: {results[threads]:.1f} ms a step")
    best = min(results, key=lambda threads: results[threads])
    return best, results[best]
