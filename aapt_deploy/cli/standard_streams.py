"""Standard streams that may be closed, full or left by their reader."""

import contextlib
import os
from typing import IO, Any

from aapt_deploy.errors import OutputError


class Guarded:
    """A text stream whose failures are not tracebacks.

    Text is dropped if the stream is missing or its reader left (`| head -1`). Any other failure
    raises OutputError if the text `is_data` (stdout). If not (stderr), the text is dropped too.
    """

    def __init__(self, stream: IO[str] | None, is_data: bool = False) -> None:
        self.stream, self._is_data = stream, is_data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def isatty(self) -> bool:
        return self.stream is not None and not self.stream.closed and self.stream.isatty()

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *arguments: str) -> None:
        try:
            if self.stream is not None:
                getattr(self.stream, method)(*arguments)
        except BrokenPipeError:
            pass
        except OSError as error:
            if self._is_data:
                what = f"stdout cannot be written: {error.strerror}"
                raise OutputError(what, "free some space, or send the output elsewhere") from None
        except ValueError:  # it was closed
            if self._is_data:
                raise


def occupy() -> None:
    """Open /dev/null in place of closed standard streams.

    Else the next file that is opened gets the number of one, and what libraries print there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def settle(stream: IO[str] | None) -> None:
    """Drop the text that `stream` could not write.

    The interpreter would retry at exit and turn the exit code into 120.
    """
    if stream is None:
        return
    try:
        getattr(stream, "stream", stream).flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # not a real file
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
