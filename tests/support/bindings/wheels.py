"""The real TensorRT Python bindings of two releases, unpacked beside each other.

Link stubs make them importable.

Only the bindings are fetched (1.3 MB a release); TensorRT's libraries are not, they need a GPU. Two
releases of one package cannot live in one environment, so each has a folder of its own below
build/, and whoever uses one does so in a process of its own (inside.py). The first test that needs
them fetches them; `python -m tests.support.bindings.wheels` does so ahead of time, for a machine
that is about to lose its network.
"""

import fcntl
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.support import ROOT
from tests.support.bindings import link_stubs

RELEASES = {"10.16": "10.16.1.11", "11.4": "11.4.0.106"}
PACKAGE = "tensorrt-cu13-bindings"
FOLDER = ROOT / "build" / "tensorrt_bindings"


class Unavailable(Exception):
    """The bindings are not here and pip cannot fetch them: no index, no network, no such wheel."""


def bindings(release: str) -> Path:
    """Return the folder to put on `sys.path` for `release`; it has the package `tensorrt_bindings`.

    Raises Unavailable if it cannot be fetched.
    """
    stubs = hashlib.sha256(
        Path(link_stubs.__file__).read_bytes()
    ).hexdigest()  # made anew when that file changes
    folder = FOLDER / f"{RELEASES[release]}-{sys.implementation.cache_tag}-{stubs[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as new:
                _fetch(release, Path(new))
                Path(new, "unpacked").rename(folder)
    return folder


def _fetch(release: str, folder: Path) -> None:
    wanted = f"{PACKAGE}=={RELEASES[release]}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        wanted,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(
            f"{wanted} could not be downloaded for Python "
            f"{sys.version_info.major}.{sys.version_info.minor}:\n{done.stderr.strip()}\n"
            "Without a network: put the wheel into a folder, set PIP_FIND_LINKS to it and "
            "PIP_NO_INDEX=1, "
            "and run python -m tests.support.bindings.wheels."
        )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "unpacked")
    link_stubs.write_all(folder / "unpacked" / "tensorrt_bindings", int(release.split(".")[0]))


if __name__ == "__main__":
    if link_stubs.supported():
        try:
            for name in RELEASES:
                bindings(name)
        except Unavailable as error:
            sys.exit(f"error: {error}")
