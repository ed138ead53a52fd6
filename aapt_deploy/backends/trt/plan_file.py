"""Read what is inside a plan, and check that it belongs on this machine.

The layers of a plan, as the engine inspector describes them; an audit of what they must contain;
how long each takes, by a profiler. Then a plan's receipt. The inspector's JSON changed between
10.x and 11.x: "Format/Datatype" was one string, then two entries. Both are read, and TensorRT is
not needed.
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
    """One layer of a plan, often made from several layers of the network."""

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
        """Return whether it is TensorRT's own fused attention, by the names it uses."""
        return not self.is_plugin and any(
            word in f"{self.kind} {self.tactic}".lower() for word in ATTENTION_WORDS
        )

    @property
    def reads_fp8(self) -> bool:
        return any(word in kind.upper() for kind in self.inputs for word in FP8_WORDS)


@dataclass(frozen=True)
class Audit:
    """Counts that show whether a plan is as wanted."""

    layers: int
    plugins: int
    fp8: int  # layers that compute on FP8 inputs, plugins and reformats not counted
    reformats: int
    attention: int = 0  # layers of TensorRT's own fused attention


def join(layers: list[PlanLayer], times_ms: dict[str, list[float]]) -> list[LayerTime]:
    """Return layers with their times from the profiler, the longest first."""
    known = {layer.name: (layer.kind, layer.tactic) for layer in layers}
    middle = {name: statistics.median(times) for name, times in times_ms.items() if times}
    total = sum(middle.values()) or 1.0
    return [
        LayerTime(name, *known.get(name, ("", "")), round(ms, 4), round(ms / total, 4))
        for name, ms in sorted(middle.items(), key=lambda item: -item[1])
    ]


def read_layers(text: str) -> list[PlanLayer]:
    """Return the layers in the inspector's JSON.

    Raises BundleError if they are not described, as in a plan without detailed profiling.
    """
    try:
        layers = json.loads(text)["Layers"]
        if any(isinstance(layer, str) for layer in layers):
            raise ValueError("only names")
        return [_layer(layer) for layer in layers]
    except (ValueError, KeyError, TypeError) as error:
        text = f"TensorRT does not describe the plan's layers: {error}"
        raise BundleError(text, "build the engine again: aapt build-engine") from None


def _layer(raw: dict[str, Any]) -> PlanLayer:
    inputs, outputs = (tuple(map(_dtype, raw.get(side, ()))) for side in ("Inputs", "Outputs"))
    tactic = str(raw.get("TacticName", ""))
    return PlanLayer(str(raw["Name"]), str(raw["LayerType"]), tactic, inputs, outputs)


def _dtype(tensor: dict[str, Any]) -> str:
    return next((str(tensor[key]) for key in DTYPE_KEYS if key in tensor), "")


def audit(layers: list[PlanLayer], plugin_layers: int, fp8_layers: int = 0) -> Audit:
    """Count layers. A plan must not silently run attention or products in another form.

    Raises ParityError, naming layers, unless it has exactly `plugin_layers` plugins and at least
    `fp8_layers` layers that compute in FP8.
    """
    plugins = [layer for layer in layers if layer.is_plugin]
    working = [layer for layer in layers if not (layer.is_plugin or layer.is_reformat)]
    fp8 = [layer for layer in working if layer.reads_fp8]
    if len(plugins) != plugin_layers:
        elsewhere = [layer.name for layer in working if _sounds_like_attention(layer.name)]
        found = len(plugins)
        others = ", ".join(elsewhere) or "none found"
        raise ParityError(
            f"the plan runs our attention kernel in {found} layers instead of {plugin_layers}; "
            f"attention elsewhere: {others}",
            "build the engine again; if it stays, report it with the versions that aapt doctor "
            "shows",
        )
    if len(fp8) < fp8_layers:
        names = [layer.name for layer in working if not layer.reads_fp8 and layer.tactic]
        raise ParityError(
            f"the plan computes {len(fp8)} layers in FP8 instead of {fp8_layers}; not in FP8: "
            f"{_first(names)}",
            "export again with --precision fp8",
        )
    reformats = sum(layer.is_reformat for layer in layers)
    attention = sum(layer.is_attention for layer in layers)
    return Audit(len(layers), len(plugins), len(fp8), reformats, attention)


def _sounds_like_attention(name: str) -> bool:
    return "attention" in name.lower() or "softmax" in name.lower()


def _first(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


@dataclass(frozen=True)
class Receipt:
    """What one plan was built with."""

    tensorrt: str
    sms: tuple[int, ...]  # compute capabilities x 10 that it is for
    kernels: str
    graph_sha256: str
    # For the record; a newer driver runs older plans. "" if it was built without a GPU.
    cuda: str
    driver: str
    gpu: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"sms": list(self.sms)}

    @classmethod
    def of(cls, entry: Any, plan: str) -> "Receipt":
        """Return the receipt in a manifest's entry. Raises BundleError if it is not whole."""
        names = {field.name for field in fields(cls)}
        complete = isinstance(entry, dict) and entry.keys() == names
        sms = entry["sms"] if complete else ()
        listed = isinstance(sms, list) and bool(sms) and all(type(sm) is int for sm in sms)
        if not listed or any(type(entry[name]) is not str for name in names - {"sms"}):
            hint = "build the engine again: aapt build-engine"
            raise BundleError(f"plan {plan} has no whole receipt", hint)
        return cls(**entry | {"sms": tuple(sms)})


def graph_sha256(files: Mapping[str, Any], graph: str) -> str:
    """Return the hash of an exported graph, weights included, by the manifest's `files`.

    It is "" for a graph that is not listed.
    """
    names = (f"{graph}.onnx", f"{graph}.onnx.data")
    parts = [str(files[name]["sha256"]) for name in names if name in files]
    return hashlib.sha256("".join(parts).encode()).hexdigest() if len(parts) > 1 else "".join(parts)


def check(receipt: Receipt, here: Gpu, graph_sha256: str, plan: str) -> None:
    """Check that a plan was built from this graph, with these versions, for this GPU.

    Raises MachineError for another GPU or TensorRT.
    Raises BundleError for a plan that is older than its graph or our kernels.
    """
    was_built = f"plan {plan} was built"
    if here.sm not in receipt.sms:
        on = f" ({receipt.gpu})" if receipt.gpu else ""
        built_for = f"for SM {', '.join(map(str, receipt.sms))}{on}"
        raise MachineError(f"{was_built} {built_for}; this GPU is SM {here.sm}", AGAIN)
    if receipt.tensorrt != here.tensorrt:
        raise MachineError(
            f"{was_built} with TensorRT {receipt.tensorrt}; here is {here.tensorrt}",
            f"{AGAIN}, or install that release",
        )
    if receipt.kernels != here.kernels:
        ours = f"this aapt_deploy has {here.kernels[:12]}"
        raise BundleError(f"{was_built} with kernels {receipt.kernels[:12]}; {ours}", AGAIN)
    if receipt.graph_sha256 != graph_sha256:
        hashes = f"{receipt.graph_sha256[:12]} instead of {graph_sha256[:12]}"
        raise BundleError(f"{was_built} from another graph ({hashes})", AGAIN)
