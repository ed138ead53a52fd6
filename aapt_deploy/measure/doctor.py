"""Check what this machine can run, with a fix for what it cannot (`aapt doctor`).

A check looks, it does not guess: it imports packages, hashes the embedded checkpoint, and runs a
graph in ONNX Runtime. backends/trt/doctor/ask.py checks TensorRT.
"""

import importlib
import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

from aapt_deploy import assets
from aapt_deploy.backends.cpu import cores
from aapt_deploy.backends.table import BACKENDS
from aapt_deploy.backends.trt import cuda, opening
from aapt_deploy.backends.trt.flavour import BF16_SM, FLAVOURS, FP8_SM
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import AaptError, MachineError


@dataclass(frozen=True)
class Check:
    """One finding. A missing `needed` check makes the verdict bad."""

    name: str
    ok: bool
    needed: bool
    found: str
    fix: str = ""


PACKAGES = (  # import name, distribution, what it is for, needed to stream, extra that brings it
    ("numpy", "numpy", "everything", True, ""),
    ("onnxruntime", "onnxruntime", "the CPU engine", True, ""),
    ("av", "av", "video files and pipes", True, ""),
    ("safetensors", "safetensors", "checkpoints", True, ""),
    ("torch", "torch", "export, train, torch engine", False, "export"),
    ("onnx", "onnx", "export, build-engine", False, "export"),
    ("onnxscript", "onnxscript", "export", False, "export"),
    ("tensorrt", "tensorrt", "plans for an H100", False, "tensorrt"),
    (
        "tensorrt_rtx_bindings", "tensorrt-rtx-cu13-bindings", "plans for a GeForce", False,
        "tensorrt-rtx",
    ),
)  # fmt: skip


def examine() -> list[Check]:
    """All checks, in the order of the report."""
    return [
        _python(),
        _cores(),
        *(_package(*row) for row in PACKAGES),
        _checkpoint(),
        _runtime(),
        _ffmpeg(),
        _gpu(),
    ]


def _python() -> Check:
    ok = sys.version_info >= (3, 11)
    fix = "" if ok else "install Python 3.11 or newer"
    return Check("python", ok, True, platform.python_version(), fix)


def _cores() -> Check:
    count = cores()
    fix = "the demo profile is tuned for two cores; aapt profile tells if one is enough"
    return Check("cpu cores", count >= 2, False, str(count), "" if count >= 2 else fix)


def _package(module: str, distribution: str, purpose: str, needed: bool, extra: str) -> Check:
    try:
        importlib.import_module(module)
        version = importlib.metadata.version(distribution)
        return Check(module, True, needed, f"{version}, for {purpose}")
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        wanted = f"'aapt_deploy[{extra}]'" if extra else "aapt_deploy"
        return Check(module, False, needed, f"{error}; for {purpose}", f"pip install {wanted}")


def _attempt(name: str, needed: bool, look: Callable[[], str], fix: str) -> Check:
    try:
        return Check(name, True, needed, look())
    except Exception as error:  # any error is the finding; ONNX Runtime's types are private
        return Check(name, False, needed, str(error), fix)


def _checkpoint() -> Check:
    import hashlib

    def look() -> str:
        with assets.CHECKPOINT.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != assets.checkpoint_sha256():
            raise ValueError(f"{assets.CHECKPOINT.name} has sha256 {digest}")
        return f"{assets.CHECKPOINT.stat().st_size / 1e6:.1f} MB, hash fits"

    return _attempt("demo checkpoint", False, look, "install aapt_deploy again")


def _runtime() -> Check:
    """Run the smallest graph there is: y = x + x, opset 24.

    It is written byte by byte, so that no exporter is needed.
    """

    def look() -> str:
        import numpy as np
        import onnxruntime

        session = onnxruntime.InferenceSession(_ADD_GRAPH, providers=["CPUExecutionProvider"])
        got = session.run(None, {"x": np.array([1.5], np.float32)})[0]
        if got.tolist() != [3.0]:
            raise ValueError(f"1.5 + 1.5 gave {got.tolist()}")
        return f"opset 24 runs, providers {', '.join(onnxruntime.get_available_providers())}"

    return _attempt("onnxruntime runs", True, look, "pip install --force-reinstall onnxruntime")


# ModelProto: ir_version 10, opset 24, graph "g": one Add node, float tensors x and y of shape [1]
_VALUE = b"\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01"
_GRAPH = (
    b"\x0a\x0e" + b"\x0a\x01x" + b"\x0a\x01x" + b"\x12\x01y" + b"\x22\x03Add"
    + b"\x12\x01g" + b"\x5a\x0f\x0a\x01x" + _VALUE + b"\x62\x0f\x0a\x01y" + _VALUE
)  # fmt: skip
_ADD_GRAPH = b"\x08\x0a" + b"\x42\x04\x0a\x00\x10\x18" + b"\x3a" + bytes([len(_GRAPH)]) + _GRAPH


def _ffmpeg() -> Check:
    path = shutil.which("ffmpeg")
    return Check(
        "ffmpeg",
        path is not None,
        False,
        path or "not on PATH; only needed to pipe a stream into it",
        "" if path else "install ffmpeg",
    )


def _gpu() -> Check:
    """Name this machine's GPU, and what it can compute in."""
    name = "nvidia gpu"
    try:
        device = cuda.with_driver()
    except MachineError as error:
        fix = "the CPU engine needs none; plans for a GPU elsewhere: --backend tensorrt-rtx"
        return Check(name, False, False, str(error), fix)
    try:
        formats = [word for word, sm in (("fp8", FP8_SM), ("bf16", BF16_SM)) if device.sm >= sm]
        fit = [f.backend for f in FLAVOURS.values() if not f.sms or device.sm in f.sms]
        can = f"{', '.join([*formats, 'fp32'])} by {' or '.join(fit)}"
        found = f"{device.name}, SM {device.sm}, CUDA {device.cuda}: {can}"
        return Check(name, True, False, f"{found}; to prove it: aapt doctor --tensorrt")
    finally:
        device.close()


def engines(bundle: Bundle) -> list[Check]:
    """Return, for every engine of a bundle, whether this machine can run it."""
    return [_engine(bundle, key) for key in sorted(bundle.engines)]


def _engine(bundle: Bundle, key: str) -> Check:
    backend, _, precision = key.rpartition("-")
    try:
        if backend in FLAVOURS:
            found = opening.runs_here(bundle, precision, FLAVOURS[backend])
        else:
            found = f"runs on the {BACKENDS[backend].device}"
        return Check(key, True, False, found)
    except AaptError as error:
        return Check(key, False, False, str(error), error.hint)
    except KeyError:
        return Check(key, False, False, "this version has no such backend", "build another engine")
