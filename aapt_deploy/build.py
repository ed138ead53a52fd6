"""Bundle -> engine: lower the portable graphs to what a backend runs best, measure it, and record both in the bundle.

    onnxruntime   caches written in place; fp32, and int8 with dynamic linears and a statically calibrated decoder; of a bundle in fp8 only that,
                  computed in fp32 between the roundings: to see what FP8 costs in pictures, not to be fast
    torch         the checkpoint's own modules, eager; the reference, in fp32, and on demand in bf16, which FP8 is compared with
    tensorrt      build_tensorrt.py

Each engine is run and compared with the fp32 engine before it joins the bundle.
"""

import contextlib
import importlib
import itertools
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aapt_deploy.bundle import Bundle, Stage, export_again
from aapt_deploy.camera import CRUISE, Velocity
from aapt_deploy.engine import Engine, Engines, buildable, open_engines, refuse_unknown
from aapt_deploy.engine.ort import OrtEngine, OrtEngines, Threads
from aapt_deploy.errors import MachineError, UsageError
from aapt_deploy.graph_file import load_model, refuse_other, save_model
from aapt_deploy.machine import SAFE_WEIGHT_BITS, WEIGHT_BITS, adds_int8_exactly, cores
from aapt_deploy.ops.block_causal_attention import Ring, onnx_function
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout import Steering, rollout
from aapt_deploy.signature import signatures
from aapt_deploy.starts import Start, all_starts

BUILT = ("onnxruntime", "torch")  # the backends of this module
ON_DEMAND = "bf16"  # built only when it is named
ELSEWHERE = {"tensorrt": "aapt_deploy.build_tensorrt"}  # backends with a module of their own
TUNING_BLOCKS = 10  # measured for each thread setting
QUALITY_BLOCKS = 6  # compared with fp32: one second
CALIBRATION_BLOCKS = 8  # per start frame
LINEAR_PATH = ".decoder.linear."  # in the names of its weights

Report = Callable[[str], None]


@dataclass(frozen=True)
class Built:
    """What the build measured of one engine."""

    key: str  # "<backend>-<precision>"
    step_ms: float  # median of a whole step
    bytes: int  # of the engine's files
    threads: int
    spinning: bool
    psnr_db: float | None  # frames of the first second against fp32, same seed; None for fp32 itself; tensorrt: against the exported graphs
    seconds: float  # build time


def build_engine(bundle: Bundle, backend: str, precision: str | None, report: Report, attention: str = "auto") -> list[Built]:
    """Build the engines of `backend`: one precision, or all it has. `attention` chooses among the forms of the TensorRT backend.

    Raises UsageError for an unknown backend or precision, BusyError when another build holds the bundle, BundleError for a damaged bundle.
    """
    if backend in ELSEWHERE:
        built: list[Built] = importlib.import_module(ELSEWHERE[backend]).build(bundle, precision, attention, report)
        return built
    if backend not in BUILT:
        raise UsageError(f"backend {backend!r} cannot be built", f"backends: {', '.join((*BUILT, *ELSEWHERE))}")
    if attention != "auto":
        raise UsageError(f"--attention is for {', '.join(ELSEWHERE)}, not for {backend}", "leave it out")
    refuse_unknown(backend, precision)
    possible = buildable(bundle, backend)
    wanted = tuple(name for name in possible if name != ON_DEMAND) if precision is None else (precision,)
    if not set(wanted) <= set(possible):
        graphs = bundle.manifest.get("precision", "fp32")
        raise UsageError(
            f"bundle {bundle.path} holds graphs in {graphs}; {backend} builds {' and '.join(possible)} from them, not {precision}",
            f"export another bundle with: aapt export CKPT -o OTHER --precision {'fp8' if precision == 'fp8' else 'fp32'}",
        )
    if bundle.profile.target.device != "cpu":
        target = bundle.profile.target.name
        raise MachineError(
            f"profile {bundle.profile.name} is for {target}; {backend} runs on the CPU only", "use a CPU profile, or build on its target"
        )
    if "int8" in wanted and "fp32" not in wanted and f"{backend}-fp32" not in bundle.engines:
        wanted = ("fp32", *wanted)  # int8 is calibrated on it and compared with it
    return [_build_one(bundle, backend, name, report) for name in wanted]


def _build_one(bundle: Bundle, backend: str, precision: str, report: Report) -> Built:
    key, began = f"{backend}-{precision}", time.monotonic()
    entry: dict[str, Any] = {"backend": backend, "precision": precision, "cache_layout": "token_major"}
    with bundle.add_engine(key) as stage:
        starts = all_starts(bundle)
        if backend == "torch":
            engines, threads = _open_torch(bundle, precision), Threads(cores(), spinning=False)
            step_ms = median_step_ms(engines, bundle.profile, starts[0])
        else:
            report(f"{key}: lowering the graphs")
            graphs = _lower(bundle, stage, precision, starts, report)
            if precision == "int8":
                entry["weight_bits"] = WEIGHT_BITS if adds_int8_exactly() else SAFE_WEIGHT_BITS  # read where the engine is opened
            entry["graphs"] = {name: f"{stage.relative}/{path.name}" for name, path in graphs.items()}
            threads, step_ms = _tune(bundle.profile, graphs, precision, starts[0], lambda text: report(f"{key}: {text}"))
            engines = OrtEngines(bundle.profile, graphs, threads, precision)
        psnr = None
        if precision != "fp32":
            report(f"{key}: comparing with fp32")
            reference = open_engines(bundle, backend, "fp32") if precision == "int8" else _open_torch(bundle, "fp32")
            psnr = round(float(np.mean([psnr_db(reference, engines, bundle.profile, start) for start in starts])), 2)
            reference.close()
        engines.close()
        size = sum(path.stat().st_size for path in stage.path.rglob("*") if path.is_file())
        built = Built(key, round(step_ms, 2), size, threads.count, threads.spinning, psnr, round(time.monotonic() - began, 1))
        stage.entry |= entry | asdict(built)
    return built


def _open_torch(bundle: Bundle, precision: str) -> Engines:
    from aapt_deploy.engine.eager import EagerEngines, checkpoint_of

    return EagerEngines(checkpoint_of(bundle), cores(), precision)


# ONNX Runtime


def _lower(bundle: Bundle, stage: Stage, precision: str, starts: list[Start], report: Report) -> dict[str, Path]:
    """Write the backend's form of every graph below `stage.path`."""
    profile, graphs = bundle.profile, {}
    for name, signature in signatures(profile).items():
        source, graphs[name] = bundle.checked(f"{name}.onnx"), stage.path / f"{name}.onnx"
        if (bundle.path / f"{name}.onnx.data").exists() or f"{name}.onnx.data" in bundle.manifest["files"]:
            bundle.checked(f"{name}.onnx.data")
        model = load_model(source)
        refuse_other(model, signature, source, export_again(bundle.path))
        if name == "generator":
            model = onnx_function.lower_in_place(model, Ring.of(profile, in_place=True))
        save_model(model, graphs[name])  # not a copy of the file: its weights may lie beside it
    if precision == "int8":
        report("onnxruntime-int8: quantising the linear layers")
        _quantise_linears(graphs["generator"])
        report("onnxruntime-int8: calibrating the decoder on its own rollouts")
        _quantise_decoder(graphs["decoder"], list(_decoder_inputs(bundle, starts)))
    return graphs


def _quantise_linears(path: Path) -> None:
    """int8 weights, activations quantised as they come: no calibration, and attention stays fp32."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet(), _in_float(path) as source:
        quantize_dynamic(
            source, path, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8, reduce_range=not adds_int8_exactly(),
            extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip


def _quantise_decoder(path: Path, samples: list[dict[str, np.ndarray]]) -> None:
    """int8 convolutions (QDQ), calibrated on `samples`: the latents and memories of the bundle's own rollouts in fp32.

    The linear path stays in float: it makes nearly all of the picture, for a few percent of the products, and pictures that are darker than the
    start frames would leave its calibrated range (docs/log.md).
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    with _quiet(), _in_float(path) as source:
        quantize_static(
            source, path, Samples(samples), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, op_types_to_quantize=["Conv"], reduce_range=not adds_int8_exactly(),
            nodes_to_exclude=[node.name for node in load_model(source).graph.node if any(LINEAR_PATH in name for name in node.input)],
            extra_options={"CalibMovingAverage": True},
        )  # fmt: skip


@contextlib.contextmanager
def _in_float(path: Path) -> Iterator[Path]:
    """The graph at `path`, moved out of its quantised version's way, with the weights beside it if it has any; gone at the end."""
    folder = path.with_suffix("")
    folder.mkdir()
    for file in (path, path.with_name(f"{path.name}.data")):
        if file.exists():
            file.rename(folder / file.name)
    yield folder / path.name
    shutil.rmtree(folder)


class Samples:
    """Input sets as the calibrator reads them (onnxruntime's CalibrationDataReader asks for `get_next` alone)."""

    def __init__(self, samples: list[dict[str, np.ndarray]]) -> None:
        self.rest = iter(samples)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rest, None)


class Recorder:
    """A decoder that notes every input set it is given, its memory included."""

    def __init__(self, engine: OrtEngine, seen: list[dict[str, np.ndarray]]) -> None:
        self.engine, self.seen = engine, seen

    def reset(self, **state: np.ndarray) -> None:
        self.engine.reset(**state)

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        memory = {name: array.copy() for name, array in self.engine.memory.items()}
        self.seen.append({"latent": np.array(inputs["latent"], np.float32), **memory})
        return self.engine.run(**inputs)

    def commit(self, block: int) -> None:
        self.engine.commit(block)


class RecordedEngines:
    """Engines whose decoder's input sets gather in `seen`."""

    def __init__(self, engines: Engines) -> None:
        self.engines = engines
        self.backend, self.precision, self.overlapped = engines.backend, engines.precision, False
        self.seen: list[dict[str, np.ndarray]] = []

    def __getitem__(self, graph: str) -> Engine:
        engine = self.engines[graph]
        return Recorder(engine, self.seen) if graph == "decoder" and isinstance(engine, OrtEngine) else engine

    def close(self) -> None:
        self.engines.close()


def _decoder_inputs(bundle: Bundle, starts: list[Start]) -> Iterator[dict[str, np.ndarray]]:
    """Every input set that the fp32 decoder sees in short rollouts."""
    engines = RecordedEngines(open_engines(bundle, "onnxruntime", "fp32"))
    for start in starts:
        for _ in itertools.islice(_rollout(engines, bundle.profile, start), 1 + CALIBRATION_BLOCKS):
            yield from engines.seen
            engines.seen.clear()
    engines.close()


class _quiet:
    """onnxruntime.quantization logs advice through the root logger; none of it is for the user."""

    def __enter__(self) -> None:
        logging.disable(logging.WARNING)

    def __exit__(self, *error: object) -> None:
        logging.disable(logging.NOTSET)


def _tune(profile: Profile, graphs: dict[str, Path], precision: str, start: Start, report: Report) -> tuple[Threads, float]:
    """The fastest thread setting and its median step."""
    results: dict[Threads, float] = {}
    counts = sorted({1, min(2, cores()), cores()})
    for threads in [Threads(count, spinning) for count in counts for spinning in (False, True) if count > 1 or not spinning]:
        engines = OrtEngines(profile, graphs, threads, precision)
        results[threads] = median_step_ms(engines, profile, start)
        engines.close()
        report(f"{threads.count} thread{'s' * (threads.count > 1)}{', spinning' * threads.spinning}: {results[threads]:.1f} ms a step")
    best = min(results, key=lambda threads: results[threads])
    return best, results[best]


# Measuring


def _rollout(engines: Engines, profile: Profile, start: Start, seed: int = 0) -> Iterator[np.ndarray]:
    """A rollout that turns left and right, so that quality and calibration see motion."""
    return rollout(
        engines, profile, start.image, lambda block: Steering(Velocity(CRUISE.forward, yaw=0.2 * (1 - 2 * (block // 4 % 2))), start.text), seed
    )


def median_step_ms(engines: Engines, profile: Profile, start: Start) -> float:
    """Median time from one block's frames to the next."""
    frames = _rollout(engines, profile, start)
    next(frames)
    next(frames)  # the first block also encodes the prompt
    times = []
    for _ in range(TUNING_BLOCKS):
        before = time.perf_counter()
        next(frames)
        times.append(time.perf_counter() - before)
    return 1000 * float(np.median(times))


def psnr_db(reference: Engines, engines: Engines, profile: Profile, start: Start) -> float:
    """PSNR of the first second's frames between two engines, same start and seed."""
    pairs = zip(_rollout(reference, profile, start), _rollout(engines, profile, start), strict=False)
    errors = [np.square(a.astype(np.float64) - b).mean() for a, b in itertools.islice(pairs, 1, 1 + QUALITY_BLOCKS)]
    return float(10 * np.log10(255**2 / max(np.mean(errors), 1e-9)))
