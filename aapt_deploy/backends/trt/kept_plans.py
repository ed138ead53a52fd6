"""Keep finished plans of a build that was stopped, so that it resumes behind them.

A plan is named after everything that it was made from. Equal inputs build nothing.
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from aapt_deploy.backends.trt.doctor import receipts
from aapt_deploy.backends.trt.doctor.receipts import NATIVE_FP8, OURS
from aapt_deploy.backends.trt.order import Order
from aapt_deploy.bundle.scales import FILE as SCALES
from aapt_deploy.errors import BundleError
from aapt_deploy.models.cost import WORKSPACE_GB

RECIPE = 2  # of a build; a plan of another one is not kept


@dataclass(frozen=True)
class Finished:
    """One plan and what was recorded about it."""

    path: Path
    inputs: str  # hash of everything that it was made from
    audit: dict[str, int]


def workspace_bytes(order: Order, graph: str) -> int:
    """Return the most scratch memory that a graph's plan may use.

    TensorRT keeps activations in it. The 8B encoder needs 2.8 GB; its eager form has 6 GB of them.
    In fp32, attention has no fused kernel and keeps the scores of a layer too, 4.6 GB at 8B.
    """
    stage = next(stage for stage in order.cost.stages if stage.name == graph)
    scores = 0
    if graph == "generator" and order.precision == "fp32":
        profile = order.bundle.profile
        keys = profile.cache_tokens + profile.block_tokens
        scores = 4 * profile.model.heads * profile.block_tokens * keys
    return round((WORKSPACE_GB + stage.activations_gb) * 1e9) + 2 * scores


def inputs_hash(order: Order, graph: str) -> str:
    """Return the sha256 of everything that a plan is made from; equal inputs, same plan."""
    files = order.bundle.manifest["files"]
    generator, form = graph == "generator", order.choice.form
    ours = generator and form in OURS
    scaled = ours or (form == NATIVE_FP8 and graph in ("generator", "prompt"))
    stored = (f"{graph}.onnx", f"{graph}.onnx.data")
    made_from = {
        "recipe": RECIPE, "graph": graph, "precision": order.precision,
        "flavour": order.flavour.backend, "tensorrt": order.tensorrt, "sms": order.sms,
        "files": [files.get(name, {}).get("sha256") for name in stored],
        "attention": [form, order.choice.packed] if generator or scaled else None,
        "kernels": order.here.kernels if ours and order.here else None,
        "scales": files[SCALES]["sha256"] if scaled else None,
        "workspace": workspace_bytes(order, graph), "portable": order.portable,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def unfinished(inputs: str) -> Path:
    """Return where a plan waits: in this user's caches, because an opened plan is trusted."""
    return receipts.cache_folder() / "unfinished" / f"{inputs}.plan"


def kept(order: Order, graph: str, inputs: str) -> Finished | None:
    """Return a whole plan from the same inputs: of a stopped build or of the bundle's engine."""
    waiting = unfinished(inputs)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        note = json.loads(waiting.with_suffix(".json").read_bytes())
        if note["sha256"] == sha256_of(waiting):
            return Finished(waiting, inputs, dict(note["audit"]))
    entry = order.bundle.engines.get(order.key, {})
    with contextlib.suppress(BundleError, KeyError, TypeError):
        driver = entry["receipts"][graph]["driver"]
        if entry["inputs"][graph] == inputs and driver == _driver(order):
            path = order.bundle.checked(entry["graphs"][graph])
            return Finished(path, inputs, dict(entry["audit"][graph]))
    return None


def forget(finished: Finished) -> None:
    """Remove a kept plan that the bundle has now."""
    for suffix in (".plan", ".json"):
        unfinished(finished.inputs).with_suffix(suffix).unlink(missing_ok=True)


def _driver(order: Order) -> str:
    """Return what a plan's tactics were measured with; "" where none were."""
    return order.here.driver if order.here and order.flavour.timing_cache else ""


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
