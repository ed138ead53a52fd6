"""Writing where others may write or read: one process at a time in a folder, and files that are there whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from aapt_deploy.errors import BusyError, OutputError

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock file in `folder` while working on `what`. The kernel releases it when the process ends, however it ends.

    Raises BusyError if another process holds it, and OSError.
    """
    lock = FileLock(folder / LOCK, timeout=0)  # follows no link: a bundle may come from a stranger
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(f"{what} is being written by {_holder(folder / LOCK)}", "wait until it is done, or stop that process") from None
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            (folder / LOCK).write_text(str(os.getpid()))
        yield
    finally:
        lock.release()


def _holder(lock: Path) -> str:
    """The process that holds `lock`, by the number that it wrote there."""
    with contextlib.suppress(OSError, ValueError):
        return f"process {int(lock.read_text()[:20])}"
    return "another process"


@contextlib.contextmanager
def writing(what: object, hint: str, *others: type[Exception]) -> Iterator[None]:
    """Turn the system's refusal to write `what`, and those of `others` that a library has for it, into OutputError."""
    refusals: tuple[type[Exception], ...] = (OSError, *others)
    try:
        yield
    except refusals as error:
        raise OutputError(f"{what} cannot be written: {getattr(error, 'strerror', None) or error}", hint) from None


def free_memory_bytes() -> int:
    """Return the memory that this machine can still give to a process."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # without the caches that could be freed


def refuse_irregular(path: Path) -> None:
    """Raise OutputError where `path`, once links are followed, leads to something that a file must not replace: a folder, a pipe, a device."""
    target = os.path.realpath(path)
    if os.path.lexists(target) and not os.path.isfile(target):
        raise OutputError(f"{path} exists and is not a regular file; it is left as it is", "name a new file")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A new file beside `path` to write to, which takes the place of `path` when the block ends well and is removed when it does not.

    A symbolic link stays one: what it points to is replaced. Permissions follow the umask, also where the writer made the file anew. Raises
    OutputError as `refuse_irregular` does, and OSError.
    """
    refuse_irregular(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # a name that nobody has
    try:
        mode = os.fstat(descriptor).st_mode & 0o777
        os.close(descriptor)
        yield temporary
        os.chmod(temporary, mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
