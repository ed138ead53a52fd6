"""ONNX files as an attacker or a full disk may leave them: each is one error with its fix.

Nothing is read from outside the bundle.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from aapt_deploy.bundle import bundle as bundles
from aapt_deploy.bundle import graph_file
from aapt_deploy.bundle.graph_file import hollow, load_model, read_structure, turn_weights, write
from aapt_deploy.errors import BundleError
from tests.support.bundles import rewrite_manifest
from tests.support.commands import Ran
from tests.support.tampered import HOSTILE, WEIGHTS, external

GIGABYTE = 1 << 30


def product(*weights: TensorProto) -> onnx.ModelProto:
    """y = x . turned(w), the weight as PyTorch keeps it."""
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "m"]) for name in ("x", "y")
    ]
    return helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:], list(weights)),
        opset_imports=[helper.make_opsetid("", 24)],
    )


def beside(path: Path, location: str, length: int, offset: int = 0) -> None:
    """A graph whose weight [2, length / 8] lies at `location`."""
    weight = hollow("w", TensorProto.FLOAT, [2, length // 8])
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        weight.external_data.add(key=key, value=str(value))
    path.write_bytes(product(weight).SerializeToString())


# --- written ---


@pytest.mark.parametrize("limit", [0, 10_000])
def test_hollow_weights_are_filled_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """In the graph, or beside it at the start of a page; what is small stays in the graph."""
    monkeypatch.setattr(graph_file, "HOLLOW_LIMIT_BYTES", limit)
    shapes = {"w": [40, 30], "b": [30], "c": [50, 20]}
    values = {
        name: np.random.default_rng(0).standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }
    path, asked = tmp_path / "g.onnx", []

    def read(name: str) -> graph_file.Bytes:
        asked.append(name)
        return values[name].reshape(-1).view(np.uint8)

    write(
        product(*(hollow(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())),
        path,
        read,
    )
    assert asked == list(shapes)
    assert os.listdir(tmp_path) == (["g.onnx"] if limit else sorted(os.listdir(tmp_path)))
    raw = {t.name: t for t in onnx.load(path, load_external_data=False).graph.initializer}
    outside = [name for name, t in raw.items() if t.data_location == TensorProto.EXTERNAL]
    assert outside == ([] if limit else ["w", "c"])
    assert all(
        int(e.value) % graph_file.ALIGNMENT == 0
        for name in outside
        for e in raw[name].external_data
        if e.key == "offset"
    )
    for tensor in load_model(path).graph.initializer:
        assert np.array_equal(numpy_helper.to_array(tensor), values[tensor.name])


def test_a_float_weight_is_turned_and_an_fp8_weight_is_not() -> None:
    model = product(hollow("w", TensorProto.FLOAT, [3, 2]))
    assert turn_weights(model) == {"w"}
    assert [(node.op_type, list(node.input)) for node in model.graph.node] == [
        ("MatMul", ["x", "w"])
    ]
    assert list(model.graph.initializer[0].dims) == [2, 3]
    eight = product(hollow("w", TensorProto.FLOAT8E4M3FN, [3, 2]))
    assert turn_weights(eight) == set() and len(eight.graph.node) == 2


def test_weights_of_two_gigabytes_and_a_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protobuf ends at 2 GB; a larger graph finds its weights beyond. The file is sparse."""
    path, data = tmp_path / "g.onnx", tmp_path / "g.onnx.data"
    beside(path, "g.onnx.data", 8, offset=2 * GIGABYTE + 4096)
    with data.open("wb") as file:
        file.seek(2 * GIGABYTE + 4096)
        file.write(np.array([1.5, -2], np.float32).tobytes())
    assert data.stat().st_size > 2**31 and data.stat().st_blocks < 1000
    (weight,) = load_model(path).graph.initializer
    assert numpy_helper.to_array(weight).tolist() == [[1.5], [-2]]
    assert path.stat().st_size < 1000


# --- read ---


@pytest.mark.parametrize(
    "location",
    ["../secret", "/etc/hostname", "sub/../../secret", "secret", ""],
    ids=["above", "absolute", "winding", "another file", "empty"],
)
def test_weights_come_from_beside_the_graph_alone(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    for path in (tmp_path / "secret", folder / "secret", folder / "g.onnx.data"):
        path.write_bytes(bytes(64))
    beside(folder / "g.onnx", location, 16)
    with pytest.raises(BundleError, match=r"not in 'g\.onnx\.data' beside it") as caught:
        load_model(folder / "g.onnx")
    assert caught.value.hint


def test_weights_behind_a_link_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(64))
    (tmp_path / "g.onnx.data").symlink_to(tmp_path / "secret")
    beside(tmp_path / "g.onnx", "g.onnx.data", 16)
    with pytest.raises(BundleError, match="missing or a link"):
        load_model(tmp_path / "g.onnx")


@pytest.mark.parametrize("offset", [0, 60, -8, 2**62])
def test_weights_that_end_too_early_are_refused(tmp_path: Path, offset: int) -> None:
    (tmp_path / "g.onnx.data").write_bytes(bytes(70 if offset else 15))
    beside(tmp_path / "g.onnx", "g.onnx.data", 16, offset)
    with pytest.raises(BundleError, match="end before 'w'"):
        load_model(tmp_path / "g.onnx")


@pytest.mark.parametrize("read", [load_model, read_structure])
@pytest.mark.parametrize("case", HOSTILE)
def test_a_graph_that_reaches_outside_its_own_weights_is_refused(
    tmp_path: Path, case: str, read: Callable[[Path, int | None], onnx.ModelProto]
) -> None:
    path, model = tmp_path / "encoder.onnx", product(numpy_helper.from_array(np.eye(2), "w"))
    HOSTILE[case](model)
    path.write_bytes(model.SerializeToString())
    (tmp_path / "encoder.onnx.data").write_bytes(WEIGHTS)
    with pytest.raises(BundleError, match=r"encoder\.onnx") as caught:
        read(path, None)
    assert "do not use this bundle" in caught.value.hint


@pytest.mark.parametrize("read", [load_model, read_structure])
def test_weights_behind_what_the_manifest_lists_are_refused(
    tmp_path: Path, read: Callable[[Path, int | None], onnx.ModelProto]
) -> None:
    path, model = tmp_path / "encoder.onnx", product(numpy_helper.from_array(np.eye(2), "w"))
    external()(model)
    path.write_bytes(model.SerializeToString())
    (tmp_path / "encoder.onnx.data").write_bytes(WEIGHTS)
    for listed in (None, 16, 20):
        assert len(read(path, listed).graph.initializer) == 2
    with pytest.raises(BundleError, match="end before 'stolen': 15 bytes"):
        read(path, 15)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x08", b"not a graph" * 50, bytes(100)],
    ids=["empty", "cut", "text", "zeros"],
)
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "g.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"g\.onnx (cannot be read|holds no graph)") as caught:
        load_model(tmp_path / "g.onnx")
    assert "\n" not in str(caught.value)


# --- through the command line: a bundle whose hashes are right, and whose graph is not ---


def forge(bundle: Path, change: Callable[[onnx.ModelProto], None], **files: bytes) -> None:
    """Change the generator's graph, add files, and make the manifest fit."""
    path = bundle / "generator.onnx"
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    for name, content in files.items():
        (bundle / f"{name}.onnx.data").write_bytes(content)
    found = {
        p.name: bundles._describe(p)
        for p in (path, *(bundle / f"{name}.onnx.data" for name in files))
    }
    rewrite_manifest(bundle, lambda manifest: manifest["files"].update(found))


def outside(location: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        weight = max(model.graph.initializer, key=lambda t: len(t.raw_data))
        length = len(weight.raw_data)
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("length", str(length))):
            weight.external_data.add(key=key, value=value)

    return change


def unknown_op(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Gelu").domain = "somebody.elses"


def without_attention(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "BlockCausalAttention":
            node.domain = "somebody.elses"


@pytest.mark.parametrize(
    ("change", "files", "words"),
    [
        (outside("../../secret"), {}, "in '../../secret', not in 'generator.onnx.data'"),
        (outside("generator.onnx.data"), {"generator": bytes(99)}, "end before"),
        (outside("generator.onnx.data"), {}, "missing or a link"),
        (unknown_op, {}, "ONNX Runtime cannot load"),
        (without_attention, {}, "has no aapt::BlockCausalAttention node"),
    ],
    ids=[
        "path out of the bundle",
        "truncated",
        "no file",
        "custom op missing",
        "attention missing",
    ],
)
@pytest.mark.usefixtures("one_core")
def test_a_forged_graph_is_one_error_and_its_fix(
    aapt: Callable[..., Ran],
    bare: Path,
    change: Callable[[onnx.ModelProto], None],
    files: dict[str, bytes],
    words: str,
) -> None:
    forge(bare, change, **files)
    ran = aapt("build-engine", bare, "--precision", "fp32")
    assert ran.code == BundleError.exit_code == 4, ran.err
    assert words in ran.error
    assert not list(bare.glob(".stage-*")) and not (bare / "engines" / "onnxruntime-fp32").exists()


@pytest.mark.usefixtures("one_core")
def test_weights_that_no_manifest_lists_are_not_read(aapt: Callable[..., Ran], bare: Path) -> None:
    forge(bare, outside("generator.onnx.data"))
    (bare / "generator.onnx.data").write_bytes(bytes(1 << 20))
    ran = aapt("build-engine", bare, "--precision", "fp32")
    assert ran.code == 4 and "does not list 'generator.onnx.data'" in ran.error
