"""What people see: everything here goes to stderr, in colour on a terminal and as plain lines anywhere else. stdout belongs to data."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

PLAIN_EVERY_S = 5.0  # between progress lines where there is no terminal
LIVE_EVERY_S = 0.25
WIDE = 160  # columns where there is no terminal: a table in a log must keep its figures


def stderr() -> Console:
    """A console on today's sys.stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True, width=None if sys.stderr.isatty() else WIDE)


def say(text: str) -> None:
    stderr().print(Text(text))


def warn(text: str) -> None:
    stderr().print(Text("warning: ", style="yellow").append(Text(text, style="default")))


def fail(text: str, hint: str) -> None:
    """The two lines that every error ends in."""
    console = stderr()
    console.print(Text("error: ", style="bold red").append(Text(_one_line(text), style="default")))
    if hint:
        console.print(Text("hint: ", style="cyan").append(Text(_one_line(hint), style="default")))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table, its first column to the left and the rest to the right."""
    drawn = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    stderr().print(drawn)


class Progress:
    """One line that tells how far a job is; call it with the line's text as often as you like."""

    def __init__(self, status: Status | None) -> None:
        self.status, self.shown, self.last = status, 0.0, ""

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if self.status is not None:
            if now - self.shown >= LIVE_EVERY_S or text != self.last:
                self.status.update(Text(text))
                self.shown, self.last = now, text
        elif now - self.shown >= PLAIN_EVERY_S:
            say(text)
            self.shown = now


class Steps(Progress):
    """Named steps of a job: every one is told, also where there is no terminal."""

    def __call__(self, text: str) -> None:
        if self.status is not None:
            self.status.update(Text(text))
        else:
            say(text)


@contextmanager
def progress(text: str) -> Iterator[Progress]:
    """A `Progress` for the length of a job."""
    with _showing(text) as status:
        yield Progress(status)


@contextmanager
def steps(text: str) -> Iterator[Steps]:
    """`Steps` for the length of a job."""
    with _showing(text) as status:
        yield Steps(status)


@contextmanager
def _showing(text: str) -> Iterator[Status | None]:
    console = stderr()
    if not console.is_terminal:
        say(text)
        yield None
        return
    with console.status(Text(text)) as status:
        yield status
