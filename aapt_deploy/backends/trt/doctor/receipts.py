"""Keep what `aapt doctor --tensorrt` proved here, and choose a form of attention.

A receipt is valid for one GPU architecture, TensorRT, CUDA and driver. The file is named after
these and our kernels' hash. After a change of any, nothing is proved, and the builder takes the
form that needs no proof: TensorRT's own attention. Timing caches and plans of stopped builds are
in the same directory. Receipts are JSON written by this user's own processes; a damaged one
counts as missing.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from aapt_deploy.backends.trt.cuda import Gpu
from aapt_deploy.bundle.files import whole

FORMAT = "aapt-tensorrt-proofs-1"

# Forms of attention in a plan, the best first.
PYTHON, AOT, NATIVE_FP8, NATIVE = "python", "aot", "native-fp8", "native"
FORMS = (PYTHON, AOT, NATIVE_FP8, NATIVE)
OURS = (PYTHON, AOT)  # run our kernels

# Names of the checks, in the order in which they are made. What each does is in probes.py.
NATIVE_BUILDS = "native attention"
CAPTURED = "captured"
SLOT = "output bound in a slot"
FP8_PRODUCTS = "fp8 products"
PLUGIN_FP8 = "plugin, fp8 caches"
PLUGIN_PACKED = "plugin, int32 caches"
PLUGIN_CAPTURED = "plugin captured"
FUNCTION = "plugin before function"
AOT_WORKS = "aot plugin"
AOT_STATIC = "aot, 64 KiB static shared"
AOT_DYNAMIC = "aot, 64 KiB dynamic shared"
AOT_OP = "aot attention"
FP8_ATTENTION = "fp8 attention fused"
# Plans that TensorRT's lean runtime runs.
PORTABLE_NATIVE = "portable native attention"
PORTABLE_PLUGIN = "portable plugin"
PORTABLE_AOT = "portable aot attention"
PROBES = (
    NATIVE_BUILDS, CAPTURED, SLOT, FP8_PRODUCTS, PLUGIN_FP8, PLUGIN_PACKED, PLUGIN_CAPTURED,
    FUNCTION, AOT_WORKS, AOT_STATIC, AOT_DYNAMIC, AOT_OP, FP8_ATTENTION, PORTABLE_NATIVE,
    PORTABLE_PLUGIN, PORTABLE_AOT,
)  # fmt: skip


@dataclass(frozen=True)
class Proof:
    """Result of one check of `aapt doctor --tensorrt`."""

    name: str
    ok: bool
    found: str  # what was seen: figures, or the reason of a failure
    seconds: float


@dataclass(frozen=True)
class Choice:
    """Form of attention, and why it was taken."""

    form: str
    packed: bool  # FP8 caches travel as INT32
    captured: bool  # plans of this form can be captured into a CUDA graph
    reason: str


def cache_folder() -> Path:
    """Return the directory of this user's TensorRT files."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "aapt_deploy" / "tensorrt"


def receipt_file(here: Gpu) -> Path:
    return cache_folder() / f"proofs-{here.key}.json"


def timing_cache_file(here: Gpu) -> Path:
    """Return the timing cache of a GPU architecture and a TensorRT release."""
    return cache_folder() / f"timing-sm{here.sm}-{here.tensorrt}.bin"


def compiled_file(plan_sha256: str, here: Gpu) -> Path:
    """Return the file that keeps what TensorRT-RTX compiled from a plan for this GPU."""
    return cache_folder() / "compiled" / f"{plan_sha256[:32]}-sm{here.sm}-{here.tensorrt}.bin"


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all, and make its folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.write_bytes(data)


def save(here: Gpu, proofs: Iterable[Proof]) -> Path:
    """Keep a receipt. Raises OSError."""
    path = receipt_file(here)
    rows = [asdict(proof) for proof in proofs]
    content = {"format": FORMAT, "verified_on": asdict(here), "proofs": rows}
    write_whole(path, json.dumps(content, indent=1).encode())
    return path


def load(here: Gpu) -> dict[str, Proof] | None:
    """Return the proofs of exactly this machine by name; None if there is no whole receipt."""
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


def choose(proofs: dict[str, Proof] | None, fp8: bool, portable: bool = False) -> list[Choice]:
    """Return the forms that are proved here, the best first; TensorRT's own attention is last.

    `fp8` if there are scales for FP8 caches, which our kernels need. `portable` if the lean runtime
    must run the plan, which needs a proof of its own for our kernels.
    """

    def proved(*names: str) -> bool:
        return all(name in (proofs or {}) and (proofs or {})[name].ok for name in names)

    why = "nothing better is proved here"
    if proofs is None:
        why = "aapt doctor --tensorrt has not been run on this machine with these versions"
    elif portable and not proved(PORTABLE_PLUGIN):
        why = "that the lean runtime runs plans with our kernels is not proved here"
    if not fp8:
        why = "our kernels need the FP8 scales of an fp8 bundle"
    captured = proved(CAPTURED) or proofs is None  # if not disproved: opening fails otherwise
    choices = [Choice(NATIVE, False, captured, why)]
    if fp8 and proved(FP8_ATTENTION):
        choices.insert(0, Choice(NATIVE_FP8, False, captured, "proved here, without our kernels"))
    if fp8 and proved(AOT_WORKS, AOT_OP, *((PORTABLE_AOT,) if portable else ())):
        choices.insert(0, Choice(AOT, False, captured, "proved here; the plan holds our kernels"))
    carried = not portable or proved(PORTABLE_PLUGIN)
    if fp8 and carried and (proved(PLUGIN_FP8) or proved(PLUGIN_PACKED)):
        packed = not proved(PLUGIN_FP8)
        choices.insert(0, Choice(PYTHON, packed, proved(PLUGIN_CAPTURED), "proved here"))
    return choices
