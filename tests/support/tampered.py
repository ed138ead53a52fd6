"""A bundle whose graph was changed before it was sealed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, SparseTensorProto, TensorProto, helper

from aapt_deploy.bundle import bundle
from aapt_deploy.bundle.bundle import Bundle


def tampered(
    path: Path, change: Callable[[ModelProto], None], weights: bytes | None, graph: str = "encoder"
) -> Bundle:
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
    return Bundle.open(path)


WEIGHTS = b"weights of 20 bytes."  # beside the graph that HOSTILE changes
Change = Callable[[ModelProto], None]


def external(
    location: str = "encoder.onnx.data",
    offset: str = "0",
    length: str = "16",
    kind: int = TensorProto.EXTERNAL,
) -> Change:
    """Add an initializer of four floats that lies at `location`."""

    def change(model: ModelProto) -> None:
        model.graph.initializer.append(_stolen(location, offset, length, kind))

    return change


def _stolen(
    location: str, offset: str = "0", length: str = "16", kind: int = TensorProto.EXTERNAL
) -> TensorProto:
    tensor = TensorProto(name="stolen", data_type=TensorProto.FLOAT, dims=[4], data_location=kind)
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _in_node(**attributes: Any) -> Change:
    """Add a node with these attributes."""
    return lambda model: model.graph.node.append(
        helper.make_node("Constant", [], ["stolen"], **attributes)
    )


def _in_function(model: ModelProto) -> None:
    node = helper.make_node("Constant", [], ["stolen"], value=_stolen("/etc/passwd"))
    opset = [helper.make_opsetid("", 24)]
    model.functions.append(
        helper.make_function("somebody.elses", "F", [], ["stolen"], [node], opset)
    )


def _sparse() -> SparseTensorProto:
    return SparseTensorProto(values=_stolen("/etc/passwd"), dims=[4])


_INNER = helper.make_graph([], "inner", [], [], [_stolen("/etc/passwd")])
HOSTILE: dict[str, Change] = {
    "a path upward": external("../../secret"),
    "an absolute path": external("/etc/passwd"),
    "another file of the bundle": external("profile.toml"),
    "without saying that it is external": external("/etc/passwd", kind=TensorProto.DEFAULT),
    "beyond the end": external(length="4096"),
    "offset and length beyond the end": external(offset="8", length="16"),
    "a negative offset": external(offset="-8"),
    "an offset that is not a number": external(offset="eight"),
    "digits of another script": external(offset="\u00b2"),
    "inside a node": _in_node(value=_stolen("/etc/passwd")),
    "in a list inside a node": _in_node(values=[_stolen("/etc/passwd")]),
    "in a subgraph": _in_node(body=_INNER),
    "in a list of subgraphs": _in_node(bodies=[_INNER]),
    "sparse inside a node": _in_node(sparse_value=_sparse()),
    "sparse": lambda model: model.graph.sparse_initializer.append(_sparse()),
    "in a function": _in_function,
}
