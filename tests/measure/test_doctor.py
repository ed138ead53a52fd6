"""Test the doctor: it finds what is there, and names a fix for what is missing.

Only what streaming needs makes the verdict bad.
"""

import hashlib
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from aapt_deploy import assets
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
    assert found("demo checkpoint").ok
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
