"""Options that mean the same in every command. Backends and precisions come from the table of backends."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from aapt_deploy.backends.table import BACKENDS, options
from aapt_deploy.errors import OutputError


def _needs_stdout(asked: bool) -> bool:
    """Refuse --json without a stdout before any work is done: its line would be lost."""
    if asked and sys.stdout is None:
        raise OutputError("stdout is closed, and --json writes to it", "send it to a file or a pipe, or leave out --json")
    return asked


BundleArg = Annotated[Path, typer.Argument(help="Bundle directory, made by `aapt export`.", metavar="BUNDLE")]


def listed(words: Iterable[str], last: str = "or") -> str:
    """`a, b or c`."""
    *others, final = words
    return f"{', '.join(others)} {last} {final}" if others else final


def precisions_of(*names: str) -> str:
    """Every precision of the backends of these --backend values, or of all, in the order of the table."""
    return listed(dict.fromkeys(name for row in BACKENDS.values() if not names or row.option in names for name in row.precisions))


_WITHOUT_BUILD = [row for row in BACKENDS.values() if not row.needs_build]

Backend = Annotated[str, typer.Option(help=f"Where to run: {listed(f'{name} ({row.summary})' for name, row in options().items())}.")]
Device = Annotated[
    str | None,
    typer.Option(help=f"cpu or cuda. Only {listed(f'{row.option} on {row.device}' for row in _WITHOUT_BUILD)} runs without build-engine."),
]
Precision = Annotated[str | None, typer.Option(help=f"{precisions_of()}. Default: the profile's own, if it was built.")]
Json = Annotated[bool, typer.Option("--json", callback=_needs_stdout, help="Print one line of JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what exists at --out.")]
ProfileName = Annotated[str, typer.Option("--profile", help="Shipped preset or TOML file.")]


def command_named(command: object, words: list[str]) -> str:
    """`aapt` with the commands below `command` that `words` begin with: the parser does not say which one an option without its value belongs to."""
    path = "aapt"
    for word in words:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        path += f" {word}"
    return path
