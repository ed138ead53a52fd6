"""Live steering: JSON lines that set the camera's velocity and the prompt of a running stream.

    {"forward": 10, "yaw": -0.1}              forward, strafe in world units/s; yaw (right),
                                              pitch (up) in rad/s
    {"prompt": "night city rain", "at": 2.5}  from 2.5 s of stream time on

A missing key keeps its last value. Blank lines and lines that start with # are skipped. A file's
lines are taken in order, one per block. Lines from stdin ("-") or a named pipe are taken as they
come: a block gets all that arrived before it. A line with "at" waits for its time, and so do the
lines behind it.

Nothing here can stop a running stream or make it wait. A malformed line is a warning with its
number, and the last good value stays. Prompts are not checked here; the reader of `Control.prompt`
does that.
"""

import contextlib
import dataclasses
import json
import math
import os
import stat
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn, Protocol

from aapt_deploy.errors import InputError

_STDIN = 0
_LONGEST_LINE_BYTES = 64 << 10
_WAITING_LINES = 256  # kept until their time comes; the pipe blocks a writer that is further ahead
_WARNED_LINES = 20  # malformed lines reported one by one
_SAME_TIME_S = 1e-6  # block times are sums of floats


class Control(NamedTuple):
    """What steers one block."""

    velocity: Any  # what the family is steered by
    prompt: str | None  # None: no line has set one


class Controls(Protocol):
    """An open source of controls.

    controls = open_controls("flight.jsonl", CRUISE, LIMITS, warn=print)
    controls.at(block=0, seconds=0.0)  # Control(velocity=Velocity(forward=22.0, ...), prompt=None)
    """

    def at(self, block: int, seconds: float) -> Control:
        """Return the control of `block`, which begins at `seconds` of stream time.

        Blocks must come in order. Never waits.
        """
        ...

    def close(self) -> None:
        """Deliver the last warnings and close the source."""
        ...


def open_controls(
    source: str | None, default: Any, limits: Any, warn: Callable[[str], None]
) -> Controls:
    """Open controls from the file `source`, from stdin ("-"), or none (None).

    `default` applies until a line changes it. It is a frozen dataclass of floats, whose fields are
    the keys that steer; `limits` has their largest magnitudes. `warn` is called with one line of
    text, and only inside `at` and `close`. Raises InputError if the file cannot be read.
    """
    if source is None:
        return _Script(iter(()), default, _Warnings("controls", warn))
    if source == "-":
        return _Live(_STDIN, default, limits, _Warnings("stdin", warn))
    warnings = _Warnings(source, warn)
    try:
        kind = os.stat(source).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            return _Live(source, default, limits, warnings)
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(0, "is a folder")
        fd = os.open(source, os.O_RDONLY)
    except OSError as error:
        hint = 'give a file with one JSON object per line, or "-" for stdin'
        raise InputError(f"controls {source}: {error.strerror or error}", hint) from None
    return _Script(_changes(fd, limits, warnings), default, warnings)


class _Change(NamedTuple):
    """What one line sets. A malformed line sets nothing, but still takes its turn."""

    velocity: dict[str, float]
    prompt: str | None = None
    at: float | None = None  # seconds of stream time; None: its turn

    def applied(self, now: Control) -> Control:
        velocity = dataclasses.replace(now.velocity, **self.velocity)
        return Control(velocity, now.prompt if self.prompt is None else self.prompt)


class _Malformed(Exception):
    """A line that sets nothing; the message is the reason."""


class _Warnings:
    """Collects warnings in the reading thread and delivers them in the stream's.

    A flood of bad lines fills neither memory nor the screen.
    """

    def __init__(self, source: str, warn: Callable[[str], None]) -> None:
        self._source = source
        self._warn = warn
        self._pending: deque[str] = deque()
        self._malformed = 0
        self._clamped: set[str] = set()

    def malformed(self, number: int, reason: str) -> None:
        self._malformed += 1
        if self._malformed <= _WARNED_LINES:
            self._add(number, f"{reason}; the last good value stays")
        elif self._malformed == _WARNED_LINES + 1:
            self._add(number, f"{reason}; further malformed lines are not reported")

    def clamped(self, number: int, key: str, value: float, limit: float) -> None:
        if key not in self._clamped:
            self._clamped.add(key)
            beyond = f"{key} = {value:g} is beyond +-{limit:g}"
            self._add(number, f"{beyond} and is clamped; this is said once")

    def ended(self, reason: str) -> None:
        self._pending.append(f"{self._source}: {reason}; the last good value stays")

    def _add(self, number: int, text: str) -> None:
        self._pending.append(f"{self._source} line {number}: {text}")

    def deliver(self) -> None:
        while self._pending:
            self._warn(self._pending.popleft())


class _Script:
    """Lines that exist already: a file's, read as they are needed, or none."""

    def __init__(self, changes: Iterator[_Change], default: Any, warnings: _Warnings) -> None:
        self._changes = changes
        self._next = next(changes, None)
        self._now = Control(default, None)
        self._block = -1  # the last one asked for
        self._warnings = warnings

    def at(self, block: int, seconds: float) -> Control:
        while block > self._block and self._next is not None:
            change = self._next
            if change.at is not None and change.at > seconds + _SAME_TIME_S:
                break
            self._now, self._next = change.applied(self._now), next(self._changes, None)
            if change.at is None:  # one per block; of those with a time, all that are due
                break
        self._block = max(block, self._block)
        self._warnings.deliver()
        return self._now

    def close(self) -> None:
        self._next, self._changes = None, iter(())  # the dropped generator closes its file
        self._warnings.deliver()


class _Live:
    """Lines that are sent while the stream runs.

    A daemon thread reads the bare descriptor. So a silent sender stalls nothing, and Python does
    not wait for the thread at exit. Lines without "at" are merged into one as they arrive: a block
    sees the newest state however fast the sender is.
    """

    def __init__(self, source: str | int, default: Any, limits: Any, warnings: _Warnings) -> None:
        self._now = Control(default, None)
        self._limits, self._warnings = limits, warnings
        self._waiting: deque[_Change] = deque()
        self._room = threading.Condition()
        self._closed = False
        # stdin is None if it was closed at the start: 0 may be any other file by now.
        if source != _STDIN or sys.stdin is not None:
            threading.Thread(None, self._read, "controls", (source,), daemon=True).start()

    def at(self, block: int, seconds: float) -> Control:
        with self._room:
            while self._waiting and (self._waiting[0].at or 0) <= seconds + _SAME_TIME_S:
                self._now = self._waiting.popleft().applied(self._now)
            self._room.notify()
        self._warnings.deliver()
        return self._now

    def close(self) -> None:
        with self._room:
            self._closed = True
            self._room.notify()
        self._warnings.deliver()

    def _read(self, source: str | int) -> None:
        try:
            # A named pipe opens when its writer comes.
            fd = source if isinstance(source, int) else os.open(source, os.O_RDONLY)
        except OSError as error:
            self._warnings.ended(error.strerror or str(error))
            return
        for change in _changes(fd, self._limits, self._warnings):
            with self._room:
                self._room.wait_for(lambda: self._closed or len(self._waiting) < _WAITING_LINES)
                if self._closed:
                    return
                if self._waiting and change.at is None and self._waiting[-1].at is None:
                    last = self._waiting.pop()
                    prompt = last.prompt if change.prompt is None else change.prompt
                    change = _Change(last.velocity | change.velocity, prompt)
                self._waiting.append(change)


def _changes(fd: int, limits: Any, warnings: _Warnings) -> Iterator[_Change]:
    """Yield the lines of `fd`, parsed. Closes it at the end unless it is stdin."""
    try:
        for number, line in enumerate(_lines(fd), start=1):
            if not line.strip() or line.lstrip().startswith(b"#"):
                continue
            try:
                yield _parse(line, number, limits, warnings)
            except _Malformed as error:
                warnings.malformed(number, str(error))
                yield _Change({})
    except OSError as error:
        warnings.ended(f"cannot be read on: {error.strerror or error}")
    finally:
        if fd != _STDIN:
            with contextlib.suppress(OSError):
                os.close(fd)


def _lines(fd: int) -> Iterator[bytes]:
    """Yield the lines of `fd` without their newline.

    A line that is too long is cut, to more bytes than are allowed.
    """
    buffer, too_long = b"", False
    while chunk := os.read(fd, _LONGEST_LINE_BYTES):
        *whole, buffer = (buffer + chunk).split(b"\n")
        for line in whole:
            if not too_long:
                yield line
            too_long = False
        if too_long:
            buffer = b""
        elif len(buffer) > _LONGEST_LINE_BYTES:
            yield buffer
            buffer, too_long = b"", True
    if buffer:
        yield buffer


def _parse(line: bytes, number: int, limits: Any, warnings: _Warnings) -> _Change:
    """Return one line's change, clamped to `limits`. Raises _Malformed."""
    names = [field.name for field in dataclasses.fields(limits)]
    if len(line) > _LONGEST_LINE_BYTES:
        raise _Malformed(f"longer than {_LONGEST_LINE_BYTES} bytes")
    try:
        raw = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise _Malformed("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise _Malformed(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError):  # nested too deeply; an integer of thousands of digits
        raise _Malformed("not valid JSON: nested too deeply, or too large a number") from None
    if not isinstance(raw, dict):
        half = {name: getattr(limits, name) / 2 for name in names[:1]}
        example = json.dumps(half or {"prompt": "…"}, ensure_ascii=False)
        raise _Malformed(f"not a JSON object such as {example}")
    if unknown := [key for key in raw if key not in (*names, "prompt", "at")]:
        known = ", ".join([*names, "prompt", "at"])
        raise _Malformed(f"unknown key {unknown[0][:40]!r}, known are {known}")
    prompt = raw.get("prompt", "")
    if not isinstance(prompt, str):
        raise _Malformed("prompt must be text")
    numbers = {key: _number(key, value) for key, value in raw.items() if key != "prompt"}
    at = numbers.pop("at", None)
    if at is not None and at < 0:
        raise _Malformed(f"at = {at:g} lies before the stream's start")
    for key, value in numbers.items():
        limit = getattr(limits, key)
        if abs(value) > limit:
            warnings.clamped(number, key, value, limit)
            numbers[key] = math.copysign(limit, value)
    return _Change(numbers, prompt if "prompt" in raw else None, at)


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Malformed(f"{key} must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _Malformed(f"{key} must be a finite number")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise _Malformed(f"{name} is no number to steer by")
