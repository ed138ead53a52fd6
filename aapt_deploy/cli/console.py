"""What people see: everything here goes to stderr, in colour on a terminal and as plain lines anywhere else. stdout belongs to data.

Nothing here stops a command: what stderr does not take (a full disk, a reader that left, no stderr at all) is lost, and the work goes on.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.status import Status
from rich.table import Table
from rich.text import Text

PLAIN_EVERY_S = 5.0  # between progress lines where there is no terminal
LIVE_EVERY_S = 0.25
WIDE = 160  # columns where there is no terminal: a table in a log must keep its figures


class Forgiving:
    """A text stream that may be None or fail, and then loses what is written to it."""

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def write(self, text: str) -> int:
        if self._stream is not None:
            with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError, ValueError):
                self._stream.flush()


def stderr() -> Console:
    """A console on today's sys.stderr; on the one below it while a status line of rich stands in its place."""
    stream = Forgiving(getattr(sys.stderr, "rich_proxied_file", sys.stderr))
    return Console(file=cast(IO[str], stream), highlight=False, soft_wrap=True, width=None if stream.isatty() else WIDE)


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


class Phases(Steps):
    """`Steps` of a job whose parts have phases of known length, each inside another: a bar for every open one. Called from any thread."""

    def __init__(self, bars: Bars | None) -> None:
        super().__init__(None)
        self.bars, self.open, self.doing = bars, dict[str, TaskID](), ""
        self.lock = threading.Lock()

    def __call__(self, text: str) -> None:
        self.doing = text
        if self.bars is None:
            say(text)
        else:
            self.bars.console.print(Text(text))

    def phase(self, name: str, parent: str | None, steps: int) -> None:
        """`name` begins, inside `parent`, with `steps` steps to come."""
        with self.lock:
            if self.bars is not None:
                self.open[name] = self.bars.add_task(name if parent is None else f"  {name}", total=steps or None)
            elif parent is None:
                say(f"{self.doing}: {name}")

    def step(self, name: str, step: int) -> None:
        """`step` steps of `name`, counted from 0, are done."""
        with self.lock:
            if self.bars is not None and name in self.open:
                self.bars.update(self.open[name], completed=step + 1)

    def done(self, name: str) -> None:
        with self.lock:
            if self.bars is not None and name in self.open:
                self.bars.remove_task(self.open.pop(name))


@contextmanager
def phases(text: str) -> Iterator[Phases]:
    """`Phases` for the length of a job."""
    console = stderr()
    say(text)
    if not console.is_terminal:
        yield Phases(None)
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Bars(*columns, console=console, transient=True) as bars:
        yield Phases(bars)


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
