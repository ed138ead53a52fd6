"""Messages for people: in colour and in place on a terminal, else as plain lines."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from aapt_deploy.cli import console
from aapt_deploy.cli.standard_streams import Guarded

RED, YELLOW, CYAN = "\x1b[1;31m", "\x1b[33m", "\x1b[36m"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def shown(self) -> str:
        """What was written, without the moves of the cursor and colours."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    made = Terminal()
    monkeypatch.setattr(console, "sys", SimpleNamespace(stderr=made))  # pytest has sys.stderr
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "100"), ("LINES", "20")):
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in its only item."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


# --- lines ---


def test_labels_are_coloured_on_a_terminal_and_their_text_is_not(terminal: Terminal) -> None:
    console.warn("low [space]")
    console.fail("no\n  such  file", "look\nelsewhere")
    console.say("[bold]as it is[/bold]")
    lines = terminal.getvalue().splitlines()
    assert lines[0].startswith(f"{YELLOW}warning: ") and lines[1].startswith(f"{RED}error: ")
    assert lines[2].startswith(f"{CYAN}hint: ")
    assert terminal.shown.splitlines() == [
        "warning: low [space]", "error: no such file", "hint: look elsewhere",
        "[bold]as it is[/bold]",
    ]  # fmt: skip


def test_elsewhere_they_are_plain_lines_however_long(capsys: pytest.CaptureFixture[str]) -> None:
    long = "word " * 100
    console.warn(long)
    console.fail("wrong", "")
    assert capsys.readouterr().err.splitlines() == [f"warning: {long}", "error: wrong"]


def test_a_console_is_as_wide_as_its_terminal_and_wide_where_there_is_none(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = console.stderr()
    assert made.width == 100 and made.is_terminal and isinstance(made.file, Guarded)
    monkeypatch.setattr(console, "sys", SimpleNamespace(stderr=io.StringIO()))
    assert console.stderr().width == console.WIDE == 160 and not console.stderr().is_terminal


def test_a_table_has_its_first_column_left_and_the_others_right(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [("a", "1.5", "[x]"), ("longer", "10.25", "y")]
    console.table("figures", ("name", "value", "z" * 50), rows)
    lines = [line.rstrip() for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "figures",
        "name    value  " + "z" * 50,
        "a         1.5  " + "[x]".rjust(50),
        "longer  10.25  " + "y".rjust(50),
    ]


def test_a_table_on_a_terminal_has_a_bold_title(terminal: Terminal) -> None:
    console.table("figures", ("name",), [("a",)])
    assert "\x1b[1mfigures" in terminal.getvalue()


# --- progress ---


def test_without_a_terminal_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with console.progress("working") as report:
        for after in (0.0, console.PLAIN_EVERY_S - 0.1, 0.1, console.PLAIN_EVERY_S):
            clock[0] += after
            report(f"at {clock[0]:.1f}")
    assert capsys.readouterr().err.splitlines() == [
        "working", "at 1000.0", "at 1005.0", "at 1010.0",
    ]  # fmt: skip


def test_every_step_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with console.steps("working") as report:
        report("one")
        report("two")
    assert capsys.readouterr().err.splitlines() == ["working", "one", "two"]


class Status:
    def __init__(self) -> None:
        self.shown: list[str] = []

    def update(self, text: object) -> None:
        self.shown.append(str(text))


def test_on_a_terminal_the_same_text_is_shown_again_only_now_and_then(clock: list[float]) -> None:
    status = Status()
    report = console.Progress(status)  # type: ignore[arg-type]
    for text, after in (
        ("a", 0.0), ("a", 0.1), ("b", 0.0), ("b", console.LIVE_EVERY_S), ("b", 0.1),
    ):  # fmt: skip
        clock[0] += after
        report(text)
    assert status.shown == ["a", "b", "b"]
    steps = console.Steps(status)  # type: ignore[arg-type]
    steps("b")
    steps("b")
    assert status.shown == ["a", "b", "b", "b", "b"]


@pytest.mark.parametrize("kind", ["progress", "steps"])
def test_on_a_terminal_the_job_is_a_status_line_that_leaves_nothing_behind(
    terminal: Terminal, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    with getattr(console, kind)("work[ing]") as report:
        assert isinstance(report, console.Steps if kind == "steps" else console.Progress)
        assert report.status is not None and str(report.status.status) == "work[ing]"
        report("half [done]")
        assert str(report.status.status) == "half [done]"
        console.say("a line above it")
    assert "a line above it\n" in terminal.shown and "half [done]" in terminal.shown
    assert "\x1b[2K" in terminal.getvalue(), "the line is erased in the end"


def test_on_a_terminal_nested_phases_are_bars(terminal: Terminal) -> None:
    with console.phases("building") as phases:
        assert phases.bars is not None and phases.bars.live.transient
        columns = [type(column).__name__ for column in phases.bars.columns]
        assert columns == ["TextColumn", "BarColumn", "MofNCompleteColumn", "TimeElapsedColumn"]
        phases("generator [1]")
        phases.phase("Building [x]", None, 4)
        phases.phase("Timing", "Building [x]", 10)
        phases.step("Timing", 6)
        phases.bars.refresh()
        assert [(task.description, task.completed, task.total) for task in phases.bars.tasks] == [
            ("Building [x]", 0, 4), ("  Timing", 7, 10),
        ]  # fmt: skip
        phases.done("unknown")
        phases.done("Timing")
        assert [task.description for task in phases.bars.tasks] == ["Building [x]"]
    assert terminal.shown.startswith("building\n") and "generator [1]\n" in terminal.shown
    assert "Building [x]" in terminal.shown and "7/10" in terminal.shown


def test_bars_are_drawn_on_stderr(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    with console.phases("building") as phases:
        assert phases.bars is not None and isinstance(phases.bars.console, Console)
        assert phases.bars.console.is_terminal
        phases.phase("One", None, 0)
        assert [task.total for task in phases.bars.tasks] == [None], "of unknown length"
    assert "One" in terminal.shown and capsys.readouterr().out == ""
