"""Where frames go: a file, a pipe or a device. A destination of your own is one class.

A regular file is written under `NAME.part.SUFFIX` beside its final name and renamed when closed.
The final name never holds half a video, and an older file survives a failed stream. Pipes and
devices are written frame by frame, unbuffered.

Deliberately not here: encoding (packets.py), pacing and what Ctrl-C does to a stream
(stream/session.py), and network addresses (pipe through ffmpeg).
"""

import os
import select
import shlex
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from aapt_deploy.errors import OutputError, UsageError
from aapt_deploy.video.formats import FORMATS, PIPE_FORMATS, Format, choose
from aapt_deploy.video.packets import Encoder, refuse_missing

_STDOUT = 1


class ReaderGone(Exception):
    """The program that reads our pipe has closed it (`| head -c 1M`). End quietly, with exit 0."""


class Sink(Protocol):
    """An open output for frames.

    Inherit from it to get the context manager: a normal end, an exception that is not an
    `Exception` (Ctrl-C) and `ReaderGone` close the output. Any other exception aborts it.
    """

    name: str  # for messages
    frames: int  # written so far

    def write(self, frames: np.ndarray) -> None:
        """Append `frames`, uint8 [T, H, W, 3]. Raises ReaderGone if nobody reads them any more."""
        ...

    def close(self) -> None:
        """Finish the output. Does nothing if it is closed or aborted."""
        ...

    def abort(self) -> None:
        """Write nothing more and drop what is unfinished. Does nothing if it is closed."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        failed = isinstance(error, Exception) and not isinstance(error, ReaderGone)
        (self.abort if failed else self.close)()


class _Descriptor:
    """The file descriptor that FFmpeg writes to, unbuffered.

    FFmpeg calls `write` from C, so it never raises: `failure` is the first failure, and later bytes
    are dropped. So the muxer can always be closed, and the sink raises `failure` back in Python.
    """

    def __init__(self, fd: int, name: str, seekable: bool) -> None:
        self.fd, self.name, self._seekable = fd, name, seekable
        self.failure: BaseException | None = None

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        try:
            while len(rest) and self.failure is None:
                try:
                    rest = rest[os.write(self.fd, rest) :]
                except BlockingIOError:  # another program made our stdout non-blocking
                    select.select([], [self.fd], [])
        except (OSError, KeyboardInterrupt, SystemExit) as error:  # signal handlers raise the last
            self.failure = error
        return len(data)

    def seek(self, offset: int, whence: int) -> int:
        return os.lseek(self.fd, offset, whence)

    def tell(self) -> int:
        return self.seek(0, os.SEEK_CUR)

    def seekable(self) -> bool:
        return self._seekable


_Answer = SimpleQueue[BaseException | None]  # what a piece of work raised


class _Worker:
    """A thread that does what it is given, in order.

    Its queues are written in C. The locks of concurrent.futures are not: a signal handler that
    raises as one is taken leaves it taken, and both threads wait for it for ever.
    """

    def __init__(self) -> None:
        self._work = SimpleQueue[tuple[Callable[[], object], _Answer] | None]()
        threading.Thread(target=self._run, name="sink", daemon=True).start()

    def do(self, work: Callable[[], object]) -> None:
        """Wait until `work` is done. Raises what it raised."""
        answer = _Answer()
        self._work.put((work, answer))
        if (error := answer.get()) is not None:
            raise error

    def stop(self) -> None:
        """End the thread behind its work. Nothing is done afterwards."""
        self._work.put(None)

    def _run(self) -> None:
        while (given := self._work.get()) is not None:
            work, answer = given
            try:
                work()
            except BaseException as error:
                answer.put(error)
            else:
                answer.put(None)


class FileSink(Sink):
    """A file, a pipe or a device, encoded by FFmpeg; `open_sink` makes it.

    Raises OutputError if the output fails and ReaderGone if a reader left. Each is raised once, so
    that a `close` on the way out stays silent.
    """

    def __init__(
        self, target: _Descriptor, chosen: Format, size: tuple[int, int], fps: int,
        part: Path | None = None, final: Path | None = None,
    ) -> None:  # fmt: skip
        self.name, self.frames = str(final or target.name), 0
        self._target, self._size, self._part, self._final = target, size, part, final
        self._closed = False
        self._encoder = Encoder(target, chosen, size, fps, live=final is None)
        self._thread = _Worker() if final else None

    def write(self, frames: np.ndarray) -> None:
        """Append `frames`, uint8 [T, H, W, 3]; a pipe's reader has them when this returns.

        A file is never cut inside a frame: an exception of a signal handler comes after it.
        """
        given = (frames.dtype.name, frames.shape[1:])
        assert given == ("uint8", (*self._size[::-1], 3)), f"{given=} {self._size=}"
        assert not self._closed, f"{self.name} is closed"
        for pixels in frames:
            self._uncut(lambda pixels=pixels: self._append(pixels))  # type: ignore[misc]
            self._check()

    def close(self) -> None:
        """Finish the output and rename the file to its final name.

        A stream without a frame leaves an older file of that name alone.
        """
        if self._target.failure is not None or not self.frames:
            self.abort()
        elif not self._closed:
            self._uncut(self._finish)
            self._check()

    def abort(self) -> None:
        """Write nothing more and remove the unfinished file."""
        if not self._closed:
            self._uncut(self._drop)

    def _uncut(self, work: Callable[[], None]) -> None:
        """Do `work` to its end, even if a signal handler raises meanwhile.

        Python runs signal handlers in the main thread only, so the work gets a thread of its own. A
        pipe stays interruptible, because its reader may stall.
        """
        if self._thread is None:
            work()
            return
        try:
            self._thread.do(work)
        except BaseException:
            self._thread.do(int)  # does nothing, behind the work: that is done then
            raise
        finally:
            if self._closed:
                self._thread.stop()

    def _append(self, pixels: np.ndarray) -> None:
        self._encoder.write(pixels)
        self.frames += 1

    def _finish(self) -> None:
        self._encoder.finish()
        self._release()

    def _drop(self) -> None:
        self._target.failure = self._target.failure or BrokenPipeError()  # bytes are dropped now
        self._release()

    def _release(self) -> None:
        """Close everything, then rename the file, or remove it after a failure."""
        self._closed = True
        self._encoder.close()
        try:
            os.close(self._target.fd)  # a network file system reports a full disk only here
            if self._target.failure is None and self._part is not None and self._final is not None:
                os.replace(self._part, self._final)
        except OSError as error:
            self._target.failure = self._target.failure or error
        if self._target.failure is not None and self._part is not None:
            self._part.unlink(missing_ok=True)

    def _check(self) -> None:
        failure = self._target.failure
        if failure is None:
            return
        self.abort()
        if isinstance(failure, ConnectionError):
            raise ReaderGone(f"the reader of {self.name} is gone") from None
        if isinstance(failure, OSError):
            raise unwritable(self.name, failure) from None
        raise failure


def unwritable(name: str, error: OSError) -> OutputError:
    """Return the error for an output `name` that the system refused with `error`."""
    hint = "free some space or choose another place with -o"
    return OutputError(f"{name}: cannot be written: {error.strerror or error}", hint)


def open_sink(output: str, format: str | None, width: int, height: int, fps: int) -> FileSink:
    """Open `output`, a path or "-" for stdout, for frames of `width` x `height` pixels at `fps`.

    `format` is a key or alias of FORMATS. None takes the path's suffix, or y4m for stdout.
    Raises UsageError if the choice cannot work, OutputError if the place cannot be written, and
    MachineError if the encoder is missing.
    """
    if not output:
        raise UsageError("the name of the output is empty", "name a file with -o, or - for stdout")
    if "://" in output:
        place = shlex.quote(output)
        pipe = f"aapt stream ... -o - --format mpegts | ffmpeg -i - -c copy -f mpegts {place}"
        address = f"{output} is an address; frames go to a file or to stdout"
        raise UsageError(address, f"pipe them there: {pipe}")
    key = choose(output, format)
    chosen = FORMATS[key]
    if chosen.pixels == "yuv420p" and (width % 2 or height % 2):
        odd = f"{key} cannot hold {width}x{height}: its colours need even sizes"
        raise UsageError(odd, "take nut or rawvideo, or a profile of even size")
    # A symbolic link stays one: the file that it points to is replaced.
    name, path = "stdout" if output == "-" else output, Path(os.path.realpath(output))
    if output != "-" and os.path.isdir(path):  # pathlib would raise for a name that is too long
        inside = shlex.quote(str(Path(output) / "stream.mkv"))
        raise OutputError(f"{output} is a folder", f"name a file in it: -o {inside}")
    is_file = output != "-" and (os.path.isfile(path) or not os.path.exists(path))
    if not is_file and not chosen.to_pipe:
        seeks = f"{key} cannot go to {name}: it is finished by seeking back to its start"
        others = f"formats that can: {', '.join(PIPE_FORMATS)} (fmp4 is fragmented mp4)"
        raise UsageError(seeks, others)
    refuse_missing(key, chosen)
    try:
        if not is_file:
            fd = _stdout() if output == "-" else os.open(path, os.O_WRONLY)
            return FileSink(_Descriptor(fd, name, seekable=False), chosen, (width, height), fps)
        _refuse_folder(output, path)
        fd, part = _open_part(path)
    except OSError as error:
        raise unwritable(name, error) from None
    target = _Descriptor(fd, output, seekable=True)
    return FileSink(target, chosen, (width, height), fps, part, path)


def _refuse_folder(output: str, path: Path) -> None:
    """Raise OutputError if the folder of `path`, named `output` by the user, does not exist."""
    there = next(parent for parent in path.parents if os.path.exists(parent))
    if not os.path.isdir(there):
        what = f"{output}: {there} is not a folder"
        raise OutputError(what, "name a file in a folder that exists")
    if there != path.parent:
        hint = f"make it first: mkdir -p {shlex.quote(str(path.parent))}"
        raise OutputError(f"{output}: there is no folder {path.parent}", hint)


def _stdout() -> int:
    if sys.stdout is None:
        redirect = "redirect it to a file or a pipe, or name a file with -o"
        raise OutputError("stdout is closed", redirect)
    if os.isatty(_STDOUT):
        pipe = "pipe it (aapt stream ... -o - | ffplay -) or name a file with -o"
        raise UsageError("stdout is a terminal, which cannot show video", pipe)
    return os.dup(_STDOUT)


def _open_part(final: Path) -> tuple[int, Path]:
    """Open a new file beside `final`.

    It has a number if one exists: left by a killed stream, or of one that still runs.
    """
    taken = ""
    while True:
        part = final.with_name(f"{final.stem}.part{taken}{final.suffix}")
        try:
            return os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), part
        except FileExistsError:
            taken = str(int(taken or 1) + 1)
