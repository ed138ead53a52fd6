"""bench/rtx.py: real builds of the smallest shape, refusals as rows, the table's sums."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from aapt_deploy.backends.trt.plans import Settings
from tests.support import ROOT

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has no wheels for this Python")


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    import rtx as module

    return module


@pytest.mark.slow
def test_every_form_is_built_and_measured(
    rtx: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cases = (rtx.Case("tiny", "tiny-cpu", graphs=("generator",)),)
    monkeypatch.setattr(rtx, "CASES", cases)
    monkeypatch.setattr(sys, "argv", ["rtx.py", "--out", str(tmp_path / "record.json")])
    rtx.main()
    record = json.loads((tmp_path / "record.json").read_text())
    assert [row["form"] for row in record["rows"]] == list(rtx.FORMS)
    for row in record["rows"]:
        assert "refused" not in row and row["plan_mb"] > 0.1 and row["network_layers"] > 100
        assert row["build_s"] > 0.05 and row["processor_s"] > 0.05
        assert 50 < row["peak_before_mb"] < row["peak_mb"] < 2000  # of that process alone
        assert row["sms"] == ([89, 120] if "fp8" in row["form"] else [86, 89, 120])
    sizes = {row["form"]: row["plan_mb"] for row in record["rows"]}
    assert sizes["fp8"] != sizes["bf16"] != sizes["native-fp8"] != sizes["fp8"]
    assert capsys.readouterr().out.count("| tiny |") == len(rtx.FORMS)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "preset", "depth"), [("demo", "", 0), ("8B", "rtx-5090", 1)])
def test_the_embedded_checkpoint_and_the_8b_shape_are_built_in_every_form(
    rtx: ModuleType, tmp_path: Path, name: str, preset: str, depth: int
) -> None:
    case = rtx.Case(name, preset and f"aapt-8b-736x416-{preset}", depth)
    rows = list(rtx.rows(case, tmp_path))
    assert len(rows) == 4 * len(rtx.FORMS)
    assert [row for row in rows if "refused" in row or row["peak_mb"] > 4000] == []


def test_a_refusal_and_a_crash_are_rows(rtx: ModuleType, tmp_path: Path) -> None:
    settings = Settings(0, 1 << 30, sms=(89,))
    missing = rtx.in_a_process(tmp_path / "absent.onnx", settings)
    assert "cannot read" in missing["refused"] and missing["peak_mb"] > 0
    odd = rtx.in_a_process(tmp_path / "absent.onnx", Settings(0, 1 << 30, sms=(1,)))
    assert odd["refused"] and len(odd["load_average"]) == 2


def test_a_record_says_whether_the_machine_was_loaded(rtx: ModuleType) -> None:
    assert rtx.loaded({"load_average": [2.0, 1.8]})
    assert not rtx.loaded({"load_average": [0.3, 2.0]})
    assert not rtx.loaded({"load_average": [1.2, 1.3]})  # the build before


def test_the_table_sums_graphs_and_takes_the_largest_peak(rtx: ModuleType) -> None:
    measured = {"build_s": 1.5, "processor_s": 1.0, "plan_mb": 2.0}
    one = {"shape": "x", "form": "bf16", "graph": "encoder", "peak_mb": 300.0, **measured}
    two = {**one, "graph": "decoder", "peak_mb": 200.0}
    three = {"shape": "x", "form": "fp8", "graph": "decoder", "refused": "why"}
    lines = rtx.table([one, two, three]).splitlines()
    assert lines[2] == "| x | bf16 | 3.0 | 2.0 | 4.0 | 300 |"
    assert lines[3] == "| x | fp8 | refused: decoder | | | |"
