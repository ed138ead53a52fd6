"""Test that exported graphs agree with PyTorch, or never reach a bundle."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from aapt_deploy import __version__
from aapt_deploy.backends import build
from aapt_deploy.backends.ort import build as build_ort
from aapt_deploy.backends.trial import BuildOptions
from aapt_deploy.bundle import graph_file
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import OutputError, ParityError
from aapt_deploy.export import export
from aapt_deploy.export.export import export_bundle
from aapt_deploy.export.parity import FP32_TOLERANCE, compare
from aapt_deploy.models.aapt.signature import GRAPHS, signatures
from aapt_deploy.models.checkpoint import Checkpoint
from aapt_deploy.ops.block_causal_attention import DOMAIN, NAME, NEXT, VERSION
from aapt_deploy.profiles import Profile
from aapt_deploy.video.pictures import read_image
from tests.support.commands import COMMAND, ENVIRONMENT
from tests.support.opening import open_engines, silent
from tests.support.tiny import Made, frames_of


def graph(bundle: Path, name: str) -> onnx.ModelProto:
    return onnx.load(bundle / f"{name}.onnx")


def test_every_graph_agrees_with_pytorch(made: Made) -> None:
    assert [(row.graph, row.case) for row in made.parity] == [
        ("encoder", "random"), ("prompt", "random"), ("generator", "empty cache"),
        ("generator", "half-full cache"), ("generator", "full cache"),
        ("decoder", "random"),
        ("decoder", "after a reset"),
    ]  # fmt: skip
    assert [row for row in made.parity if not row.ok] == []
    assert (
        max(row.relative for row in made.parity if row.graph != "decoder") < FP32_TOLERANCE / 10
    )  # the decoder's pixels are whole numbers


def test_a_bundle_holds_what_the_signature_lists(bundle: Path, tiny: Profile) -> None:
    for name, signature in signatures(tiny).items():
        proto = graph(bundle, name).graph
        dims = {
            value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
            for value in (*proto.input, *proto.output)
        }
        types = {
            v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type).name
            for v in (*proto.input, *proto.output)
        }
        assert [value.name for value in proto.input] == [
            spec.name for spec in (*signature.inputs, *signature.state)
        ]
        recurrent = [spec.name + NEXT for spec in signature.state] if name == "decoder" else []
        assert [value.name for value in proto.output] == [
            spec.name for spec in signature.outputs
        ] + recurrent
        for spec in (*signature.inputs, *signature.outputs, *signature.state):
            assert (dims[spec.name], types[spec.name]) == (spec.shape, spec.dtype)


def test_graphs_carry_the_op_its_meaning_and_where_they_come_from(
    bundle: Path, tiny: Profile, loaded: Checkpoint
) -> None:
    for name in GRAPHS:
        model = graph(bundle, name)
        onnx.checker.check_model(model)
        assert {
            entry.domain: entry.version for entry in model.opset_import if entry.domain == ""
        } == {"": 24}
        assert (model.producer_name, model.producer_version) == ("aapt_deploy", __version__)
        facts = {entry.key: entry.value for entry in model.metadata_props}
        assert {key: value for key, value in facts.items() if key.startswith("aapt.")} == {
            "aapt.version": __version__, "aapt.profile": "tiny-cpu",
            "aapt.checkpoint_sha256": loaded.sha256,
        }  # fmt: skip
        nodes = [node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, NAME)]
        functions = [(f.domain, f.name) for f in model.functions if f.domain == DOMAIN]
        assert len(nodes) == (tiny.model.depth if name == "generator" else 0)
        assert functions == ([(DOMAIN, NAME)] if name == "generator" else [])
        if name == "generator":
            assert (DOMAIN, VERSION) in [
                (entry.domain, entry.version) for entry in model.opset_import
            ]


def test_no_graph_names_the_machine_it_was_made_on(bundle: Path) -> None:
    home = str(Path(export.__file__).parents[2]).encode()
    assert [name for name in GRAPHS if home in (bundle / f"{name}.onnx").read_bytes()] == []


def test_the_manifest_says_where_the_bundle_comes_from(
    bundle: Path, loaded: Checkpoint, made: Made
) -> None:
    manifest = Bundle.open(bundle).manifest
    assert manifest["source"] == {"checkpoint": "tiny.safetensors", "sha256": loaded.sha256}
    assert manifest["precision"] == "fp32"
    assert manifest["cache_layout"] == "token_major"
    assert manifest["versions"] == {
        "aapt_deploy": __version__,
        "torch": torch.__version__.split("+")[0],
        "onnx": onnx.__version__,
    }
    assert manifest["parity"] == [row._asdict() for row in made.parity]
    assert str(loaded.path.parent) not in (bundle / "manifest.json").read_text()


def test_start_frames_and_checkpoint_come_along(
    bundle: Path, loaded: Checkpoint, tiny: Profile
) -> None:
    opened = Bundle.open(bundle)
    opened.verify()
    assert opened.manifest["start_frames"] == {
        name: frame.prompt for name, frame in loaded.start_frames.items()
    }
    for name, frame in loaded.start_frames.items():
        assert np.array_equal(
            read_image(opened.checked(f"start/{name}.png"), tiny.video.width, tiny.video.height),
            frame.image.numpy(),
        )
    assert opened.checked(Bundle.CHECKPOINT).read_bytes() == loaded.path.read_bytes()


def test_progress_names_every_graph(made: Made) -> None:
    for name in GRAPHS:
        assert {f"exporting {name}", f"checking {name} against PyTorch"} <= set(made.said)


# --- wrong graphs ---


def tampered(model: onnx.ModelProto) -> None:
    """Enlarge a graph's largest weight by a tenth, in the tensor that has most."""
    weights = max(
        (w for w in model.graph.initializer if w.data_type == onnx.TensorProto.FLOAT),
        key=lambda w: np.prod(w.dims),
    )
    values = onnx.numpy_helper.to_array(weights).copy()
    values.flat[np.abs(values).argmax()] *= 1.1
    weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))


def test_a_graph_that_disagrees_with_pytorch_leaves_no_bundle(
    loaded: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Made
) -> None:
    """One weight of the generator is changed after it was written. An older bundle stays."""
    write = export._write

    def spoil(model: onnx.ModelProto, path: Path, *arguments: Any) -> list[str]:
        used = write(model, path, *arguments)
        if path.name == "generator.onnx":
            written = onnx.load(path)
            tampered(written)
            onnx.save(written, path)
        return used

    monkeypatch.setattr(export, "_write", spoil)
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "manifest.json").write_text("old")
    with pytest.raises(
        ParityError, match=r"exported graphs disagree with PyTorch: generator \("
    ) as caught:
        export_bundle(loaded, path, True, silent)
    assert caught.value.exit_code == 8
    assert caught.value.hint
    assert os.listdir(tmp_path) == ["bundle"]
    assert set(os.listdir(path)) == {"manifest.json", ".lock"}  # the lock file of the older one
    assert (path / "manifest.json").read_text() == "old"
    assert all(row.ok for row in made.parity)  # and untouched graphs pass


def test_what_counts_as_a_difference() -> None:
    want = torch.tensor([1.0, -2.0])
    exact = want.numpy()
    assert compare("g", "c", [want], [exact]) == ("g", "c", 0.0, 0.0, True)
    assert compare("g", "c", [want], [exact + np.float32(3e-4)]).ok  # 2e-4 of the largest value, 2
    assert not compare("g", "c", [want], [exact + np.float32(5e-4)]).ok
    assert not compare("g", "c", [want], [np.array([1.0, np.nan], np.float32)]).ok
    assert not compare("g", "c", [want], [exact[None]]).ok
    pixels = torch.tensor([3, 250], dtype=torch.uint8)
    assert compare("g", "c", [pixels], [pixels.numpy() + np.uint8(1)]).ok
    assert not compare("g", "c", [pixels], [pixels.numpy() + np.uint8(2)]).ok
    many = compare("g", "c", [want, pixels], [exact + np.float32(1), pixels.numpy()])
    assert (many.error, many.ok) == (1.0, False)
    with pytest.raises(ValueError, match="zip"):
        compare("g", "c", [want, want], [exact])


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_an_export_that_is_stopped_leaves_no_half_bundle(
    loaded: Checkpoint, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    path = tmp_path / "bundle"
    with subprocess.Popen(
        [*COMMAND, "export", str(loaded.path), "-o", str(path)],
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        assert process.stderr is not None
        said = [next(line for line in process.stderr if "exporting prompt" in line)]
        time.sleep(0.1)
        process.send_signal(number)
        said += process.stderr.read().splitlines()
    assert process.returncode == code
    assert not [line for line in said if "Traceback" in line or "Error" in line]
    assert not path.exists()
    if number != signal.SIGKILL:
        assert os.listdir(tmp_path) == []


# --- places ---


def test_an_existing_folder_is_refused_before_any_work(loaded: Checkpoint, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "precious").touch()
    with pytest.raises(OutputError, match="is not a bundle; it is left as it is"):
        export_bundle(loaded, tmp_path, True, said.append)
    assert said == []
    assert os.listdir(tmp_path) == ["precious"]


@pytest.mark.slow
def test_large_weights_lie_beside_their_graphs_and_everything_works(
    loaded: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    monkeypatch.setattr(graph_file, "INLINE_LIMIT_BYTES", 1000)
    monkeypatch.setattr(graph_file, "HOLLOW_LIMIT_BYTES", 1000)
    monkeypatch.setattr(build_ort, "cores", lambda: 1)
    path = tmp_path / "bundle"
    assert all(row.ok for row in export_bundle(loaded, path, False, silent))
    opened = Bundle.open(path)
    listed = set(opened.manifest["files"])
    assert {f"{name}.onnx.data" for name in GRAPHS} <= listed
    assert all(
        (path / f"{name}.onnx.data").stat().st_size > (path / f"{name}.onnx").stat().st_size / 10
        for name in GRAPHS
    )
    build.build_engine(opened, "onnxruntime", None, BuildOptions(silent))
    opened.verify()
    assert {"generator.onnx.data", "decoder.onnx.data"} <= {
        Path(name).name for name in opened.manifest["files"] if "fp32/" in name
    }
    for precision in ("fp32", "int8"):
        here, inline = (
            open_engines(opened, "onnxruntime", precision),
            open_engines(Bundle.open(bundle), "onnxruntime", precision),
        )
        for a, b in zip(frames_of(here, opened, 4), frames_of(inline, opened, 4), strict=True):
            assert np.array_equal(a, b)
    moved = path.rename(tmp_path / "elsewhere")
    weights = next(
        name for name in opened.manifest["files"] if name.endswith("fp32/1/generator.onnx.data")
    )
    content = bytearray((moved / weights).read_bytes())
    content[len(content) // 2] ^= 1
    (moved / weights).write_bytes(content)
    with pytest.raises(Exception, match=r"generator\.onnx\.data does not match the manifest"):
        open_engines(Bundle.open(moved), "onnxruntime", "fp32")


def test_exported_graphs_load_in_onnx_runtime_with_the_function_alone(bundle: Path) -> None:
    session = onnxruntime.InferenceSession(
        bundle / "generator.onnx", providers=["CPUExecutionProvider"]
    )
    assert session.get_modelmeta().custom_metadata_map["aapt.profile"] == "tiny-cpu"
