"""bench/stages.py: whatever ends a stage, the parts that it had finished are kept."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support import ROOT

BENCH = ROOT / "bench"
# A stage of three parts; what happens in the second is an argument.
STAGE = """
import os, signal, subprocess, sys, time
sys.path.insert(0, {bench!r})
from stages import AGAIN, Parts
fault, given = sys.argv[1], sys.argv[2:]
skip = given[given.index("--skip") + 1 :] if "--skip" in given else []
parts = Parts(skip, float(given[1]), printed=True)

def second():
    if fault == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    if fault == "raise":
        raise RuntimeError("refused\\nat length")
    if fault == "crash":
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault == "leave":
        os._exit(0)
    if fault == "again":
        raise SystemExit(AGAIN)
    if fault == "noise":
        print("[1, 2] is no part")
        print('{{"half":')
    if fault == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(child.pid, flush=True)
    return {{"value": 2}}

parts.run("first", lambda: {{"value": 1}})
parts.run("second", second, 1.0 if fault == "hang" else None)
parts.run("third", lambda: [3, parts.left() > 0])
"""


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    import stages as module

    return module


class Ran:
    """One stage as its bench sees it."""

    def __init__(
        self,
        stages: ModuleType,
        folder: Path,
        fault: str,
        seconds: float,
        skip: Any = (),
    ) -> None:
        script = folder / "stage.py"
        script.write_text(STAGE.format(bench=str(BENCH)))
        self.parts: dict[str, Any] = {}
        self.told: list[str] = []
        command = [sys.executable, str(script), fault]
        heard = lambda name, result: self.parts.__setitem__(name, result)
        begin = time.monotonic()
        self.ended = stages.run_stage(command, seconds, heard, self.told.append, skip)
        self.took = time.monotonic() - begin


FIRST, THIRD = {"value": 1}, [3, True]


@pytest.mark.parametrize("fault", ["none", "noise"])
def test_a_stage_without_faults_is_finished(stages: ModuleType, tmp_path: Path, fault: str) -> None:
    ran = Ran(stages, tmp_path, fault, 30)
    assert ran.parts == {"first": FIRST, "second": {"value": 2}, "third": THIRD}
    assert ran.ended["finished"] and ran.ended["exit_code"] == 0 and "error" not in ran.ended
    assert ran.told == (["[1, 2] is no part", '{"half":'] if fault == "noise" else [])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise", "RuntimeError: refused"),
        ("crash", "exit code -11: last words"),
        ("again", "exit code 75"),
        ("hang", "second took too long"),
    ],
)
def test_a_part_that_fails_is_lost_alone(
    stages: ModuleType,
    tmp_path: Path,
    fault: str,
    words: str,
) -> None:
    ran = Ran(stages, tmp_path, fault, 40)
    assert ran.parts["first"] == FIRST and ran.parts["third"] == THIRD
    assert words in ran.parts["second"]["error"] and "\n" not in ran.parts["second"]["error"]
    assert ran.ended["finished"]


def test_a_stage_whose_time_is_up_keeps_what_it_had(
    stages: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patient = STAGE.replace("1.0 if fault", "None if fault")
    monkeypatch.setattr(sys.modules[__name__], "STAGE", patient)
    ran = Ran(stages, tmp_path, "hang", 2)
    assert ran.parts == {"first": FIRST} and not ran.ended["finished"]
    assert ran.ended["error"] == "took longer than 2 s" and ran.took < 10


def test_what_a_stage_started_ends_with_it(stages: ModuleType, tmp_path: Path) -> None:
    """And does not keep the stage waiting, though it has the same output open."""
    ran = Ran(stages, tmp_path, "child", 30)
    assert ran.ended["finished"] and ran.took < 20
    (pid,) = ran.told
    state = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] in "ZX":
            return
        time.sleep(0.05)
    pytest.fail("it lives on")


def test_a_stage_that_leaves_inside_a_part_begins_again(stages: ModuleType, tmp_path: Path) -> None:
    ran = Ran(stages, tmp_path, "leave", 30)
    assert "exit code 0" in ran.parts["second"]["error"] and ran.parts["third"] == THIRD


def test_parts_of_an_earlier_try_are_not_run_again(stages: ModuleType, tmp_path: Path) -> None:
    ran = Ran(stages, tmp_path, "crash", 30, ["first", "second"])
    assert ran.parts == {"third": THIRD}


def test_a_program_that_cannot_start_is_told(stages: ModuleType) -> None:
    ended = stages.run_stage(["/nowhere/python"], 5, lambda *_: None, lambda _: None)
    assert not ended["finished"] and "FileNotFoundError" in ended["error"]


# --- the folder ---


def test_a_record_survives_a_full_disk_and_is_whole_when_there_is_room(
    stages: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = tmp_path / "record.tmp"
    full.symlink_to("/dev/full")  # every write ends in "no space left on device"
    (tmp_path / "log.txt").symlink_to("/dev/full")
    record = stages.Record(tmp_path, {"what": "a run"})
    record.note("wide", "overlapped", {"fps": 1})
    record.say("goes on")
    assert "No space left" in record.complaint and not record.path.exists()
    said = capsys.readouterr()
    assert json.loads(said.out) == {"stage": "wide", "part": "overlapped", "result": {"fps": 1}}
    assert said.err.count("cannot write") == 1 and "goes on" in said.err
    full.unlink()
    record.note("wide", "stages", {})
    wanted = {"what": "a run", "wide": {"overlapped": {"fps": 1}, "stages": {}}}
    assert json.loads(record.path.read_text()) == wanted and record.complaint == ""
    assert stages.Record(tmp_path, {}).found == wanted


def test_a_damaged_record_is_set_aside(stages: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text('{"half": ')
    assert stages.Record(tmp_path, {"what": "anew"}).found == {"what": "anew"}
    assert (tmp_path / "record.damaged.json").read_text() == '{"half": '


def test_a_closed_stdout_is_no_reason_to_stop(tmp_path: Path) -> None:
    lines = f"import sys; sys.path.insert(0, {str(BENCH)!r})\n"
    lines += "import stages; from pathlib import Path\n"
    lines += f"r = stages.Record(Path({str(tmp_path)!r}), {{}}); r.note('a', 'b', 1)"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", lines], stdout=full, check=False)
    assert json.loads((tmp_path / "record.json").read_text()) == {"a": {"b": 1}}
    assert done.returncode in (0, 120)  # 120: Python could not write at its end
