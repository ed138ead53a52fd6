"""What several commands have in common: options that mean the same everywhere, and the error for a package that is not installed."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from aapt_deploy.errors import MachineError, OutputError, UsageError


def _needs_stdout(asked: bool) -> bool:
    """Refuse --json without a stdout before any work is done: its line would be lost."""
    if asked and sys.stdout is None:
        raise OutputError("stdout is closed, and --json writes to it", "send it to a file or a pipe, or leave out --json")
    return asked


BundleArg = Annotated[Path, typer.Argument(help="Bundle directory, made by `aapt export`.", metavar="BUNDLE")]
Backend = Annotated[str, typer.Option(help="onnxruntime (CPU), tensorrt (NVIDIA GPU; neither needs torch), or torch (eager, the reference).")]
Device = Annotated[str | None, typer.Option(help="With --backend torch: cpu, or cuda: our kernels on an NVIDIA GPU; nothing is built for them.")]
Precision = Annotated[str | None, typer.Option(help="fp32, int8 or fp8. Default: the profile's own, if it was built.")]
Json = Annotated[bool, typer.Option("--json", callback=_needs_stdout, help="Print one line of JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what exists at --out.")]
ProfileName = Annotated[str, typer.Option("--profile", help="Shipped preset or TOML file.")]


_PLACES = {  # backend and device -> the name among engine.BACKENDS
    ("onnxruntime", "cpu"): "onnxruntime", ("torch", "cpu"): "torch", ("torch", "cuda"): "torch-cuda", ("tensorrt", "cuda"): "tensorrt",
}  # fmt: skip


def placed(backend: str, device: str | None) -> str:
    """The backend's name once its device is known. Raises UsageError for a device that it does not run on, and for our own name of torch on a GPU."""
    if backend == "torch-cuda":
        raise UsageError(f"backend {backend!r} does not exist", "for torch on a GPU: --backend torch --device cuda")
    if device is None:
        return backend
    if (backend, device) not in _PLACES:
        places = ", ".join(f"--backend {name} --device {place}" for name, place in _PLACES)
        raise UsageError(f"backend {backend!r} does not run on device {device!r}", f"one of: {places}")
    return _PLACES[backend, device]


def command_named(command: object, words: list[str]) -> str:
    """`aapt` with the commands below `command` that `words` begin with: the parser does not say which one an option without its value belongs to."""
    path = "aapt"
    for word in words:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        path += f" {word}"
    return path


class needing:
    """Turn a missing package into the command that installs it."""

    def __init__(self, extra: str) -> None:
        self.extra = extra

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("aapt_deploy"):
            raise MachineError(f"package {error.name!r} is not installed", f"pip install 'aapt_deploy[{self.extra}]'") from None
