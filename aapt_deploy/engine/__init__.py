"""Engines: one compiled graph plus the state that stays on its device.

A backend is one file and one row of BACKENDS; nothing else in the project knows how many there are.
"""

import importlib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from aapt_deploy import console
from aapt_deploy.bundle import Bundle
from aapt_deploy.engine.plan_layers import LayerTime
from aapt_deploy.errors import BundleError, UsageError
from aapt_deploy.machine import LONGEST_MS, WEIGHT_BITS, adds_int8_exactly

BACKENDS = {  # name -> module that opens all graphs of a bundle
    "onnxruntime": "aapt_deploy.engine.ort",
    "torch": "aapt_deploy.engine.eager",
    "torch-cuda": "aapt_deploy.engine.torch_cuda",  # `--backend torch --device cuda`
    "tensorrt": "aapt_deploy.engine.trt",
}
PRECISIONS = {  # what each of them runs in
    "onnxruntime": ("fp32", "int8", "fp8"), "torch": ("fp32", "bf16"), "torch-cuda": ("fp8", "bf16"), "tensorrt": ("fp8", "bf16", "fp32"),
}  # fmt: skip
AS_EXPORTED = ("torch-cuda",)  # run the bundle's checkpoint and scales: nothing is built for them
MOST_THREADS = 1024  # that a manifest may ask for


class Engine(Protocol):
    """One graph with its state.

        generator.reset()
        out = generator.run(noisy=noise, previous=latent, ..., block=block)   # numpy in, numpy out
        generator.commit(block)                                               # keep this block's keys and values

    The arrays `run` returns are the engine's own and are overwritten by its next run.
    """

    def reset(self, **state: np.ndarray) -> None:
        """Empty the state, or set named parts of it: text_k.NN and text_v.NN of a prompt replace the cache's text."""
        ...

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        """One pass. `inputs` are the signature's, except that the generator takes the integer `block` in place of `cache_len`."""
        ...

    def commit(self, block: int) -> None:
        """Keep the last pass as block `block` of the stream; a pass that is not committed leaves no trace. Only generators have blocks."""
        ...


class Engines(Protocol):
    """The open graphs of one bundle."""

    backend: str
    precision: str
    overlapped: bool  # the decoder has a stream of its own: the rollout makes the next latent while this one is decoded

    def __getitem__(self, graph: str) -> Engine: ...

    def close(self) -> None: ...


@runtime_checkable
class Layered(Protocol):
    """Engines that can tell what each layer of a graph takes."""

    def layer_times(self, runs: int) -> dict[str, list[LayerTime]]:
        """By graph, from `runs` runs of each. State is used up by it: for the end of a measurement."""
        ...


def open_engines(bundle: Bundle, backend: str, precision: str | None = None, warn: Callable[[str], None] = console.warn) -> Engines:
    """Open every graph of `bundle` with `backend`; see `precision_of` for a precision of None. `warn` hears, in one line, of an engine that this
    CPU runs less exactly than the one it was built on.

    Raises UsageError for an unknown backend or precision and BundleError when the bundle has no whole engine of them.
    """
    chosen = precision_of(bundle, backend, precision)
    entry = bundle.engines.get(f"{backend}-{chosen}", {})  # of AS_EXPORTED there is none
    if entry.get("weight_bits") == WEIGHT_BITS and not adds_int8_exactly():
        warn(
            f"engine {backend}-{chosen} of {bundle.path} has weights of {WEIGHT_BITS} bits, whose products overflow on this CPU and spoil pictures; "
            f"build it again on this machine: aapt build-engine {bundle.path} --backend {backend} --precision {chosen}"
        )
    engines: Engines = importlib.import_module(BACKENDS[backend]).open_bundle(bundle, chosen)
    return engines


def precision_of(bundle: Bundle, backend: str, precision: str | None) -> str:
    """The precision to open: the one asked for, else the profile's own, else the fastest that was built; where nothing is built, the bundle's own.

    Raises UsageError for a backend or a precision that does not exist, and BundleError for an engine that was not built.
    """
    refuse_unknown(backend, precision)
    if backend in AS_EXPORTED:
        return precision or ("fp8" if bundle.manifest.get("precision") == "fp8" else "bf16")
    built = _built(bundle, backend)
    if precision is None and bundle.profile.precision.weights in built:
        return bundle.profile.precision.weights
    if precision is None and built:
        return min(built, key=lambda name: float(built[name]["step_ms"]))
    if precision is None:
        raise BundleError(f"bundle {bundle.path} has no {backend} engine", f"build one with: aapt build-engine {bundle.path} --backend {backend}")
    if precision not in built:
        there = ", ".join(sorted(built)) or "none"
        raise BundleError(f"bundle {bundle.path} has no {backend} engine in {precision}", f"built: {there}; {to_get(bundle, backend, precision)}")
    return precision


def refuse_unknown(backend: str, precision: str | None) -> None:
    """Raise UsageError for a backend, or a precision of it, that does not exist. A precision of None is always right."""
    if backend not in BACKENDS:
        named = ", ".join(name for name in BACKENDS if name not in AS_EXPORTED)
        raise UsageError(f"backend {backend!r} does not exist", f"backends: {named}; torch runs on a GPU with --device cuda")
    if precision is not None and precision not in PRECISIONS[backend]:
        place = "torch on a GPU" if backend == "torch-cuda" else backend
        raise UsageError(f"precision {precision!r} does not exist for {place}", f"precisions: {', '.join(PRECISIONS[backend])}")


def buildable(bundle: Bundle, backend: str) -> tuple[str, ...]:
    """The precisions that `backend` makes of this bundle's graphs. The torch engine runs the checkpoint, which is whole in every bundle."""
    in_fp8 = bundle.manifest.get("precision") == "fp8"
    return PRECISIONS[backend] if backend == "torch" else tuple(name for name in PRECISIONS[backend] if (name == "fp8") == in_fp8)


def to_get(bundle: Bundle, backend: str, precision: str) -> str:
    """The hint for an engine that exists and that `bundle` has not: the build, or where its graphs are in the other precision another export."""
    if precision in buildable(bundle, backend):
        return f"build it with: aapt build-engine {bundle.path} --backend {backend} --precision {precision}"
    return f"export another bundle for it with: aapt export CKPT -o OTHER --precision {'fp8' if precision == 'fp8' else 'fp32'}"


def _built(bundle: Bundle, backend: str) -> dict[str, dict[str, Any]]:
    """What the manifest says of the engines of `backend`, by precision. A hash does not make it sensible: somebody may have written it by hand."""
    shape = {"precision": (str,), "threads": (int,), "spinning": (bool,), "step_ms": (int, float)}
    built = {}
    for key, entry in bundle.engines.items():
        if entry.get("backend") != backend:
            continue
        sound = all(type(entry.get(name)) in kinds for name, kinds in shape.items())
        sound = sound and 1 <= entry["threads"] <= MOST_THREADS and 0 <= entry["step_ms"] <= LONGEST_MS
        if not sound or key != f"{backend}-{entry['precision']}":
            raise BundleError(
                f"bundle {bundle.path}: what its manifest says of engine {key} makes no sense",
                f"build it again: aapt build-engine {bundle.path} --backend {backend}",
            )
        built[entry["precision"]] = entry
    return built
