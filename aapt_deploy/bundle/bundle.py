"""The bundle: a directory, and the only thing that passes between commands.

    profile.toml                what was asked for
    *.onnx                      portable graphs
    checkpoint.safetensors      the weights they came from
    start/*.png                 pictures to start a stream from
    engines/<key>/<n>/          what `build` made of the graphs for one backend and precision
    manifest.json               format version, sha256 and size of every file, sources

The manifest is read first, and no other file is used before its hash is checked. A bundle is built
in a folder beside it and then renamed, so it appears whole or not at all; an engine likewise. One
process at a time may add to a bundle. Hashes detect damage, not authorship.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from aapt_deploy import profiles
from aapt_deploy.bundle.files import LOCK, locked, whole, writing
from aapt_deploy.errors import BundleError, OutputError, ProfileError
from aapt_deploy.profiles import Profile

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SEAL = "manifest_sha256"  # key of the manifest's own hash, over everything else in it
REPLACED = "replaced"  # the old bundle, for the moment between two renames
LARGEST_MANIFEST_BYTES = 16 << 20
REPLACING_S = 1.0  # `open` waits so long for a bundle that is being replaced, in microseconds
STRANGER = "do not use this bundle; get it from a source you trust"  # hint for what no export makes


def export_again(path: Path) -> str:
    """Return the hint: make a damaged bundle again."""
    return f"make a whole one in its place with: aapt export CKPT -o {path} --force"


def build_again(path: Path, backend: str, precision: str) -> str:
    """Return the hint: build a damaged engine again."""
    engine = f"--backend {backend} --precision {precision}"
    return f"build it again with: aapt build-engine {path} {engine}"


@dataclass(frozen=True)
class Bundle:
    """Open bundle. Files are verified one by one, when they are asked for."""

    path: Path
    manifest: dict[str, Any]
    _seen: set[str] = field(default_factory=set, repr=False)

    CHECKPOINT: ClassVar[str] = "checkpoint.safetensors"

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Read a bundle's manifest.

        Raises BundleError if it is missing, damaged, of a newer format, or names files outside.
        """
        aside, until = _unfinished(path) / REPLACED, time.monotonic() + REPLACING_S
        try:
            return cls._read(path)
        except BundleError:
            while os.path.exists(aside) and time.monotonic() < until:
                time.sleep(0.01)  # an export is between its two renames
            return cls._read(path)

    @classmethod
    def _read(cls, path: Path) -> "Bundle":
        try:
            reason = "" if path.is_dir() else "is not a directory"
            if not reason and not (path / MANIFEST).is_file():
                reason = f"has no {MANIFEST}: not a bundle"
            half = _unfinished(path)
            if reason and half.exists():
                made = "is what an export that was stopped, or still runs, has made so far"
                reason += f"; {half} {made}"
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
        if reason:
            hint = f"make a whole one with: aapt export CKPT -o {path}"
            raise BundleError(f"bundle {path} {reason}", hint)
        return cls(path, _read_manifest(path))

    @cached_property
    def profile(self) -> Profile:
        """Return what the bundle was made for. Raises BundleError if profile.toml is invalid."""
        path = self.checked("profile.toml")
        try:
            return profiles.loads(path.read_text(encoding="utf-8"), str(path))
        except (UnicodeDecodeError, ProfileError) as error:
            raise BundleError(
                f"bundle {self.path} has a profile.toml that cannot be used: {error}",
                export_again(self.path),
            ) from None

    @property
    def engines(self) -> dict[str, dict[str, Any]]:
        """Return built engines by key."""
        engines: dict[str, dict[str, Any]] = self.manifest["engines"]
        return engines

    def checked(self, name: str) -> Path:
        """Check size and hash of file `name` against the manifest and return its path.

        Raises BundleError if it is not listed, missing, outside the bundle, or differs.
        """
        entry = self.manifest["files"].get(name)
        path = self.path / name
        engine = re.match("engines/([^/]+)-([^/-]+)/", name)  # engines/<backend>-<precision>/
        hint = build_again(self.path, *engine.groups()) if engine else export_again(self.path)
        if entry is None:
            raise BundleError(f"bundle {self.path} does not list {name!r}", hint)
        if name in self._seen:
            return path
        try:
            inside = path.is_file() and path.resolve().is_relative_to(self.path.resolve())
            found = _describe(path) if inside else None
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
            raise BundleError(f"bundle file {path} {reason}", hint) from None
        if found is None:
            raise BundleError(f"bundle file {path} is missing or leads out of the bundle", hint)
        if found != entry:
            difference = _difference(found, entry)
            raise BundleError(
                f"bundle file {path} does not match the manifest ({difference})", hint
            )
        self._seen.add(name)
        return path

    def listed_bytes(self, name: str) -> int:
        """Return the size of file `name` by the manifest; 0 if it is not listed."""
        size: int = self.manifest["files"].get(name, {}).get("bytes", 0)
        return size

    def verify(self) -> int:
        """Check every file and return their number. Raises BundleError at the first bad one."""
        for name in self.manifest["files"]:
            self.checked(name)
        return len(self.manifest["files"])

    @contextlib.contextmanager
    def add_engine(self, key: str) -> Iterator["Stage"]:
        """Add or replace engine `key`.

        Files in the stage and its `entry` join the bundle together at the end, or not at all.
        Raises BusyError if another process is building. Raises BundleError if the bundle changed
        in the meantime. Raises OutputError if it cannot be written.
        """
        with _writable(self.path), locked(self.path, f"bundle {self.path}"):
            for left in self.path.glob(".stage-*"):  # of a killed process: the lock is ours
                shutil.rmtree(left, ignore_errors=True)
            manifest = _read_manifest(self.path)  # it may have changed before the lock was ours
            home = self.path / "engines" / key
            if not home.resolve().is_relative_to(self.path.resolve()):
                raise BundleError(f"bundle folder {home} leads out of the bundle", STRANGER)
            older = sorted(home.iterdir()) if home.is_dir() else []
            # A new folder: the old engine stays whole until the end.
            number = 1 + max((int(p.name) for p in older if p.name.isdigit()), default=0)
            with tempfile.TemporaryDirectory(prefix=".stage-", dir=self.path) as folder:
                stage = Stage(Path(folder), f"engines/{key}/{number}")
                yield stage
                own, listed = f"engines/{key}/", manifest["files"].items()
                files = {name: entry for name, entry in listed if not name.startswith(own)}
                files |= _inventory(stage.path, f"{stage.relative}/")
                home.mkdir(parents=True, exist_ok=True)
                stage.path.rename(self.path / stage.relative)
            manifest["files"], manifest["engines"] = files, manifest["engines"] | {key: stage.entry}
            try:
                _write_manifest(self.path, manifest)  # from here on the new engine is the engine
            except OSError:
                shutil.rmtree(self.path / stage.relative, ignore_errors=True)
                raise
            for left in older:
                shutil.rmtree(left, ignore_errors=True)
        self.manifest.clear()
        self.manifest.update(manifest)


@dataclass
class Stage:
    """Unfinished engine: write files below `path`, and its part of the manifest into `entry`."""

    folder: Path
    relative: str  # where `path` will be in the bundle
    entry: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = self.folder / "new"
        self.path.mkdir()

    @property
    def size(self) -> int:
        """Return the bytes of all files so far."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())


@dataclass
class Draft:
    """Unfinished bundle: write files below `path`; `manifest` takes entries of its own."""

    path: Path
    manifest: dict[str, Any]


@contextlib.contextmanager
def create(path: Path, profile: Profile, overwrite: bool = False) -> Iterator[Draft]:
    """Make a bundle at `path`. It appears, or replaces an older one, at the end of the block.

    Raises OutputError if `path` exists and is not a bundle or `overwrite` is off. Raises
    OutputError if it cannot be written. Raises BusyError if another process makes the same
    bundle or builds engines in the old one.
    """
    target = Path(os.path.realpath(path))
    folder = _unfinished(target)
    with _writable(path):
        refuse_existing(path, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, f"bundle {path}"):
            try:
                _clear(folder, target)  # what a killed process left: the lock is ours
                exists, nobody = target.exists(), contextlib.nullcontext()
                with locked(target, f"bundle {path}") if exists else nobody:
                    head = {"format_version": FORMAT_VERSION, "profile": profile.name}
                    draft = Draft(folder / "new", head | {"engines": {}})
                    draft.path.mkdir()
                    (draft.path / "profile.toml").write_text(profile.dumps(), encoding="utf-8")
                    yield draft
                    draft.manifest["files"] = _inventory(draft.path, "")
                    _write_manifest(draft.path, draft.manifest)
                    refuse_existing(path, overwrite)  # it may have appeared in the meantime
                    _move_into_place(draft.path, target, folder / REPLACED)
            finally:
                _clear(folder, target)
                (folder / LOCK).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # something of somebody else's is in it
                    folder.rmdir()


def _unfinished(path: Path) -> Path:
    """Return the folder where the bundle `path` is made before it is renamed."""
    target = Path(os.path.realpath(path))
    return target.parent / f".{target.name}.unfinished"


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise OutputError if `create` would because of what exists at `path`."""
    if path.exists():
        if not (path / MANIFEST).is_file():
            reason = "exists and is not a bundle; it is left as it is"
            raise OutputError(f"{path} {reason}", "choose another output path")
        if not overwrite:
            raise OutputError(f"bundle {path} exists", "add --force to replace it")


def _move_into_place(new: Path, target: Path, aside: Path) -> None:
    """Rename `new` to `target`, with an older bundle there moved to `aside`.

    `_clear` brings it back if the process ends between the two renames.
    """
    if target.exists():
        target.rename(aside)
    new.rename(target)


def _clear(folder: Path, target: Path) -> None:
    """Remove unfinished work in `folder`; restore a bundle that was moved aside, not replaced."""
    if (folder / REPLACED).is_dir() and not target.exists():
        (folder / REPLACED).rename(target)
    for name in ("new", REPLACED):
        shutil.rmtree(folder / name, ignore_errors=True)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        if file.stat().st_size > LARGEST_MANIFEST_BYTES:
            raise ValueError(f"{file.stat().st_size} bytes long")
        manifest: dict[str, Any] = json.loads(file.read_bytes())
        version = manifest["format_version"]
        if type(version) is int and version > FORMAT_VERSION:
            newer = f"has format {version}, this aapt knows {FORMAT_VERSION}"
            raise BundleError(f"bundle {path} {newer}", "upgrade aapt_deploy, or export again")
        if manifest.pop(SEAL) != _seal(manifest):
            raise ValueError("it was changed after it was written")
        if wrong := _mistyped(manifest):
            raise ValueError(f"wrong type of {', '.join(map(repr, wrong))}")
    except OSError as error:
        unread = f"cannot be read: {error.strerror}"
        raise BundleError(f"bundle manifest {file} {unread}", export_again(path)) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        damage = f"is damaged: {reason}"
        raise BundleError(f"bundle manifest {file} {damage}", export_again(path)) from None
    for name in manifest["files"]:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
            raise BundleError(
                f"bundle manifest {file} names {name!r}, outside the bundle", STRANGER
            )
    return manifest


def _mistyped(manifest: dict[str, Any]) -> list[str]:
    """Return the keys and names whose values are not of the types that others count on.

    Raises KeyError for a key that every bundle has.
    """
    shapes: dict[str, type] = {
        "format_version": int, "profile": str, "precision": str, "source": dict, "files": dict,
        "engines": dict, "start_frames": dict,
    }  # fmt: skip
    of_kind = ((key, isinstance(manifest.get(key, kind()), kind)) for key, kind in shapes.items())
    if wrong := [key for key, ok in of_kind if not ok]:
        return wrong
    for name, entry in manifest["files"].items():
        whole_entry = isinstance(entry, dict) and entry.keys() == {"sha256", "bytes"}
        if not (whole_entry and type(entry["bytes"]) is int and _is_sha256(entry["sha256"])):
            wrong.append(name)
    wrong += ["source"] * (not _is_sha256(manifest["source"].get("sha256")))
    wrong += [key for key, entry in manifest["engines"].items() if not isinstance(entry, dict)]
    starts = manifest.get("start_frames", {}).items()
    return wrong + [name for name, prompt in starts if not isinstance(prompt, str)]


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest | {SEAL: _seal(manifest)}, indent=1, sort_keys=True)
    with whole(path / MANIFEST) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _inventory(folder: Path, prefix: str) -> dict[str, dict[str, Any]]:
    """Manifest entries of all files below `folder`, which are on the disk when this returns."""
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entries[prefix + path.relative_to(folder).as_posix()] = _describe(path)
    return entries


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    key = "bytes" if found["bytes"] != wanted["bytes"] else "sha256"
    return f"{key} {found[key]} instead of {wanted[key]}"


def _writable(path: Path) -> contextlib.AbstractContextManager[None]:
    """Turn the system's refusals into OutputError."""
    return writing(f"bundle {path}", "free some space or choose another output path")
