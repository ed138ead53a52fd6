"""The bundle: a directory, and the only thing that passes between commands.

    profile.toml                what was asked for
    *.onnx                      portable graphs
    checkpoint.safetensors      the weights they came from
    start/*.png                 pictures to start a stream from
    engines/<key>/<n>/          what `build` made of the graphs for one backend and precision
    manifest.json               format version, sha256 and size of every file, where it all came from

The manifest is read first, and no other byte is used before its hash fits. A bundle appears whole or not at all (built in a folder beside it,
then renamed), an engine likewise, and one process at a time may add to a bundle.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from aapt_deploy import profiles
from aapt_deploy.errors import BundleError, BusyError, OutputError
from aapt_deploy.profiles import Profile

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LOCK = ".lock"
LARGEST_MANIFEST_BYTES = 16 << 20
EXPORT_HINT = "make it again with: aapt export CKPT -o BUNDLE"


@dataclass(frozen=True)
class Bundle:
    """An open bundle. Files are verified one by one, when they are asked for."""

    path: Path
    manifest: dict[str, Any]
    _seen: set[str] = field(default_factory=set, repr=False)

    CHECKPOINT: ClassVar[str] = "checkpoint.safetensors"

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Read a bundle's manifest. Raises BundleError when it is missing, damaged, of a newer format, or points outside the bundle."""
        if not path.is_dir():
            raise BundleError(f"bundle {path} is not a directory", EXPORT_HINT)
        if not (path / MANIFEST).is_file():
            raise BundleError(f"bundle {path} has no {MANIFEST}: not a bundle, or only half of one", EXPORT_HINT)
        return cls(path, _read_manifest(path))

    @cached_property
    def profile(self) -> Profile:
        path = self.checked("profile.toml")
        return profiles.loads(path.read_text(encoding="utf-8"), str(path))

    @property
    def engines(self) -> dict[str, dict[str, Any]]:
        """Built engines by key."""
        engines: dict[str, dict[str, Any]] = self.manifest["engines"]
        return engines

    def checked(self, name: str) -> Path:
        """The path of file `name`, once its size and hash are found to be the manifest's. Raises BundleError."""
        entry = self.manifest["files"].get(name)
        path = self.path / name
        if entry is None:
            raise BundleError(f"bundle {self.path} does not list {name!r}", EXPORT_HINT)
        if name in self._seen:
            return path
        if not path.resolve().is_relative_to(self.path.resolve()) or not path.is_file():
            raise BundleError(f"bundle file {path} is missing or leads out of the bundle", EXPORT_HINT)
        found = _describe(path)
        if found != entry:
            raise BundleError(f"bundle file {path} does not match the manifest ({_difference(found, entry)})", EXPORT_HINT)
        self._seen.add(name)
        return path

    def verify(self) -> None:
        """Check every file. Raises BundleError at the first that does not fit."""
        for name in self.manifest["files"]:
            self.checked(name)

    @contextlib.contextmanager
    def add_engine(self, key: str) -> Iterator["Stage"]:
        """Add or replace engine `key`: files written into the stage and its `entry` join the bundle together at the end, or not at all.

        Raises BusyError when another process is building, BundleError when the bundle changed in the meantime, OutputError when it cannot be
        written.
        """
        with _writing(self.path), _locked(self.path), tempfile.TemporaryDirectory(prefix=".stage-", dir=self.path) as folder:
            manifest = _read_manifest(self.path)  # another process may have added an engine before we held the lock
            home = self.path / "engines" / key
            home.mkdir(parents=True, exist_ok=True)
            older = sorted(home.iterdir())
            number = 1 + max((int(p.name) for p in older if p.name.isdigit()), default=0)  # a new folder: the old engine stays whole until the end
            stage = Stage(Path(folder), f"engines/{key}/{number}")
            yield stage
            files = {name: entry for name, entry in manifest["files"].items() if not name.startswith(f"engines/{key}/")}
            files |= {f"{stage.relative}/{p.relative_to(stage.path)}": _describe(p) for p in sorted(stage.path.rglob("*")) if p.is_file()}
            stage.path.rename(self.path / stage.relative)
            manifest["files"], manifest["engines"] = files, manifest["engines"] | {key: stage.entry}
            _write_manifest(self.path, manifest)  # from here on the new engine is the engine
            for left in older:
                shutil.rmtree(left, ignore_errors=True)
        self.manifest.clear()
        self.manifest.update(manifest)


@dataclass
class Stage:
    """A half-made engine: write files below `path`, and what is to be known about it into `entry`."""

    folder: Path
    relative: str  # where `path` will be in the bundle
    entry: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = self.folder / "new"
        self.path.mkdir()


@dataclass
class Draft:
    """A half-made bundle: write files below `path`; `manifest` may gain entries of its own."""

    path: Path
    manifest: dict[str, Any]


@contextlib.contextmanager
def create(path: Path, profile: Profile, overwrite: bool = False) -> Iterator[Draft]:
    """Make a bundle at `path`. It appears when the block ends without an error; an existing bundle is replaced only then.

    Raises OutputError when `path` exists and is no bundle, or exists and `overwrite` is off, or cannot be written.
    """
    if path.exists():
        if not (path / MANIFEST).is_file():
            raise OutputError(f"{path} exists and is not a bundle; it is left as it is", "choose another output path")
        if not overwrite:
            raise OutputError(f"bundle {path} exists", "add --force to replace it")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder, _locked_if(path):
            draft = Draft(Path(folder) / "new", {"format_version": FORMAT_VERSION, "profile": profile.name, "engines": {}})
            draft.path.mkdir()
            (draft.path / "profile.toml").write_text(profile.dumps(), encoding="utf-8")
            yield draft
            names = sorted(p for p in draft.path.rglob("*") if p.is_file())
            draft.manifest["files"] = {p.relative_to(draft.path).as_posix(): _describe(p) for p in names}
            _write_manifest(draft.path, draft.manifest)
            if path.exists():
                path.rename(Path(folder) / "replaced")
            draft.path.rename(path)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        if file.stat().st_size > LARGEST_MANIFEST_BYTES:
            raise ValueError(f"{file.stat().st_size} bytes long")
        manifest: dict[str, Any] = json.loads(file.read_bytes())
        version = manifest["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise BundleError(f"bundle {path} has format {version}, this aapt knows {FORMAT_VERSION}", "upgrade aapt_deploy, or export again")
        shapes = {"format_version": int, "profile": str, "files": dict, "engines": dict}
        wrong = [key for key, kind in shapes.items() if not isinstance(manifest[key], kind)]
        wrong += [name for name, entry in manifest["files"].items() if set(entry) != {"sha256", "bytes"}]
        if wrong:
            raise ValueError(f"wrong type of {', '.join(map(repr, wrong))}")
    except OSError as error:
        raise BundleError(f"bundle manifest {file} cannot be read: {error.strerror}", EXPORT_HINT) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"bundle manifest {file} is damaged: {error}", EXPORT_HINT) from None
    for name in manifest["files"]:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
            raise BundleError(f"bundle manifest {file} names {name!r}, outside the bundle", "do not use this bundle; get it from a source you trust")
    return manifest


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    temporary = path / f"{MANIFEST}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path / MANIFEST)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    key = "bytes" if found["bytes"] != wanted["bytes"] else "sha256"
    return f"{key} {found[key]} instead of {wanted[key]}"


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn the system's refusals into OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise
        raise OutputError(f"bundle {path} cannot be written: {error.strerror}", "free some space or choose another output path") from None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the bundle's lock. The kernel lets go of it when the process ends, however it ends."""
    with (path / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another"
            raise BusyError(f"bundle {path} is being built by process {holder}", "wait until it is done, or stop that process") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        for left in path.glob(".stage-*"):  # of a process that was killed: we hold the lock, so nobody uses it
            shutil.rmtree(left, ignore_errors=True)
        yield


def _locked_if(path: Path) -> contextlib.AbstractContextManager[None]:
    return _locked(path) if path.exists() else contextlib.nullcontext()
