"""A bundle whose graph was changed before it was sealed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from aapt_deploy.bundle import bundle
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.ops.block_causal_attention import onnx_function


def tampered(path: Path, change: Callable[[ModelProto], None], weights: bytes | None, graph: str = "encoder") -> Bundle:
    """The bundle with a changed graph, sealed as if it had been made like that."""
    model = onnx.load(path / f"{graph}.onnx")
    change(model)
    (path / f"{graph}.onnx").write_bytes(model.SerializeToString())
    if weights is not None:
        (path / f"{graph}.onnx.data").write_bytes(weights)
    manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    manifest.pop(bundle.SEAL)
    for name in (f"{graph}.onnx", f"{graph}.onnx.data"):
        if (path / name).exists():
            manifest["files"][name] = bundle._describe(path / name)
    bundle._write_manifest(path, manifest)
    assert not onnx_function.strip(model).functions
    return Bundle.open(path)
