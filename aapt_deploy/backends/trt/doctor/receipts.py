"""What `aapt doctor --tensorrt` proved on this machine, kept for the builder: a receipt in the user's cache directory.

A receipt holds for one GPU architecture, TensorRT, CUDA and driver; the file is named after all four and after our kernels' hash, so that a change of
any of them leaves the builder with nothing proved, and it then takes the form that needs no proof: TensorRT's own attention. Timing caches and plans
of a build that was stopped lie in the same directory. Receipts are JSON written by this user's own processes; what is damaged counts as absent.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from aapt_deploy.backends.trt.cuda import Gpu
from aapt_deploy.bundle.files import whole

FORMAT = "aapt-tensorrt-proofs-1"

PYTHON, AOT, NATIVE = "python", "aot", "native"  # forms of attention in a plan
FORMS = (PYTHON, AOT, NATIVE)  # the best first

# Names of the checks, in the order in which they are made. What each does is in probes.py.
NATIVE_BUILDS, FP8_PRODUCTS, PLUGIN_FP8, PLUGIN_PACKED = (
    "native attention",
    "fp8 products",
    "plugin, fp8 caches",
    "plugin, int32 caches",
)
AOT_WORKS, AOT_STATIC, AOT_DYNAMIC, AOT_OP = (
    "aot plugin",
    "aot, 64 KiB static shared",
    "aot, 64 KiB dynamic shared",
    "aot attention",
)
CAPTURED, PLUGIN_CAPTURED, SLOT, FUNCTION, FP8_ATTENTION = (
    "captured", "plugin captured", "output bound in a slot", "plugin before function", "fp8 attention fused",
)  # fmt: skip
PROBES = (
    NATIVE_BUILDS, CAPTURED, SLOT, FP8_PRODUCTS, PLUGIN_FP8, PLUGIN_PACKED, PLUGIN_CAPTURED, FUNCTION, AOT_WORKS, AOT_STATIC, AOT_DYNAMIC, AOT_OP,
    FP8_ATTENTION,
)  # fmt: skip


@dataclass(frozen=True)
class Proof:
    """One check of `aapt doctor --tensorrt`."""

    name: str
    ok: bool
    found: str  # what was seen: figures, or the reason of a failure
    seconds: float


@dataclass(frozen=True)
class Choice:
    """A form of attention and why it was taken."""

    form: str
    packed: bool  # FP8 caches travel as INT32
    captured: bool  # plans of this form can be captured into a CUDA graph
    reason: str


def cache_folder() -> Path:
    """Where this user's TensorRT files lie."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "aapt_deploy" / "tensorrt"


def receipt_file(here: Gpu) -> Path:
    return cache_folder() / f"proofs-{here.key}.json"


def timing_cache_file(here: Gpu) -> Path:
    """Timings hold for a GPU architecture and a TensorRT release."""
    return cache_folder() / f"timing-sm{here.sm}-{here.tensorrt}.bin"


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file, and its folder, so that it is there whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.write_bytes(data)


def save(here: Gpu, proofs: Iterable[Proof]) -> Path:
    """Keep a receipt. Raises OSError."""
    path = receipt_file(here)
    content = {
        "format": FORMAT,
        "verified_on": asdict(here),
        "proofs": [asdict(proof) for proof in proofs],
    }
    write_whole(path, json.dumps(content, indent=1).encode())
    return path


def load(here: Gpu) -> dict[str, Proof] | None:
    """The proofs of this machine by name; None when there is no whole receipt for exactly this one."""
    try:
        content = json.loads(receipt_file(here).read_bytes())
        if content["format"] != FORMAT or content["verified_on"] != asdict(here):
            return None
        proofs = [Proof(**entry) for entry in content["proofs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if any(type(proof.ok) is not bool or not isinstance(proof.name, str) for proof in proofs):
        return None
    return {proof.name: proof for proof in proofs}


def choose(proofs: dict[str, Proof] | None, fp8: bool) -> list[Choice]:
    """The forms that are proved here, the best first; the last one is always TensorRT's own attention.

    `fp8`: there are scales for FP8 caches, which our kernels need.
    """

    def proved(*names: str) -> bool:
        return all(name in (proofs or {}) and (proofs or {})[name].ok for name in names)

    why = (
        "aapt doctor --tensorrt has not been run on this machine with these versions"
        if proofs is None
        else "nothing better is proved here"
    )
    captured = proved(CAPTURED) or proofs is None  # not proved wrong: opening tells
    choices = [
        Choice(
            NATIVE,
            packed=False,
            captured=captured,
            reason=why if fp8 else "our kernels need the FP8 scales of an fp8 bundle",
        )
    ]
    if fp8 and proved(AOT_WORKS, AOT_OP):
        choices.insert(
            0,
            Choice(
                AOT,
                packed=False,
                captured=captured,
                reason="proved here; the plan holds our kernels",
            ),
        )
    if fp8 and (proved(PLUGIN_FP8) or proved(PLUGIN_PACKED)):
        choices.insert(
            0,
            Choice(
                PYTHON,
                packed=not proved(PLUGIN_FP8),
                captured=proved(PLUGIN_CAPTURED),
                reason="proved here",
            ),
        )
    return choices
