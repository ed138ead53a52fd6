"""Standard streams that are closed, full or left by their reader, in real processes.

Lost messages stop no work; lost data is an error.
"""

import io
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from aapt_deploy.cli import standard_streams
from aapt_deploy.cli.standard_streams import Guarded, settle
from aapt_deploy.errors import OutputError
from tests.support.commands import COMMAND, ENVIRONMENT

AAPT = " ".join(COMMAND)
pytestmark = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


def shell(line: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run `line` in bash with $AAPT and pipefail, inside `folder`."""
    command = ["bash", "-o", "pipefail", "-c", line]
    return subprocess.run(
        command,
        cwd=folder,
        env=ENVIRONMENT | {"AAPT": AAPT},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="module")
def whole(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that an undisturbed stream writes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert shell(f"$AAPT stream {bundle} -o x.mkv --seconds 1", folder).returncode == 0
    return (folder / "x.mkv").read_bytes()


# --- stderr


@pytest.mark.parametrize(
    "redirected", ["2>/dev/full", "2>&-", "2> >(true)", "2> >(head -c 5 >/dev/null)"]
)
def test_a_stream_goes_on_without_its_stderr(
    bundle: Path, whole: bytes, tmp_path: Path, redirected: str
) -> None:
    done = shell(f"$AAPT stream {bundle} -o x.mkv --seconds 1 --json {redirected}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frames"] == 24
    assert os.listdir(tmp_path) == ["x.mkv"]
    assert (tmp_path / "x.mkv").read_bytes() == whole


def test_frames_on_stdout_survive_a_stderr_whose_reader_left(bundle: Path, tmp_path: Path) -> None:
    lines = [
        f"$AAPT stream {bundle} -o - --seconds 1 {redirected} > {name}"
        for name, redirected in (("a", ""), ("b", "2> >(true)"), ("c", "2>&-"))
    ]
    assert [shell(line, tmp_path).returncode for line in lines] == [0, 0, 0]
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b == c != b""


REDIRECTED = ["2>/dev/full", "2>&-", "2> >(true)"]
SHORT = [
    (arguments, code, redirected)
    for arguments, code in [("bogus", 2), ("", 2), ("profile nowhere", 4)]
    for redirected in REDIRECTED
]


@pytest.mark.parametrize(("arguments", "code", "redirected"), SHORT)
def test_exit_codes_need_no_stderr(
    tmp_path: Path, arguments: str, code: int, redirected: str
) -> None:
    done = shell(f"$AAPT {arguments} {redirected}", tmp_path)
    assert (done.returncode, done.stdout) == (code, "")


def test_closed_streams_are_no_door_into_the_users_files(tmp_path: Path) -> None:
    """A new file takes the lowest free number; at 1 or 2 it would get what libraries print."""
    mine = "os.open('mine', os.O_WRONLY | os.O_CREAT)"
    code = f"import os, sys; from aapt_deploy import __main__ as m; m.occupy(); sys.exit({mine})"
    done = shell(f'{COMMAND[0]} -c "{code}" <&- >&- 2>&-', tmp_path)
    assert done.returncode > 2


# --- stdout


@pytest.mark.parametrize("arguments", ["doctor --json", "--help", "--version", "train --help"])
def test_a_full_stdout_is_one_error(tmp_path: Path, arguments: str) -> None:
    done = shell(f"$AAPT {arguments} >/dev/full", tmp_path)
    assert done.returncode == 6
    assert done.stderr.splitlines()[-2:] == [
        "error: stdout cannot be written: No space left on device",
        "hint: free some space, or send the output elsewhere",
    ]
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_json_to_a_closed_stdout_is_refused_before_work_is_done(
    bundle: Path, tmp_path: Path
) -> None:
    done = shell(f"$AAPT stream {bundle} -o x.mkv --seconds 1 --json >&-", tmp_path)
    assert done.returncode == 6
    assert done.stderr.splitlines() == [
        "error: stdout is closed, and --json writes to it",
        "hint: send it to a file or a pipe, or leave out --json",
    ]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("arguments", "code"), [("--version", 0), ("--help", 0)])
def test_a_reader_of_stdout_that_left_changes_nothing(
    tmp_path: Path, arguments: str, code: int
) -> None:
    done = shell(f"$AAPT {arguments} | true", tmp_path)
    assert done.returncode == code
    assert not [
        word for word in ("Traceback", "error:", "Exception ignored") if word in done.stderr
    ]


# --- the guard itself


class Broken(io.StringIO):
    """Fails as it is told to, and otherwise keeps what is written."""

    error: Exception | None = None

    def write(self, text: str) -> int:
        if self.error:
            raise self.error
        return super().write(text)

    def flush(self) -> None:
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    "error", [None, BrokenPipeError(), OSError(28, "No space left"), ValueError("closed")]
)
def test_messages_are_dropped_whatever_happens(error: Exception | None) -> None:
    stream = Broken()
    stream.error = error
    guarded = Guarded(stream)
    assert guarded.write("text") == 4
    guarded.flush()
    assert stream.getvalue() == ("" if error else "text")
    assert guarded.encoding == stream.encoding  # and all else is the stream's own


def test_data_is_never_lost_in_silence() -> None:
    stream = Broken()
    guarded = Guarded(stream, is_data=True)
    assert guarded.write("text") == 4 and stream.getvalue() == "text"
    stream.error = BrokenPipeError()
    assert guarded.write("nobody reads it") == 15
    guarded.flush()
    stream.error = OSError(28, "No space left")
    for work in (lambda: guarded.write("x"), guarded.flush):
        with pytest.raises(OutputError, match="stdout cannot be written: No space left") as caught:
            work()
        assert caught.value.exit_code == 6 and caught.value.hint
    stream.error = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        guarded.write("x")


def test_a_stream_that_is_missing_takes_everything() -> None:
    guarded = Guarded(None)
    assert guarded.write("text") == 4
    guarded.flush()
    assert guarded.isatty() is False
    closed = io.StringIO()
    closed.close()
    assert Guarded(closed).isatty() is False
    settle(None)
    settle(Broken())


def test_a_terminal_is_told_by_the_stream_below() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert Guarded(Terminal()).isatty() is True
    assert Guarded(io.StringIO()).isatty() is False


# --- the end of a process


class Stuck(Broken):
    """Cannot be flushed. Its number is that of a real file, or cannot be had."""

    def __init__(self, number: int | Exception) -> None:
        super().__init__()
        self.error, self.number = OSError(28, "No space left"), number

    def fileno(self) -> int:
        if isinstance(self.number, Exception):
            raise self.number
        return self.number


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), ValueError("closed")], ids=repr)
def test_text_that_cannot_be_written_goes_nowhere(
    tmp_path: Path, error: Exception, guarded: bool
) -> None:
    """The number of the stream leads to /dev/null from then on."""
    with (tmp_path / "out").open("w") as file:
        stream = Stuck(file.fileno())
        stream.error = error
        settle(Guarded(stream) if guarded else stream)  # type: ignore[arg-type]
        os.write(file.fileno(), b"lost")
        assert os.fstat(file.fileno()).st_rdev == os.stat(os.devnull).st_rdev
    assert (tmp_path / "out").read_text() == ""


def test_a_stream_that_can_be_written_stays_where_it_is(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        file.write("kept")
        settle(file)
        assert (tmp_path / "out").read_text() == "kept"
        assert os.fstat(file.fileno()).st_size == 4


@pytest.mark.parametrize("error", [OSError(9, "Bad file"), ValueError("closed")], ids=repr)
def test_a_stream_without_a_number_is_left_alone(error: Exception) -> None:
    settle(Stuck(error))
    settle(Stuck(1 << 20))  # no file has it


def test_closed_standard_streams_are_occupied_and_open_ones_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[tuple[str, int]] = []
    closed = {0, 2}

    def fstat(number: int) -> None:
        asked.append(number)
        if number in closed:
            raise OSError(9, "Bad file descriptor")

    asked: list[int] = []
    system = SimpleNamespace(
        fstat=fstat, open=lambda *given: opened.append(given), devnull=os.devnull, O_RDWR=os.O_RDWR
    )
    monkeypatch.setattr(standard_streams, "os", system)
    standard_streams.occupy()
    assert asked == [0, 1, 2] and opened == [(os.devnull, os.O_RDWR)] * 2
