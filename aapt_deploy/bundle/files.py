"""Write files that others may write or read at the same time.

One process at a time works in a folder. Files appear whole or not at all. Here, too: how much
memory is free, which is asked before large files are made.
"""

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
    """Hold the lock file in `folder` while working on `what`.

    The kernel releases it when the process ends, however it ends. Raises BusyError if another
    process holds it, and OSError.
    """
    lock = FileLock(folder / LOCK, timeout=0)  # follows no link: a bundle may come from a stranger
    try:
        lock.acquire()
    except Timeout:
        hint = "wait until it is done, or stop that process"
        raise BusyError(f"{what} is being written by {_holder(folder / LOCK)}", hint) from None
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            (folder / LOCK).write_text(str(os.getpid()))
        yield
    finally:
        lock.release()


def _holder(lock: Path) -> str:
    """Return the process that holds `lock`, by the number that it wrote there."""
    with contextlib.suppress(OSError, ValueError):
        return f"process {int(lock.read_text()[:20])}"
    return "another process"


@contextlib.contextmanager
def writing(what: object, hint: str, *others: type[Exception]) -> Iterator[None]:
    """Raise OutputError if the system refuses to write `what`; `others` are a library's errors."""
    refusals: tuple[type[Exception], ...] = (OSError, *others)
    try:
        yield
    except refusals as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{what} cannot be written: {reason}", hint) from None


def free_memory_bytes() -> int:
    """Return the memory that this machine can still give to a process."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(found.split()[1])
    pages = os.sysconf("SC_AVPHYS_PAGES")  # without the caches that could be freed
    return pages * os.sysconf("SC_PAGE_SIZE")


def refuse_irregular(path: Path) -> None:
    """Raise OutputError if `path` resolves to a directory, pipe or device."""
    target = os.path.realpath(path)
    if os.path.lexists(target) and not os.path.isfile(target):
        reason = "exists and is not a regular file; it is left as it is"
        raise OutputError(f"{path} {reason}", "name a new file")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a new file beside `path`, which replaces `path` if the block ends well.

    It is removed otherwise. A symbolic link stays one: its target is replaced. Permissions
    follow the umask, even if the writer recreated the file. Raises OSError, and what
    `refuse_irregular` raises.
    """
    refuse_irregular(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}")
    new = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    descriptor = os.open(temporary, new, 0o666)
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
