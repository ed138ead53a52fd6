"""Map TensorRT's messages to what a user can do: one table for all who call TensorRT.

The words are TensorRT's own, from its documentation and from public reports. A message that no
row matches is passed on as it is, with the way to report it.
"""

import re
from typing import NamedTuple


class Remedy(NamedTuple):
    """One row."""

    said: str  # pattern in TensorRT's message
    hint: str


SMALLER = (
    "close other programs on the GPU, or take a smaller profile; "
    "aapt plan NAME tells what one needs"
)
SAME_VERSION = "export the bundle and build the engine again with one version of aapt_deploy"
NEWER = "install a newer TensorRT: pip install --upgrade 'aapt_deploy[tensorrt]'"
NATIVE = (
    "build with --attention native to see whether our plugin is to blame, and report what aapt "
    "doctor --tensorrt finds"
)

REMEDIES = (
    Remedy(
        r"FP8 support|[Ff]p8 .*not supported|FP8 .*not supported",
        "FP8 needs SM 89 or newer; export with --precision fp32 and build with --precision bf16",
    ),
    Remedy(
        r"bfloat16|BF16 .*not supported|[Bb]f16 .*not supported",
        "bf16 needs SM 80 or newer; build with --precision fp32",
    ),
    Remedy(
        r"out of memory|OutOfMemory|insufficient memory|[Rr]equested size was|bad_alloc"
        r"|cudaErrorMemoryAllocation",
        SMALLER,
    ),
    Remedy(
        r"[Nn]o space left|disk (is )?full",
        "free some space where the bundle and the user's cache directory lie",
    ),
    Remedy(r"Could not find any implementation|no implementation|Skipping tactic", NATIVE),
    Remedy(r"supported formats|format combination|could not find any supported", SAME_VERSION),
    Remedy(
        r"lugin not found|getPluginCreator could not find|[Ff]ailed to create plugin|no creator",
        SAME_VERSION,
    ),
    Remedy(
        r"onShapeChange|status -1|Plugin.*(fail|error)|enqueue.*(fail|error)",
        "the driver may be older than the kernels: aapt doctor tells; or --attention native",
    ),
    Remedy(
        r"PTX|JIT compil|unsupported toolchain",
        "the driver is too old for the kernels' PTX: update it to release 565 or newer, "
        "or --attention python",
    ),
    Remedy(r"No importer registered|UNSUPPORTED_NODE|[Uu]nsupported (ONNX )?op|opset", NEWER),
    Remedy(
        r"Cannot open|[Ff]ailed to open|external data|weights? file|ModelImporter.*(read|open)",
        "the graph or the file with its weights is missing or cut short: export the bundle again",
    ),
    Remedy(
        r"[Dd]ata-dependent|dynamic (shape|input)|optimization profile",
        "every shape must be static: export the bundle again with this version",
    ),
    Remedy(
        r"type mismatch|[Tt]ypes? .*(must|not) (be |the )?(same|match|allowed)|[Ss]trongly.typed",
        SAME_VERSION,
    ),
    Remedy(
        r"Serialization assertion|[Vv]ersion tag does not match|stdVersionRead"
        r"|incompatible with .*version",
        "the plan is of another TensorRT: build the engine again: aapt build-engine",
    ),
    Remedy(
        r"different (model )?(device|GPU)|compute capability|generated .*incompatible device",
        "the plan is of another GPU: build the engine again on this one",
    ),
    Remedy(
        r"illegal memory|misaligned|launch fail|unspecified launch",
        "a kernel failed: run aapt doctor --tensorrt and report what it finds; "
        "--attention native does without ours",
    ),
    Remedy(
        r"insufficient driver|driver version|forward compatib|no CUDA-capable|CUDA initialization",
        "update the NVIDIA driver; in a container, pass the GPU in; "
        "aapt doctor tells what is missing",
    ),
    Remedy(
        r"cancel|[Ii]nterrupt",
        "the build was stopped; start it again, finished plans and timings are kept",
    ),
)
UNKNOWN = "see TensorRT's messages above; aapt doctor tells the versions to report"


def hint(text: str) -> str:
    """Return what can be done about a message of TensorRT."""
    return next((remedy.hint for remedy in REMEDIES if re.search(remedy.said, text)), UNKNOWN)
