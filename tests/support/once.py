"""What takes long to make is made once.

That holds also where several workers of pytest-xdist run the tests.
"""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from filelock import FileLock

Thing = TypeVar("Thing")


def made(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Thing]) -> Thing:
    """Return what `make` returned for the folder `name`, in this worker or in the first that asked.

    The others wait for it. A worker's own folder lies in the one that all workers of a run share.
    TESTS_ONCE names a folder of an earlier run, for bench/mutants.py.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = Path(os.environ.get("TESTS_ONCE", base)) / f"once-{name}"
    result = folder / "result.pickle"
    with FileLock(f"{folder}.lock"):
        if not result.exists():
            folder.mkdir()
            thing = make(folder)
            result.write_bytes(pickle.dumps(thing))
            return thing
    # A run of these tests wrote it, in a folder of its own.
    found: Thing = pickle.loads(result.read_bytes())  # noqa: S301  our own file
    return found
