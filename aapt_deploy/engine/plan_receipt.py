"""A plan's receipt: what it was built with, written into the manifest, and compared before one byte of the plan is used.

A plan runs only on the GPU architecture and with the TensorRT release that built it; TensorRT says so itself, but late and in its own words, and it
does not know our kernels or the graph. Versions are names, never numbers of enums: those move between releases.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from aapt_deploy.engine.cuda import Gpu
from aapt_deploy.errors import BundleError, MachineError


@dataclass(frozen=True)
class Receipt:
    """What one plan was built with."""

    tensorrt: str
    sm: int
    kernels: str
    graph_sha256: str
    cuda: str  # for the record; a newer driver runs older plans
    driver: str
    gpu: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, entry: Any, plan: str) -> "Receipt":
        """The receipt in a manifest's entry. Raises BundleError when it is not whole."""
        wanted = {field.name: field.type for field in fields(cls)}
        if not isinstance(entry, dict) or entry.keys() != wanted.keys() or any(type(entry[name]) is not kind for name, kind in wanted.items()):
            raise BundleError(f"plan {plan} has no whole receipt", "build the engine again: aapt build-engine")
        return cls(**entry)


def graph_sha256(files: Mapping[str, Any], graph: str) -> str:
    """Hash of an exported graph by the manifest's `files`: of its structure and of the weights beside it; "" for a graph that is not there."""
    parts = [str(files[name]["sha256"]) for name in (f"{graph}.onnx", f"{graph}.onnx.data") if name in files]
    return hashlib.sha256("".join(parts).encode()).hexdigest() if len(parts) > 1 else "".join(parts)


def check(receipt: Receipt, here: Gpu, graph_sha256: str, plan: str) -> None:
    """Let a plan pass that was built from this graph, with these versions, for this GPU.

    Raises MachineError for a foreign GPU or TensorRT, BundleError for a plan that is older than its graph or our kernels.
    """
    again = "build the engine again on this machine: aapt build-engine"
    if receipt.sm != here.sm:
        raise MachineError(f"plan {plan} was built for SM {receipt.sm} ({receipt.gpu}); this GPU is SM {here.sm}", again)
    if receipt.tensorrt != here.tensorrt:
        raise MachineError(
            f"plan {plan} was built with TensorRT {receipt.tensorrt}; here is {here.tensorrt}", f"{again}, or install tensorrt=={receipt.tensorrt}"
        )
    if receipt.kernels != here.kernels:
        raise BundleError(f"plan {plan} was built with kernels {receipt.kernels[:12]}; this aapt_deploy has {here.kernels[:12]}", again)
    if receipt.graph_sha256 != graph_sha256:
        raise BundleError(f"plan {plan} was built from another graph ({receipt.graph_sha256[:12]} instead of {graph_sha256[:12]})", again)
