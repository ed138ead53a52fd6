"""Standard streams that may be closed, full or left by their reader."""

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import Any, TextIO

from aapt_deploy.errors import OutputError


def stop(number: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does, what is half made removed. A second signal does not disturb that: `timeout` sends two. `stream` has its own handler."""
    signal.signal(number, lambda *_: None)  # not SIG_IGN, which processes that we start would inherit
    sys.exit(128 + number)


class Data:
    """stdout as commands write to it. A full disk is an OutputError. Once its reader has left (`| head -1`), the rest is dropped, as in a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._do(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def _do(self, work: Any, *arguments: str) -> None:
        try:
            work(*arguments)
        except BrokenPipeError:
            pass
        except OSError as error:
            raise OutputError(f"stdout cannot be written: {error.strerror}", "free some space, or send the output elsewhere") from None


def occupy() -> None:
    """Give closed standard streams their numbers back. Else the next file that is opened gets one, and with it whatever a library prints there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def settle(stream: TextIO | None) -> None:
    """Drop what `stream` could not write until now: the interpreter would try once more when it ends, and turn the exit code into 120."""
    if stream is None:
        return
    try:
        getattr(stream, "_stream", stream).flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # not a real file
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
