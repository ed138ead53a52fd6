"""The options of all commands. Names, precisions and formats come from the tables that define them.

An option that several commands share means the same in each.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from aapt_deploy.backends.table import BACKENDS, options
from aapt_deploy.errors import OutputError, UsageError
from aapt_deploy.video.formats import DEFAULT_PIPE_FORMAT, FORMATS, SUFFIXES


def listed(words: Iterable[str], last: str = "or") -> str:
    """Return `a, b or c`."""
    *others, final = words
    return f"{', '.join(others)} {last} {final}" if others else final


def precisions_of(*names: str) -> str:
    """List the precisions of the backends of these --backend values, or of all."""
    rows = [row for row in BACKENDS.values() if not names or row.option in names]
    return listed(dict.fromkeys(name for row in rows for name in row.precisions))


def _needs_stdout(asked: bool) -> bool:
    """Refuse --json without a stdout before any work is done: its line would be lost."""
    if asked and sys.stdout is None:
        hint = "send it to a file or a pipe, or leave out --json"
        raise OutputError("stdout is closed, and --json writes to it", hint)
    return asked


def sms(text: str | None) -> tuple[int, ...]:
    """Return compute capabilities x 10 from such as 89,120 or 8.9,12.0. Raises UsageError."""
    words = [] if text is None else [word.strip() for word in text.split(",")]
    if wrong := [
        word for word in words if not re.fullmatch(r"[1-9][0-9]{1,2}|[1-9][0-9]?\.[0-9]", word)
    ]:
        hint = "compute capabilities with commas between them, such as --sm 89,120"
        raise UsageError(f"--sm: {wrong[0]!r} is no compute capability", hint)
    return tuple(int(word.replace(".", "")) for word in words)


_PLACES = listed(f"{name} ({row.summary})" for name, row in options().items())
_UNBUILT = [f"{r.option} on {r.device}" for r in BACKENDS.values() if not r.needs_build]
_BUILT = [row for row in BACKENDS.values() if row.needs_build]
_LATER = [f"{row.name} {p}" for row in _BUILT for p in row.precisions if p not in row.by_default]
_BUILDS = "; ".join(f"{row.name}: {listed(row.precisions)}" for row in _BUILT)
_FORMS = "; ".join(f"{row.name}: auto, {listed(row.forms)}" for row in _BUILT if row.forms)

# Shared.
BundleArg = Annotated[
    Path, Argument(help="Bundle directory, made by `aapt export`.", metavar="BUNDLE")
]
Backend = Annotated[str, Option(help=f"Where to run: {_PLACES}.")]
Device = Annotated[
    str | None, Option(help=f"cpu or cuda. Only {listed(_UNBUILT)} runs without build-engine.")
]
Precision = Annotated[
    str | None, Option(help=f"{precisions_of()}. Default: the profile's own, if it was built.")
]
Json = Annotated[
    bool, Option("--json", callback=_needs_stdout, help="Print one line of JSON on stdout.")
]
Force = Annotated[bool, Option("--force", help="Replace what exists at --out.")]
ProfileName = Annotated[str, Option("--profile", help="Shipped preset or TOML file.")]

# export
CheckpointArg = Annotated[
    Path | None,
    Argument(help="Checkpoint (.safetensors). Default: the embedded one.", metavar="CKPT"),
]
BundleOut = Annotated[Path, Option("--out", "-o", help="Bundle directory to write.")]
Sha256 = Annotated[str | None, Option(help="Refuse the checkpoint unless it has this hash.")]
ExportPrecision = Annotated[
    str, Option(help="fp32, or fp8: linear layers in e4m3, calibrated on rollouts.")
]
ScalesFile = Annotated[
    Path | None, Option(help="With fp8: take the scales of this file instead of calibrating.")
]

# build-engine
BuildPrecision = Annotated[
    str | None,
    Option(help=f"{_BUILDS}. Default: all that fit the bundle, except {listed(_LATER, 'and')}."),
]
Attention = Annotated[
    str, Option(help=f"{_FORMS}. auto takes the best that `aapt doctor --tensorrt` proved here.")
]

_NAMED = listed(row.name for row in _BUILT if row.names_sms)
TargetSms = Annotated[
    str | None,
    Option(
        "--sm",
        help=f"{_NAMED}: compute capabilities to build for, such as 89,120; no GPU is needed. "
        "Default: the GPU that is here, else the common ones.",
    ),
]

_PORTABLE = listed(row.name for row in _BUILT if row.portable)
Portable = Annotated[
    bool,
    Option(
        "--portable",
        help=f"{_PORTABLE}: build plans that TensorRT's lean runtime of the same release can run, "
        "on a host without TensorRT. They can be slower.",
    ),
]

# profile, plan, diff, quality
BundleOrPreset = Annotated[
    Path,
    Argument(
        help="Bundle directory; with --device cuda also a preset or TOML file.", metavar="BUNDLE"
    ),
]
Blocks = Annotated[int, Option(min=10, help="Blocks to measure after the cold ones.")]
Preset = Annotated[str, Argument(help="Preset, TOML file or bundle directory.", metavar="PROFILE")]
Gpu = Annotated[str | None, Option(help="Another GPU than the profile's, as `RTX 4090`.")]
RecordA = Annotated[Path, Argument(help="Record of `aapt profile --json`.", metavar="A")]
RecordB = Annotated[Path, Argument(help="The record to compare with it.", metavar="B")]
Reference = Annotated[
    str | None,
    Option(
        help="Engine to compare with, as BACKEND-PRECISION. "
        "Default: onnxruntime-fp32; torch-bf16 for an fp8 bundle."
    ),
]
ReferenceBundle = Annotated[
    Path | None,
    Option(help="Bundle of the same checkpoint with the reference engine. Default: BUNDLE."),
]
RolloutSeconds = Annotated[int, Option(min=1, help="Length of each rollout, one per start frame.")]
Plot = Annotated[
    Path | None, Option(help="Plot the curves to this .png, .svg or .pdf (needs matplotlib).")
]

# stream and demo
StreamOut = Annotated[
    str, Option("--out", "-o", help=f"File ({' '.join(SUFFIXES)}), or - for stdout.")
]
FormatName = Annotated[
    str | None,
    Option(help=f"{listed(FORMATS)}. Default: from the suffix; {DEFAULT_PIPE_FORMAT} for -."),
]
Seconds = Annotated[float | None, Option(help="Length of the video. Default: until Ctrl-C.")]
Seed = Annotated[int, Option(min=0, help="The same seed gives the same frames.")]
Image = Annotated[str | None, Option(help="Picture to start from, or the name of a start frame.")]
Prompt = Annotated[
    str | None,
    Option(help='Look of the world ("desert at dusk, clear"), or a text encoder\'s .npy file.'),
]
Encoder = Annotated[
    Path | None, Option(help="Folder of a text encoder: --prompt is words, as in `aapt prompt`.")
]
ControlLines = Annotated[
    str | None, Option(help="File with JSON lines of camera velocities, or - for stdin.")
]
Realtime = Annotated[
    bool | None,
    Option("--realtime/--fast", help="Pace at the profile's fps. Default: only with --controls -."),
]
DemoOut = Annotated[Path, Option("--out", "-o", help="Folder for bundle and video.")]
DemoSeconds = Annotated[float, Option(help="Length of the video.")]

# init
ProfileArg = Annotated[str, Argument(help="Shipped preset or TOML file.", metavar="PROFILE")]
CheckpointOut = Annotated[Path, Option("--out", "-o", help="Checkpoint to write.")]
WeightSeed = Annotated[int, Option(min=0, help="The same seed gives the same weights.")]
WeightDevice = Annotated[str, Option(help="Where to draw them: cpu, or cuda, in seconds.")]

# doctor
CheckedBundle = Annotated[
    Path | None, Argument(help="Check every file of this bundle instead.", metavar="BUNDLE")
]
Tensorrt = Annotated[
    bool,
    Option("--tensorrt", help="Run one micro-engine per question in TensorRT, for build-engine."),
]

# train
ClipsOut = Annotated[Path, Argument(help="Folder for the clips; resumes if the folder has some.")]
Worlds = Annotated[int, Option(min=1, help="Worlds to render, two clips each.")]
FirstSeed = Annotated[int, Option(min=0, help="Seed of the first world.")]
ClipBlocks = Annotated[int, Option(min=2, help="Blocks of four frames per clip, six a second.")]
Processes = Annotated[int, Option(min=1, help="Processes that render.")]
Videos = Annotated[
    Path | None,
    Option(help="Cut this video, or all in this folder, into clips instead of rendering."),
]
ForceClips = Annotated[bool, Option("--force", help="Make clips of another length or size again.")]
Clips = Annotated[Path, Argument(help="Folder of clips, made by `aapt train data`.")]
RunFolder = Annotated[Path, Option("--run", help="Folder of the run; resumes an interrupted run.")]
Recipe = Annotated[
    str,
    Option(
        "--recipe",
        help="demo, demo-causal, -clip, -bidirectional-clip, -consistency, -anchored, or paper.",
    ),
]
Begin = Annotated[
    Path | None,
    Option("--from", help="Checkpoint with a VAE and a flow-matching generator to start from."),
]
Distilled = Annotated[
    Path | None, Option(help="With --from: a one-step checkpoint, instead of distillation.")
]
TrainDevice = Annotated[str, Option(help="cpu or cuda.")]
Bf16 = Annotated[
    bool | None,
    Option("--bf16/--no-bf16", help="Mixed precision. Default: if the hardware has it."),
]
Context = Annotated[
    int, Option(min=1, help="Under torchrun: processes that share each batch, tokens and heads.")
]
Checkpointing = Annotated[
    bool,
    Option(
        "--checkpointing", help="Recompute blocks in the backward pass: less memory, more time."
    ),
]
Everything = Annotated[
    Path, Argument(help="Folder for clips, run and evaluation; resumes an interrupted command.")
]
Flights = Annotated[int, Option(min=1, help="Held-out worlds, one flight each.")]
FlightSeconds = Annotated[int, Option(min=5, help="Length of a flight, a multiple of 5.")]
Judged = Annotated[
    list[Path],
    Argument(help="Bundles with engines, or checkpoints, side by side.", metavar="BUNDLE..."),
]
EvaluationOut = Annotated[
    Path, Option("--out", "-o", help="Folder for evaluation.json, curves.png and sheets.")
]


def command_named(command: object, words: list[str]) -> str:
    """Return `aapt` with the commands below `command` that `words` begin with.

    The parser does not name the command of an option without its value.
    """
    path = "aapt"
    for word in words:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        path += f" {word}"
    return path
