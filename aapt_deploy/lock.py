"""One process at a time may write to a folder."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from aapt_deploy.errors import BusyError

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock file in `folder`, for work on `what`. The kernel lets go of it when the process ends, however it ends. Raises BusyError."""
    lock = folder / LOCK
    # A bundle may come from a stranger: a link in this place must not lead to a file that is then emptied.
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat())  # else its holder has just removed it
        except BlockingIOError:
            free = False
        if not free:
            pid = os.read(descriptor, 20)
            holder = f"process {int(pid)}" if pid.isdigit() else "another process"
            raise BusyError(f"{what} is being written by {holder}", "wait until it is done, or stop that process")
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)
