"""Bundles of a few bytes, and manifests that were changed and sealed again."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aapt_deploy.bundle.bundle import SEAL, Bundle, create
from aapt_deploy.profiles import load

TINY = load("tiny-cpu")
ENGINE = "onnxruntime-fp32"
SOURCE = {"checkpoint": "demo.safetensors", "sha256": "0" * 64}
FILES = (
    "encoder.onnx",
    "generator.onnx",
    "generator.onnx.data",
    "checkpoint.safetensors",
    "start/hills.png",
)


def make(path: Path, mark: str = "first", overwrite: bool = False) -> Bundle:
    """A bundle with a file of every kind, and one engine. `mark` tells two bundles apart."""
    with create(path, TINY, overwrite=overwrite) as draft:
        (draft.path / "start").mkdir()
        for name in FILES:
            (draft.path / name).write_bytes(f"{mark} {name} ".encode() * 500)
        draft.manifest["start_frames"] = {"hills": "green hills"}
        draft.manifest["source"] = SOURCE
        draft.manifest["mark"] = mark
    opened = Bundle.open(path)
    add(opened, mark)
    return opened


def add(opened: Bundle, mark: str) -> None:
    with opened.add_engine(ENGINE) as stage:
        (stage.path / "generator.onnx").write_bytes(mark.encode() * 1000)
        stage.entry |= {
            "backend": "onnxruntime",
            "precision": "fp32",
            "graphs": {"generator": f"{stage.relative}/generator.onnx"},
        }


def engine_file(opened: Bundle) -> str:
    name: str = opened.engines[ENGINE]["graphs"]["generator"]
    return name


def tree(path: Path) -> set[str]:
    return {p.relative_to(path).as_posix() for p in path.rglob("*")}


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as somebody would who also knows how to seal it."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest[SEAL]
    change(manifest)
    manifest[SEAL] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
