"""What several commands have in common: options that mean the same everywhere, and the error for a package that is not installed."""

from pathlib import Path
from typing import Annotated

import typer

from aapt_deploy.errors import MachineError

BundleArg = Annotated[Path, typer.Argument(help="Bundle directory, made by `aapt export`.", metavar="BUNDLE")]
Backend = Annotated[str, typer.Option(help="onnxruntime (CPU), tensorrt (NVIDIA GPU; neither needs torch), or torch (eager, the reference).")]
Precision = Annotated[str | None, typer.Option(help="fp32, int8 or fp8. Default: the profile's own, if it was built.")]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")]
ProfileName = Annotated[str, typer.Option("--profile", help="Shipped preset or TOML file.")]


class needing:
    """Turn a missing package into the command that installs it."""

    def __init__(self, extra: str) -> None:
        self.extra = extra

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("aapt_deploy"):
            raise MachineError(f"package {error.name!r} is not installed", f"pip install 'aapt_deploy[{self.extra}]'") from None
