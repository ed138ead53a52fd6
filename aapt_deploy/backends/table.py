"""The backends, one row each: where a bundle's graphs can run, in which precisions, and what opens and builds them.

Nothing else in the project knows how many there are. A new backend is one file or folder here and one row of BACKENDS.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aapt_deploy.backends.cpu import WEIGHT_BITS, adds_int8_exactly
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import BundleError, UsageError

if TYPE_CHECKING:
    from aapt_deploy.rollout.engine import Engines

MOST_THREADS = 1024  # that a manifest may ask for
LONGEST_MS = 1e9  # upper bound for times read from records, so sums stay finite (about 11 days)


@dataclass(frozen=True)
class Backend:
    """One row of the table."""

    name: str  # in the names of engines, "<name>-<precision>"
    device: str  # "cpu" or "cuda"
    precisions: tuple[str, ...]  # what it runs in
    needs_build: bool  # False: it runs the bundle's own checkpoint and scales
    module: str  # has open_bundle(bundle, precision) -> Engines
    builder: str = ""  # module with build(bundle, precisions, options) -> list[Built]
    forms: tuple[str, ...] = ()  # forms of attention that a build may be told to take
    by_default: tuple[str, ...] = ()  # precisions that a build makes unless one is named; those that fit the bundle
    summary: str = ""  # for --help

    @property
    def option(self) -> str:
        """The value of --backend. One framework on two devices has two rows and one option."""
        return self.name.removesuffix(f"-{self.device}")


BACKENDS = {
    row.name: row
    for row in (
        Backend(
            "onnxruntime", "cpu", ("fp32", "int8", "fp8"), True, "aapt_deploy.backends.ort.engine", "aapt_deploy.backends.ort.build",
            by_default=("fp32", "int8", "fp8"), summary="CPU",
        ),
        Backend(
            "torch", "cpu", ("fp32", "bf16"), True, "aapt_deploy.backends.torch_eager", "aapt_deploy.backends.torch_eager",
            by_default=("fp32",), summary="slow reference; our kernels with --device cuda",
        ),
        Backend("torch-cuda", "cuda", ("fp8", "bf16"), False, "aapt_deploy.backends.torch_cuda.engine"),
        Backend(
            "tensorrt", "cuda", ("fp8", "bf16", "fp32"), True, "aapt_deploy.backends.trt.engine", "aapt_deploy.backends.trt.build",
            forms=("python", "aot", "native"), by_default=("fp8", "bf16"), summary="NVIDIA GPU",
        ),
    )
}  # fmt: skip


def options() -> dict[str, Backend]:
    """The rows by their --backend value; of one framework on two devices the first."""
    found: dict[str, Backend] = {}
    for row in BACKENDS.values():
        found.setdefault(row.option, row)
    return found


def named(option: str, device: str | None) -> str:
    """The backend's name for --backend and --device. Raises UsageError for a device that it does not run on, and for a name of two parts."""
    if option in BACKENDS and BACKENDS[option].option != option:
        row = BACKENDS[option]
        raise UsageError(f"backend {option!r} does not exist", f"for {row.option} on a GPU: --backend {row.option} --device {row.device}")
    if device is None:
        return option
    for row in BACKENDS.values():
        if (row.option, row.device) == (option, device):
            return row.name
    places = ", ".join(f"--backend {row.option} --device {row.device}" for row in BACKENDS.values())
    raise UsageError(f"backend {option!r} does not run on device {device!r}", f"one of: {places}")


def refuse_unknown(backend: str, precision: str | None) -> None:
    """Raise UsageError for a backend, or a precision of it, that does not exist. A precision of None is always right."""
    if backend not in BACKENDS:
        raise UsageError(f"backend {backend!r} does not exist", f"backends: {', '.join(options())}; torch runs on a GPU with --device cuda")
    row = BACKENDS[backend]
    if precision is not None and precision not in row.precisions:
        place = f"{row.option} on a GPU" if row.option != row.name else row.name
        raise UsageError(f"precision {precision!r} does not exist for {place}", f"precisions: {', '.join(row.precisions)}")


def open_engines(bundle: Bundle, backend: str, precision: str | None, warn: Callable[[str], None]) -> "Engines":
    """Open every graph of `bundle` with `backend`; see `precision_of` for a precision of None.

    Calls `warn` with one line if this CPU would overflow the engine's int8 weights. Raises UsageError for an unknown backend or precision and
    BundleError if the bundle has no whole engine of them.
    """
    chosen = precision_of(bundle, backend, precision)
    entry = bundle.engines.get(f"{backend}-{chosen}", {})  # none for a backend that needs no build
    if entry.get("weight_bits") == WEIGHT_BITS and not adds_int8_exactly():
        warn(
            f"engine {backend}-{chosen} of {bundle.path} has weights of {WEIGHT_BITS} bits, whose products overflow on this CPU and spoil pictures; "
            f"build it again on this machine: aapt build-engine {bundle.path} --backend {backend} --precision {chosen}"
        )
    engines: Engines = importlib.import_module(BACKENDS[backend].module).open_bundle(bundle, chosen)
    return engines


def precision_of(bundle: Bundle, backend: str, precision: str | None) -> str:
    """The precision to open: the one asked for, else the profile's own, else the fastest that was built; without builds the bundle's own.

    Raises UsageError for a backend or a precision that does not exist, and BundleError for an engine that was not built.
    """
    refuse_unknown(backend, precision)
    if not BACKENDS[backend].needs_build:
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


def buildable(bundle: Bundle, backend: str) -> tuple[str, ...]:
    """The precisions that `backend` makes of this bundle's graphs. The torch engine runs the checkpoint, which is whole in every bundle."""
    in_fp8, row = bundle.manifest.get("precision") == "fp8", BACKENDS[backend]
    return row.precisions if backend == "torch" else tuple(name for name in row.precisions if (name == "fp8") == in_fp8)


def to_get(bundle: Bundle, backend: str, precision: str) -> str:
    """The hint for an engine that exists and that `bundle` has not: the build, or another export if its graphs are in the other precision."""
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
