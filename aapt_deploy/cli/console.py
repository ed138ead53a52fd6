"""Messages for people, on stderr: in colour on a terminal, else as plain lines. stdout is for data.

Nothing here stops a command. Text that stderr does not take is dropped: a full disk, a reader that
left, no stderr at all.
"""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.status import Status
from rich.table import Table
from rich.text import Text

from aapt_deploy.cli.standard_streams import Guarded

PLAIN_EVERY_S = 5.0  # between progress lines where there is no terminal
LIVE_EVERY_S = 0.25
WIDE = 160  # columns where there is no terminal: a table in a log must keep its figures


def stderr() -> Console:
    """Return a console on the current sys.stderr, below the proxy of an open status line."""
    stream = Guarded(getattr(sys.stderr, "rich_proxied_file", sys.stderr))
    width = None if stream.isatty() else WIDE
    return Console(file=cast(IO[str], stream), highlight=False, soft_wrap=True, width=width)


def say(text: str) -> None:
    stderr().print(Text(text))


def warn(text: str) -> None:
    stderr().print(Text("warning: ", style="yellow").append(Text(text, style="default")))


def fail(text: str, hint: str) -> None:
    """Print the two lines of an error."""
    console = stderr()
    console.print(Text("error: ", style="bold red").append(Text(_one_line(text), style="default")))
    if hint:
        console.print(Text("hint: ", style="cyan").append(Text(_one_line(hint), style="default")))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, its first column aligned to the left and the rest to the right."""
    drawn = Table(title=title, title_justify="left", title_style="bold")
    drawn.box, drawn.pad_edge, drawn.padding = None, False, (0, 2, 0, 0)
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    stderr().print(drawn)


class Progress:
    """One line with the progress of a job. Call it with the text as often as you like."""

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
    """Named steps of a job. Each is printed, also without a terminal."""

    def __call__(self, text: str) -> None:
        if self.status is not None:
            self.status.update(Text(text))
        else:
            say(text)


class Phases(Steps):
    """`Steps` of a job with nested phases of known length: a bar for every open phase.

    Any thread may call it.
    """

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
        """Open phase `name` of `steps` steps, inside `parent`."""
        with self.lock:
            if self.bars is not None:
                label = name if parent is None else f"  {name}"
                self.open[name] = self.bars.add_task(label, total=steps or None)
            elif parent is None:
                say(f"{self.doing}: {name}")

    def step(self, name: str, step: int) -> None:
        """Show that step `step` of `name`, counted from 0, is done."""
        with self.lock:
            if self.bars is not None and name in self.open:
                self.bars.update(self.open[name], completed=step + 1)

    def done(self, name: str) -> None:
        with self.lock:
            if self.bars is not None and name in self.open:
                self.bars.remove_task(self.open.pop(name))


@contextmanager
def phases(text: str) -> Iterator[Phases]:
    """Open `Phases` for one job."""
    console = stderr()
    say(text)
    if not console.is_terminal:
        yield Phases(None)
        return
    label = TextColumn("{task.description}", markup=False)
    columns = (label, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        yield Phases(bars)


@contextmanager
def progress(text: str) -> Iterator[Progress]:
    """Open a `Progress` for one job."""
    with _showing(text) as status:
        yield Progress(status)


@contextmanager
def steps(text: str) -> Iterator[Steps]:
    """Open `Steps` for one job."""
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
