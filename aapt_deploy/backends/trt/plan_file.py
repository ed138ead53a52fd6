"""What TensorRT made of a graph: the layers of a plan as the engine inspector tells them, and an audit of what they must contain;
and how long each takes, once a profiler has told.

The inspector's JSON changed between 10.x and 11.x ("Format/Datatype" was one string, then two entries); both are read. It is text that TensorRT
wrote about a plan, so nothing here needs TensorRT.
"""

import hashlib
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from aapt_deploy.backends.trt.cuda import Gpu
from aapt_deploy.errors import BundleError, MachineError, ParityError
from aapt_deploy.rollout.engine import LayerTime

AGAIN = "build the engine again on this machine: aapt build-engine"
DTYPE_KEYS = ("DataType", "Datatype", "Format/Datatype")
FP8_WORDS = ("FP8", "E4M3")
ATTENTION_WORDS = ("mha", "attention")  # "fmha_v2_...", "_gemm_mha_v2", "Attention"
SHOWN = 8  # layer names in an error


@dataclass(frozen=True)
class PlanLayer:
    """One layer of a plan; several layers of the network may have become one."""

    name: str
    kind: str  # TensorRT's own: "PluginV3", "Reformat", "gemm", "kgen", …
    tactic: str  # the kernel; empty where it has no choice
    inputs: tuple[str, ...]  # data types
    outputs: tuple[str, ...]

    @property
    def is_plugin(self) -> bool:
        return self.kind.lower().startswith("plugin")

    @property
    def is_reformat(self) -> bool:
        return self.kind.lower() == "reformat"

    @property
    def is_attention(self) -> bool:
        """TensorRT's own fused attention, by what its kernels and layers are called."""
        return not self.is_plugin and any(
            word in f"{self.kind} {self.tactic}".lower() for word in ATTENTION_WORDS
        )

    @property
    def reads_fp8(self) -> bool:
        return any(word in kind.upper() for kind in self.inputs for word in FP8_WORDS)


@dataclass(frozen=True)
class Audit:
    """Counts that tell whether a plan is the one that was meant."""

    layers: int
    plugins: int
    fp8: int  # layers that compute on FP8 inputs, plugins and reformats not counted
    reformats: int
    attention: int = 0  # layers of TensorRT's own fused attention


def join(layers: list[PlanLayer], times_ms: dict[str, list[float]]) -> list[LayerTime]:
    """Layers with what the profiler measured of them, the longest first."""
    known = {layer.name: layer for layer in layers}
    middle = {name: statistics.median(times) for name, times in times_ms.items() if times}
    total = sum(middle.values()) or 1.0
    rows = []
    for name, ms in sorted(middle.items(), key=lambda item: -item[1]):
        layer = known.get(name)
        rows.append(
            LayerTime(
                name,
                layer.kind if layer else "",
                layer.tactic if layer else "",
                round(ms, 4),
                round(ms / total, 4),
            )
        )
    return rows


def read_layers(text: str) -> list[PlanLayer]:
    """The layers in the inspector's JSON. Raises BundleError when they are not told, as in a plan built without detailed profiling."""
    try:
        layers = json.loads(text)["Layers"]
        if any(isinstance(layer, str) for layer in layers):
            raise ValueError("only names")
        return [_layer(layer) for layer in layers]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"TensorRT does not describe the plan's layers: {error}",
            "build the engine again: aapt build-engine",
        ) from None


def _layer(raw: dict[str, Any]) -> PlanLayer:
    inputs, outputs = (
        tuple(_dtype(tensor) for tensor in raw.get(side, ())) for side in ("Inputs", "Outputs")
    )
    return PlanLayer(
        str(raw["Name"]), str(raw["LayerType"]), str(raw.get("TacticName", "")), inputs, outputs
    )


def _dtype(tensor: dict[str, Any]) -> str:
    return next((str(tensor[key]) for key in DTYPE_KEYS if key in tensor), "")


def audit(layers: list[PlanLayer], plugin_layers: int, fp8_layers: int = 0) -> Audit:
    """Count, and insist on exactly `plugin_layers` plugins and at least `fp8_layers` layers that compute in FP8.

    Raises ParityError, naming layers: a plan that silently runs attention or products in another form is not the plan that was asked for.
    """
    plugins = [layer for layer in layers if layer.is_plugin]
    working = [layer for layer in layers if not (layer.is_plugin or layer.is_reformat)]
    fp8 = [layer for layer in working if layer.reads_fp8]
    if len(plugins) != plugin_layers:
        others = ", ".join(
            layer.name
            for layer in working
            if "attention" in layer.name.lower() or "softmax" in layer.name.lower()
        )
        raise ParityError(
            f"the plan runs our attention kernel in {len(plugins)} layers instead of {plugin_layers}; attention elsewhere: {others or 'none found'}",
            "build the engine again; if it stays, report it with the versions that aapt doctor shows",
        )
    if len(fp8) < fp8_layers:
        names = ", ".join(layer.name for layer in working if not layer.reads_fp8 and layer.tactic)
        raise ParityError(
            f"the plan computes {len(fp8)} layers in FP8 instead of {fp8_layers}; not in FP8: {_first(names)}",
            "export again with --precision fp8",
        )
    return Audit(
        len(layers),
        len(plugins),
        len(fp8),
        sum(layer.is_reformat for layer in layers),
        sum(layer.is_attention for layer in layers),
    )


def _first(names: str) -> str:
    parts = names.split(", ")
    return ", ".join(parts[:SHOWN]) + (
        f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    )


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
        if (
            not isinstance(entry, dict)
            or entry.keys() != wanted.keys()
            or any(type(entry[name]) is not kind for name, kind in wanted.items())
        ):
            raise BundleError(
                f"plan {plan} has no whole receipt", "build the engine again: aapt build-engine"
            )
        return cls(**entry)


def graph_sha256(files: Mapping[str, Any], graph: str) -> str:
    """Hash of an exported graph by the manifest's `files`: of its structure and of the weights beside it; "" for a graph that is not there."""
    parts = [
        str(files[name]["sha256"])
        for name in (f"{graph}.onnx", f"{graph}.onnx.data")
        if name in files
    ]
    return hashlib.sha256("".join(parts).encode()).hexdigest() if len(parts) > 1 else "".join(parts)


def check(receipt: Receipt, here: Gpu, graph_sha256: str, plan: str) -> None:
    """Let a plan pass that was built from this graph, with these versions, for this GPU.

    Raises MachineError for a foreign GPU or TensorRT, BundleError for a plan that is older than its graph or our kernels.
    """
    if receipt.sm != here.sm:
        raise MachineError(
            f"plan {plan} was built for SM {receipt.sm} ({receipt.gpu}); this GPU is SM {here.sm}",
            AGAIN,
        )
    if receipt.tensorrt != here.tensorrt:
        raise MachineError(
            f"plan {plan} was built with TensorRT {receipt.tensorrt}; here is {here.tensorrt}",
            f"{AGAIN}, or install tensorrt=={receipt.tensorrt}",
        )
    if receipt.kernels != here.kernels:
        raise BundleError(
            f"plan {plan} was built with kernels {receipt.kernels[:12]}; this aapt_deploy has {here.kernels[:12]}",
            AGAIN,
        )
    if receipt.graph_sha256 != graph_sha256:
        raise BundleError(
            f"plan {plan} was built from another graph ({receipt.graph_sha256[:12]} instead of {graph_sha256[:12]})",
            AGAIN,
        )
