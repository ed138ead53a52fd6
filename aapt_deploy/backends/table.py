"""List the backends, one row each: device, precisions, modules that open and build them.

A new backend is one file or folder here and one row of BACKENDS. Nothing else lists them.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aapt_deploy.backends.cpu import WEIGHT_BITS, adds_int8_exactly
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import BundleError, MachineError, UsageError
from aapt_deploy.profiles import Profile

if TYPE_CHECKING:
    from aapt_deploy.rollout.engine import Engines

MOST_THREADS = 1024  # that a manifest may ask for
LONGEST_MS = 1e9  # upper bound for times read from records, so sums stay finite (about 11 days)


@dataclass(frozen=True)
class Backend:
    """One row of BACKENDS."""

    name: str  # in the names of engines, "<name>-<precision>"
    device: str  # "cpu" or "cuda"
    precisions: tuple[str, ...]  # that it runs in
    needs_build: bool  # False: it runs the bundle's own checkpoint and scales
    module: str  # has open_bundle(bundle, precision) -> Engines
    builder: str = ""  # module with build(bundle, precisions, options) -> list[Built]
    forms: tuple[str, ...] = ()  # forms of attention that a build accepts
    by_default: tuple[str, ...] = ()  # precisions of a build if none is named and the graphs fit
    names_sms: bool = False  # a build accepts compute capabilities of other machines' GPUs
    portable: bool = False  # a build can make engines for a smaller runtime
    summary: str = ""  # for --help
    cross_attention: bool = False  # it runs generators with text beside the cache

    @property
    def option(self) -> str:
        """Return the value of --backend, which the rows of one framework share."""
        return self.name.removesuffix(f"-{self.device}")


_ROWS = (
    Backend("onnxruntime", "cpu", ("fp32", "int8", "fp8"), True,
            "aapt_deploy.backends.ort.engine", "aapt_deploy.backends.ort.build",
            by_default=("fp32", "int8", "fp8"), summary="CPU", cross_attention=True),
    Backend("torch", "cpu", ("fp32", "bf16"), True,
            "aapt_deploy.backends.torch_eager", "aapt_deploy.backends.torch_eager",
            by_default=("fp32",), summary="slow reference; our kernels with --device cuda",
            cross_attention=True),
    Backend("torch-cuda", "cuda", ("fp8", "bf16"), False, "aapt_deploy.backends.torch_cuda.engine"),
    Backend("tensorrt", "cuda", ("fp8", "bf16", "fp32"), True,
            "aapt_deploy.backends.trt.opening", "aapt_deploy.backends.trt.build",
            ("python", "aot", "native-fp8", "native"), by_default=("fp8", "bf16"), portable=True,
            summary="NVIDIA GPU", cross_attention=True),
    Backend("tensorrt-rtx", "cuda", ("fp8", "bf16", "fp32"), True,
            "aapt_deploy.backends.trt.rtx", "aapt_deploy.backends.trt.rtx",
            ("native-fp8", "native"), by_default=("fp8", "bf16"), names_sms=True,
            summary="GeForce and RTX GPUs; built on any machine", cross_attention=True),
)  # fmt: skip
BACKENDS = {row.name: row for row in _ROWS}


def options() -> dict[str, Backend]:
    """Return the rows by their --backend value; the first of a framework on two devices."""
    found: dict[str, Backend] = {}
    for row in BACKENDS.values():
        found.setdefault(row.option, row)
    return found


def named(option: str, device: str | None) -> str:
    """Return the backend's name for --backend and --device.

    Raises UsageError if the backend does not run on the device, or `option` names both.
    """
    if option in BACKENDS and BACKENDS[option].option != option:
        row = BACKENDS[option]
        hint = f"for {row.option} on a GPU: --backend {row.option} --device {row.device}"
        raise UsageError(f"backend {option!r} does not exist", hint)
    if device is None:
        return option
    for row in BACKENDS.values():
        if (row.option, row.device) == (option, device):
            return row.name
    places = ", ".join(f"--backend {row.option} --device {row.device}" for row in BACKENDS.values())
    wrong = f"backend {option!r} does not run on device {device!r}"
    raise UsageError(wrong, f"one of: {places}")


def refuse_unknown(backend: str, precision: str | None) -> None:
    """Raise UsageError if the backend, or a precision other than None, does not exist."""
    if backend not in BACKENDS:
        hint = f"backends: {', '.join(options())}; torch runs on a GPU with --device cuda"
        raise UsageError(f"backend {backend!r} does not exist", hint)
    row = BACKENDS[backend]
    if precision is not None and precision not in row.precisions:
        place = f"{row.option} on a GPU" if row.option != row.name else row.name
        there = f"precisions: {', '.join(row.precisions)}"
        raise UsageError(f"precision {precision!r} does not exist for {place}", there)


def open_engines(
    bundle: Bundle, backend: str, precision: str | None, warn: Callable[[str], None]
) -> "Engines":
    """Open every graph of `bundle` with `backend`; see `precision_of` for a precision of None.

    Calls `warn` with one line if this CPU would overflow the engine's int8 weights, or if the
    engine never ran.
    Raises UsageError if the backend or the precision does not exist.
    Raises BundleError if the bundle has no such engine, or a damaged one.
    """
    chosen = precision_of(bundle, backend, precision)
    refuse_unsupported(bundle.profile, backend)
    entry = bundle.engines.get(f"{backend}-{chosen}", {})  # none for a backend that needs no build
    if entry.get("weight_bits") == WEIGHT_BITS and not adds_int8_exactly():
        warn(
            f"engine {backend}-{chosen} of {bundle.path} has weights of {WEIGHT_BITS} bits, "
            "whose products overflow on this CPU and spoil pictures; build it again on this "
            f"machine: {_build_command(bundle, backend, chosen)}"
        )
    if "step_ms" in entry and entry["step_ms"] is None:
        warn(
            f"engine {backend}-{chosen} of {bundle.path} was built without its GPU and never "
            f"compared; to compare it here: {_build_command(bundle, backend, chosen)}"
        )
    engines: Engines = importlib.import_module(BACKENDS[backend].module).open_bundle(bundle, chosen)
    return engines


def refuse_unsupported(profile: Profile, backend: str) -> None:
    """Raise MachineError if `backend` cannot run the profile's generator."""
    if profile.text.attention == "cross" and not BACKENDS[backend].cross_attention:
        fit = ", ".join(row.name for row in BACKENDS.values() if row.cross_attention)
        wrong = f"backend {backend} does not run generators with cross-attention"
        raise MachineError(wrong, f"profile {profile.name} runs on: {fit}")


def _build_command(bundle: Bundle, backend: str, precision: str) -> str:
    return f"aapt build-engine {bundle.path} --backend {backend} --precision {precision}"


def precision_of(bundle: Bundle, backend: str, precision: str | None) -> str:
    """Return `precision`, else the profile's own, else the fastest that was built.

    A backend without builds takes the bundle's own.
    Raises UsageError if the backend or the precision does not exist.
    Raises BundleError if the engine was not built.
    """
    refuse_unknown(backend, precision)
    if not BACKENDS[backend].needs_build:
        return precision or ("fp8" if bundle.manifest.get("precision") == "fp8" else "bf16")
    built = _built(bundle, backend)
    if precision is None and bundle.profile.precision.weights in built:
        return bundle.profile.precision.weights
    if precision is None and built:
        return min(built, key=lambda name: _step_ms(built[name]))
    if precision is None:
        hint = f"build one with: aapt build-engine {bundle.path} --backend {backend}"
        raise BundleError(f"bundle {bundle.path} has no {backend} engine", hint)
    if precision not in built:
        lacking = f"bundle {bundle.path} has no {backend} engine in {precision}"
        there = ", ".join(sorted(built)) or "none"
        raise BundleError(lacking, f"built: {there}; {to_get(bundle, backend, precision)}")
    return precision


def _step_ms(entry: dict[str, Any]) -> float:
    """Return the measured step; infinite for an engine that was built elsewhere and never run."""
    return math.inf if entry["step_ms"] is None else float(entry["step_ms"])


def buildable(bundle: Bundle, backend: str) -> tuple[str, ...]:
    """Return the precisions that `backend` builds from this bundle.

    The torch engine runs the checkpoint, which is in every bundle, instead of the graphs.
    """
    in_fp8, precisions = bundle.manifest.get("precision") == "fp8", BACKENDS[backend].precisions
    if backend == "torch":
        return precisions
    return tuple(name for name in precisions if (name == "fp8") == in_fp8)


def to_get(bundle: Bundle, backend: str, precision: str) -> str:
    """Return the hint for an engine that `bundle` lacks: a build, or another bundle's export."""
    if precision in buildable(bundle, backend):
        return f"build it with: {_build_command(bundle, backend, precision)}"
    graphs = "fp8" if precision == "fp8" else "fp32"
    return f"export another bundle for it with: aapt export CKPT -o OTHER --precision {graphs}"


def _built(bundle: Bundle, backend: str) -> dict[str, dict[str, Any]]:
    """Return the manifest's entries of `backend`'s engines, by precision.

    Raises BundleError if one is not sensible, since a manifest may be written by hand.
    """
    shape = {"precision": (str,), "threads": (int,), "spinning": (bool,)}
    built = {}
    for key, entry in bundle.engines.items():
        if entry.get("backend") != backend:
            continue
        sound = all(type(entry.get(name)) in kinds for name, kinds in shape.items())
        sound = sound and 1 <= entry["threads"] <= MOST_THREADS
        step_ms = entry.get("step_ms", "")
        measured = type(step_ms) in (int, float) and 0 <= step_ms <= LONGEST_MS
        sound = sound and (measured or (step_ms is None and BACKENDS[backend].names_sms))
        if not sound or key != f"{backend}-{entry['precision']}":
            wrong = f"bundle {bundle.path}: what its manifest says of engine {key} makes no sense"
            hint = f"build it again: aapt build-engine {bundle.path} --backend {backend}"
            raise BundleError(wrong, hint)
        built[entry["precision"]] = entry
    return built
