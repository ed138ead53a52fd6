"""Stages of a bench as processes whose results come home part by part, so that nothing is lost.

    Parts       inside a stage: runs a part, prints its result as one JSON line, goes on
    run_stage   outside: reads the lines as they come, and ends the stage when its time is up
    Record      the folder of a run: `record.json`, written anew at every part, and `log.txt`

A stage has a session of its own and is killed as a group. A part that ends the process, breaks
the CUDA context or runs longer than it may is lost alone: the stage begins again behind it. A
folder that cannot be written costs no result either: every part is also printed, and the record
is tried again at the next one. Needs nothing but Python.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

AGAIN = 75  # exit code of a stage that wants to begin again behind its last part
NO_GPU = 5  # exit code of a stage on a machine that it is not for
RESTARTS = 4  # at most, of one stage
START_S = 10  # what a stage needs to begin again; with less left it ends
META = (
    "error",
    "exit_code",
    "seconds",
    "allowed_s",
    "finished",
)  # keys of a stage beside its parts


class How:
    """How the stages of this process run; set by its command line."""

    small = False  # postage stamps on a CPU: only whether it runs
    precision = "fp8"  # of the generator; bf16 where FP8 cannot be relied on

    def brief(self, seconds: float) -> float:
        """`seconds` to measure for; next to nothing where figures have no meaning."""
        return 0.001 if self.small else seconds


HOW = How()


def say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


# --- inside a stage ---


class Parts:
    """What a stage has done. `skip`: parts of an earlier try; `seconds`: until it is ended."""

    def __init__(
        self,
        skip: Iterable[str] = (),
        seconds: float = 3600.0,
        printed: bool = False,
    ) -> None:
        self.skip, self.end = set(skip), time.monotonic() + seconds
        self.found: dict[str, Any] = {}
        self.out: TextIO | None = None
        if printed:  # stdout is for parts alone: whatever else is written there goes to stderr
            self.out = os.fdopen(os.dup(1), "w")
            os.dup2(2, 1)

    def run(self, name: str, call: Callable[[], Any], seconds: float | None = None) -> Any:
        """The result of `call`, or None where it failed or was skipped.

        `seconds`: how long the part may take before the stage begins again without it.
        """
        assert name not in META, f"{name=} is a word of the record"
        if name in self.skip:
            return None
        self._print({"begin": name, "seconds": seconds})
        try:
            result = call()
        except Exception as error:
            self.note(name, {"error": first_line(error)})
            if context_is_broken():
                raise SystemExit(AGAIN) from error
            return None
        self.note(name, result)
        return result

    def note(self, name: str, result: Any) -> None:
        """A result that came without being waited for."""
        self.found[name] = result
        self._print({"part": name, "result": result})

    def left(self) -> float:
        """Seconds until the stage is ended."""
        return self.end - time.monotonic()

    def _print(self, line: dict[str, Any]) -> None:
        if self.out:
            print(json.dumps(line), file=self.out, flush=True)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:400]


def context_is_broken() -> bool:
    """Whether CUDA answers nothing any more in this process: an illegal address ends a context."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


# --- outside ---


class Ended(NamedTuple):
    """How a process of a stage ended."""

    exit_code: int | None  # None: it was killed, for `why`
    why: str
    lost: str | None  # the part that it was in
    of_part: bool  # the part's time was up, not the stage's


def run_stage(
    command: list[str],
    seconds: float,
    heard: Callable[[str, Any], None],
    told: Callable[[str], None],
    skip: Iterable[str] = (),
) -> dict[str, Any]:
    """Run `command`, a stage, for `seconds` at most; `heard` gets each part as it comes.

    Returns the stage's own entries: `finished`, `seconds`, `exit_code` and, if it failed, `error`.
    """
    begin, had = time.monotonic(), list(skip)

    def hear(name: str, result: Any) -> None:
        had.append(name)
        heard(name, result)

    for attempt in range(RESTARTS + 1):
        left = seconds - (time.monotonic() - begin)
        arguments = ["--seconds", f"{left:.1f}", *(["--skip", *had] if had else [])]
        before = len(had)
        ended = _run_once([*command, *arguments], left, hear, told)
        code, why = ended.exit_code, ended.why
        died = code not in (None, NO_GPU) or ended.of_part
        if ended.lost is not None and died:
            hear(ended.lost, {"error": why})
        left = seconds - (time.monotonic() - begin)
        moved = len(had) > before
        whole = code == 0 and ended.lost is None
        if whole or code == NO_GPU or not moved or left < START_S or attempt == RESTARTS:
            break
        told(f"begins again: {why}")
    spent = round(time.monotonic() - begin, 1)
    found = {"finished": whole, "exit_code": code, "seconds": spent}
    return found if whole else {**found, "error": why}


def _run_once(
    command: list[str],
    seconds: float,
    heard: Callable[[str, Any], None],
    told: Callable[[str], None],
) -> Ended:
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return Ended(1, first_line(error), None, False)
    lines: queue.Queue[str] = queue.Queue()
    last_words: list[str] = []

    def listen() -> None:
        assert process.stderr
        with process.stderr:
            for line in process.stderr:
                last_words[:] = [*last_words[-7:], line.rstrip()]
                told(line.rstrip())

    def read() -> None:
        assert process.stdout
        with process.stdout:
            for line in process.stdout:
                lines.put(line)

    threads = [threading.Thread(target=work, daemon=True) for work in (listen, read)]
    for thread in threads:
        thread.start()
    end, part_end, part = time.monotonic() + seconds, float("inf"), None
    why, of_part = "", False

    def take(line: str) -> None:
        nonlocal part, part_end
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict) or not said.keys() & {"begin", "part"}:
            told(line.rstrip())
        elif "begin" in said:
            limit = said.get("seconds")
            part, part_end = said["begin"], time.monotonic() + limit if limit else float("inf")
        else:
            part, part_end = None if part == said["part"] else part, float("inf")
            heard(said["part"], said["result"])

    try:
        while not _has_ended(process.pid):
            with contextlib.suppress(queue.Empty):
                take(lines.get(timeout=0.05))
            now = time.monotonic()
            if now > end or now > part_end:
                of_part = now <= end
                whole = f"took longer than {seconds:.0f} s"
                why = f"{part} took too long" if of_part else whole
                break
    finally:  # also when this process is asked to end
        kill(process.pid)
    for thread in threads:
        thread.join(5)
    while not lines.empty():
        take(lines.get())
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process inside the driver may not die
        process.wait(10)
    if why:
        return Ended(None, why, part, of_part)
    code = process.returncode
    clean = code == 0 and part is None
    why = "" if clean else f"exit code {code}: {' | '.join(last_words)[-600:]}"
    return Ended(code, why, part, False)


def _has_ended(pid: int) -> bool:
    """Whether the process is a zombie. It is not reaped, so its group's number stays taken."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill(group: int) -> None:
    """A stage and whatever it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


class Record:
    """What a run found, in memory and in a folder."""

    def __init__(self, folder: Path, empty: dict[str, Any]) -> None:
        """Goes on with the record in `folder`, if there is one; begins with `empty` otherwise."""
        self.folder, self.path, self.begin = folder, folder / "record.json", time.monotonic()
        self.complaint = ""  # why the last write failed
        self.found = self._read() or empty

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text())
            return found if isinstance(found, dict) else {}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            with contextlib.suppress(OSError):
                self.path.replace(self.folder / "record.damaged.json")
            self.say(f"the record there cannot be read and is set aside: {first_line(error)}")
            return {}

    def note(self, stage: str, name: str, result: Any) -> None:
        """Keep one part: in memory, on stdout, in the folder."""
        self.found.setdefault(stage, {})[name] = result
        with contextlib.suppress(OSError):
            print(json.dumps({"stage": stage, "part": name, "result": result}), flush=True)
        self.write()

    def write(self) -> None:
        """Whole or not at all. A folder that cannot be written is no reason to stop."""
        temporary = self.path.with_suffix(".tmp")
        try:
            with temporary.open("w") as file:
                file.write(json.dumps(self.found, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
            self.complaint = ""
        except OSError as error:
            if not self.complaint:
                say(f"cannot write {self.path}: {first_line(error)}; stdout has every part")
            self.complaint = first_line(error)

    def say(self, text: str) -> None:
        """To stderr and the log, behind the seconds since the run began."""
        line = f"[{time.monotonic() - self.begin:5.0f} s] {text}"
        say(line)
        with contextlib.suppress(OSError), (self.folder / "log.txt").open("a") as file:
            file.write(line + "\n")
