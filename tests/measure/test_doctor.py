"""Test the doctor: it finds what is there, and names a fix for what is missing.

Only what streaming needs makes the verdict bad.
"""

import hashlib
import importlib
import importlib.metadata
import json
import platform
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from aapt_deploy import assets
from aapt_deploy.errors import MachineError
from aapt_deploy.measure import doctor
from aapt_deploy.measure.doctor import Check, examine


def found(name: str) -> Check:
    return next(check for check in examine() if check.name == name)


def without(monkeypatch: pytest.MonkeyPatch, package: str, error: Exception) -> None:
    real = importlib.import_module

    def look(name: str, *rest: Any) -> Any:
        if name == package:
            raise error
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", look)


def test_what_this_test_runs_on_is_found() -> None:
    checks = {check.name: check for check in examine()}
    assert list(checks) == [
        "python", "cpu cores", "numpy", "onnxruntime", "av", "safetensors", "torch", "onnx",
        "onnxscript", "tensorrt", "tensorrt_rtx_bindings", "demo checkpoint",
        "onnxruntime runs", "ffmpeg", "nvidia gpu",
    ]  # fmt: skip
    for name in (
        "python",
        "numpy",
        "onnxruntime",
        "av",
        "safetensors",
        "torch",
        "onnx",
        "onnxscript",
        "onnxruntime runs",
    ):
        assert checks[name].ok, checks[name]
    assert {name for name, check in checks.items() if check.needed} == {
        "python",
        "numpy",
        "onnxruntime",
        "av",
        "safetensors",
        "onnxruntime runs",
    }
    assert "opset 24 runs" in checks["onnxruntime runs"].found


def test_every_failed_check_has_a_fix() -> None:
    assert [check for check in examine() if not check.ok and not check.fix] == []


@pytest.mark.parametrize(
    ("package", "fix", "needed"),
    [
        ("av", "pip install aapt_deploy", True),
        ("torch", "pip install 'aapt_deploy[export]'", False),
        ("tensorrt", "[tensorrt]'", False),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'x'"),
        OSError("libx.so: cannot open shared object file"),
    ],
    ids=["gone", "broken"],
)
def test_a_missing_or_broken_package_comes_with_its_install_command(
    monkeypatch: pytest.MonkeyPatch, package: str, fix: str, needed: bool, error: Exception
) -> None:
    without(monkeypatch, package, error)
    check = found(package)
    assert (check.ok, check.needed) == (False, needed)
    assert str(error) in check.found
    assert fix in check.fix


def test_the_checkpoint_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, digest = tmp_path / "demo.safetensors", tmp_path / "demo.sha256"
    monkeypatch.setattr(assets, "CHECKPOINT", weights)
    monkeypatch.setattr(assets, "SHA256_FILE", digest)
    assert not found("demo checkpoint").ok
    weights.write_bytes(b"x" * 100)
    digest.write_text(hashlib.sha256(b"x" * 100).hexdigest() + "\n")
    assert found("demo checkpoint") == Check("demo checkpoint", True, False, "0.0 MB, hash fits")
    weights.write_bytes(b"y" * 100)
    check = found("demo checkpoint")
    assert not check.ok
    assert "demo.safetensors has sha256" in check.found
    assert check.fix


def test_a_runtime_that_does_not_run_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ADD_GRAPH", b"\x08\x0a")
    check = found("onnxruntime runs")
    assert not check.ok
    assert check.needed
    assert check.fix


def test_no_ffmpeg_is_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    check = found("ffmpeg")
    assert (check.ok, check.needed, check.fix) == (False, False, "install ffmpeg")


def test_the_runtime_answers_with_what_it_ran_on(monkeypatch: pytest.MonkeyPatch) -> None:
    check = found("onnxruntime runs")
    providers = ", ".join(onnxruntime.get_available_providers())
    assert check.found == f"opset 24 runs, providers {providers}" and check.fix == ""

    class Session:
        def __init__(self, graph: bytes, providers: list[str]) -> None:
            assert graph == doctor._ADD_GRAPH and providers == ["CPUExecutionProvider"]

        def run(self, outputs: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            assert outputs is None and inputs["x"].dtype == np.float32
            return [2.5 * inputs["x"]]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    check = found("onnxruntime runs")
    assert (check.ok, check.found) == (False, "1.5 + 1.5 gave [3.75]")
    assert check.fix == "pip install --force-reinstall onnxruntime"


def test_the_smallest_graph_is_one_addition() -> None:
    model = onnx.load_from_string(doctor._ADD_GRAPH)
    onnx.checker.check_model(model, full_check=True)
    assert [(node.op_type, *node.input, *node.output) for node in model.graph.node] == [
        ("Add", "x", "x", "y")
    ]
    assert model.ir_version == 10 and [x.version for x in model.opset_import] == [24]


@pytest.mark.parametrize(
    ("version", "ok"), [((3, 10, 9), False), ((3, 11, 0), True), ((3, 13, 1), True)]
)
def test_python_is_new_enough_from_3_11_on(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...], ok: bool
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    check = doctor._python()
    assert (check.ok, check.needed, check.found) == (ok, True, platform.python_version())
    assert check.fix == ("" if ok else "install Python 3.11 or newer")


@pytest.mark.parametrize(("count", "ok"), [(1, False), (2, True), (3, True)])
def test_the_demo_wants_two_cores(monkeypatch: pytest.MonkeyPatch, count: int, ok: bool) -> None:
    monkeypatch.setattr(doctor, "cores", lambda: count)
    check = doctor._cores()
    assert (check.ok, check.needed, check.found, bool(check.fix)) == (ok, False, str(count), not ok)


@pytest.mark.parametrize(
    "row", [row for row in doctor.PACKAGES if not row[0].startswith("tensorrt")], ids=lambda r: r[0]
)
def test_a_package_is_found_with_its_version_and_what_it_is_for(row: tuple[Any, ...]) -> None:
    package, distribution, purpose, *_ = row
    check = found(package)
    assert check.found == f"{importlib.metadata.version(distribution)}, for {purpose}"
    assert check.fix == ""


def test_without_a_gpu_the_reason_and_both_ways_out_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one: tests/backends/trt/test_rtx.py."""

    def none() -> None:
        raise MachineError("no NVIDIA driver: it is not there", "")

    monkeypatch.setattr(doctor.cuda, "with_driver", none)
    check = doctor._gpu()
    assert (check.name, check.ok, check.needed) == ("nvidia gpu", False, False)
    assert check.found == "no NVIDIA driver: it is not there"
    assert "the CPU engine needs none" in check.fix and "--backend tensorrt-rtx" in check.fix


def test_ffmpeg_is_found_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ffmpeg").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._ffmpeg() == Check("ffmpeg", True, False, str(tmp_path / "ffmpeg"), "")
    assert doctor._attempt("x", True, lambda: "well", "mend it") == Check("x", True, True, "well")


def test_the_report_and_its_verdict(aapt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    good = aapt("doctor", "--json")
    assert good.code == 0, good.err
    checks = json.loads(good.out)
    assert good.out.count("\n") == 1
    assert all(
        any(line.startswith(check["name"]) for line in good.err.splitlines()) for check in checks
    )
    without(monkeypatch, "av", ModuleNotFoundError("No module named 'av'"))
    bad = aapt("doctor")
    assert bad.code == 3
    assert bad.out == ""
    assert re.search(r"av +MISSING", bad.err)
    assert "fix: pip install aapt_deploy" in bad.err
    assert "Traceback" not in bad.err
