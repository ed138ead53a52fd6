"""Map TensorRT's messages to what a user can do: one table for all who call TensorRT.

The words are TensorRT's own, from its documentation, public reports and the real parser and
compiler. A message that no row matches is passed on as it is, with the way to report it.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from aapt_deploy.errors import AaptError, BundleError, MachineError

KEPT_MESSAGES = 20


class Remedy(NamedTuple):
    """One row."""

    said: str  # pattern in TensorRT's message
    hint: str
    kind: type[AaptError] = BundleError  # what is raised


class Messages:
    """TensorRT's last errors and warnings, to explain a failure."""

    def __init__(self, report: Callable[[str], None] | None = None) -> None:
        self.report, self.kept = report, list[str]()

    def log(self, severity: Any, msg: str) -> None:
        """Keep a message of `severity`, an ILogger.Severity."""
        if severity.name in ("INTERNAL_ERROR", "ERROR", "WARNING"):
            self.kept = [*self.kept, msg][-KEPT_MESSAGES:]
            if self.report:
                self.report(msg)


class NodeError(NamedTuple):
    """What the parser says of one node; "" where it names none."""

    operator: str
    name: str
    text: str


SMALLER = (
    "close other programs on the GPU, or take a smaller profile; "
    "aapt plan NAME tells what one needs"
)
SAME_VERSION = "export the bundle and build the engine again with one version of aapt_deploy"
EXPORT_AGAIN = "the graph is missing, cut short or empty: export the bundle again"
NEWER = "install a newer TensorRT: pip install --upgrade 'aapt_deploy[tensorrt]'"
NATIVE = (
    "build with --attention native to see whether our plugin is to blame, and report what aapt "
    "doctor --tensorrt finds"
)

NO_DRIVER = Remedy(
    r"cudaError (35|100)\b|insufficient driver|driver version|forward compatib|no CUDA-capable"
    r"|CUDA initialization",
    "install or update the NVIDIA driver; in a container, pass the GPU in; "
    "aapt doctor tells what is missing",
    MachineError,
)

# Where messages match several rows, the first row is the cause.
REMEDIES = (
    Remedy(
        r"HW-specific datatypes: fp8|FP8 support|[Ff]p8 .*not supported|FP8 .*not supported",
        "FP8 needs SM 89 or newer; export with --precision fp32 and build with --precision bf16",
        MachineError,
    ),
    Remedy(
        r"HW-specific datatypes: b16|for Turing|bfloat16.*not supported|[Bb][Ff]16 .*not supported",
        "bf16 needs SM 80 or newer; TensorRT itself builds --precision fp32 for older GPUs",
        MachineError,
    ),
    Remedy(
        r"dedicated kernel|is_decomposable",
        "there is no fused attention for this type and shape: build with --precision bf16; "
        "if that fails too, report the profile's head_dim",
    ),
    Remedy(
        r"Requested size was|within workspace limit|workspace memory greater",
        "the graph needs more scratch memory than there is, or than the build allows; "
        "take a smaller profile, or compare with aapt plan NAME and report it",
        MachineError,
    ),
    Remedy(
        r"out of memory|OutOfMemory|insufficient memory|bad_alloc|cudaErrorMemoryAllocation",
        SMALLER,
        MachineError,
    ),
    Remedy(
        r"[Nn]o space left|disk (is )?full",
        "free some space where the bundle and the user's cache directory lie",
        MachineError,
    ),
    Remedy(
        r"[Ii]nput file cannot be found|MODEL_DESERIALIZE_FAILED|[Ff]ailed to parse the ONNX model"
        r"|at least one output",
        EXPORT_AGAIN,
    ),
    Remedy(
        r"[Ff]ailed to open file|Cannot open|external (data|weights)|weights? file"
        r"|offset/length out of range|ModelImporter.*(read|open)",
        "the file with the graph's weights is missing, cut short or elsewhere: export the bundle "
        "again, and copy bundles whole",
    ),
    Remedy(
        r"UINT8|UInt8",
        f"pictures are uint8 only where they enter or leave a graph: {SAME_VERSION}",
    ),
    Remedy(
        r"must have (the )?same (input )?types?|type mismatch|[Ss]trongly.typed"
        r"|[Tt]ypes? .*(must|not) (be |the )?(same|match|allowed)|must have type",
        f"types in the graph contradict each other: {SAME_VERSION}",
    ),
    Remedy(
        r"but must match|must be conformable|[Ss]hape [Ee]rror|dimensions? .*(mismatch|must)",
        f"shapes in the graph contradict each other: {SAME_VERSION}",
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
        r"[Dd]ata-dependent|dynamic (shape|input)|optimization profile",
        "every shape must be static: export the bundle again with this version",
    ),
    Remedy(
        r"call to stub load",
        "TensorRT's lean runtime runs portable plans only: aapt build-engine --portable",
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
    NO_DRIVER,
    Remedy(
        r"cancel|[Ii]nterrupt",
        "the build was stopped; start it again, finished plans and timings are kept",
    ),
)
UNKNOWN = "see TensorRT's messages above; aapt doctor tells the versions to report"

# What the parser and the compiler say around a message, and lines that only repeat others.
_AROUND = re.compile(
    r"^(?:\[\w+\.(?:cpp|hpp|h)\b[^\]]*\]:?\s*|\w+\.(?:cpp|hpp|h)(?:::\w+)*::?\d+:\s*"
    r"|\w+Exception: |WARNING |\w+::\w+: |Error Code \d+: |\(\w+\): |Assertion failed: |ERROR: )"
)
_KIND = re.compile(r"^(?:API Usage Error|Internal Error|Shape Error|Cuda Runtime|Myelin) \((.*)\)$")
_PLACE = re.compile(r"[.;]? In \w+ at \S+?:\d+(?=\)|$)|\[\w+\.\w+:\d+: \w+\] ")
_REPEATED = re.compile(
    r"^While parsing node number|^--- (?:Begin|End) node|^Node name: |^Invalid Node - "
    r"|^ModelImporter\.cpp:\d+: (?:ERROR|---|While)|^\[\d+\] Invalid Node|In function parseNode"
)


def sentences(text: str) -> list[str]:
    """Return the lines of a message without its places in TensorRT's own source."""
    found = []
    for line in text.splitlines():
        before, line = "", line.strip()
        if _REPEATED.search(line):
            continue
        while line != before:
            before, line = line, _AROUND.sub("", _PLACE.sub("", line))
            line = _KIND.sub(r"\1", line)
        if line and line not in found:
            found.append(line)
    return found


def _row(sentence: str) -> int:
    """Return the place of a sentence's row in the table; behind it if there is none.

    A driver's absence comes last: on a machine without a GPU it is told with every failure.
    """
    rows = (i for i, remedy in enumerate(REMEDIES) if re.search(remedy.said, sentence))
    row = next(rows, len(REMEDIES))
    return row if row == len(REMEDIES) or REMEDIES[row] is not NO_DRIVER else len(REMEDIES) + 1


def refusal(what: str, nodes: Iterable[NodeError], kept: Iterable[str]) -> AaptError:
    """Return the error for what TensorRT refused: the cause first, on one line, once.

    `nodes` are the parser's own errors, `kept` the log. A message that is in the table wins, the
    higher in the table the better, then the earlier one.
    """
    said = [(node, line) for node in nodes for line in sentences(node.text)]
    first = said[0][0] if said else NodeError("", "", "")
    said += [(first, line) for text in kept for line in sentences(text)]
    if not said:
        return BundleError(f"{what}: it gave no reason", UNKNOWN)
    node, line = min(said, key=lambda entry: _row(entry[1]))
    named = f"{node.operator} node {node.name!r}: " if node.operator else ""
    line = line.removeprefix(f"{node.name}: ") if named else line
    remedy = _remedy(line)
    kind: type[AaptError] = remedy.kind if remedy else BundleError
    return kind(f"{what}: {named}{line}", remedy.hint if remedy else UNKNOWN)


def _remedy(sentence: str) -> Remedy | None:
    return next((remedy for remedy in REMEDIES if re.search(remedy.said, sentence)), None)
