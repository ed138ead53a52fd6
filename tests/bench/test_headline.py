"""bench/headline.py without a GPU: every stage runs on postage stamps, predictions add up, and a verdict follows from a record."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from aapt_deploy.models.cost import cost_of
from aapt_deploy.profiles import load
from tests.support.commands import ROOT

BENCH = ROOT / "bench" / "headline.py"


@pytest.fixture
def headline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCH.parent), *sys.path])
    import headline as module

    monkeypatch.setattr(module, "SMALL", True)
    return module


@pytest.fixture
def model(headline: ModuleType) -> ModuleType:
    return sys.modules["headline_model"]


@pytest.mark.parametrize("stage", ["parity", "wide", "hd15", "rivals", "ablations", "kernels"])
def test_every_stage_runs_and_gives_json(headline: ModuleType, stage: str) -> None:
    found = json.loads(json.dumps(headline.RUNNABLE[stage]()))
    if stage == "parity":
        assert min(found["psnr_db_by_block"]) > 50 and found["captured"] is True
    elif stage == "rivals":
        assert {"bf16, SDPA, KV cache", "without a KV cache"} == found.keys() and all("ms" in entry for entry in found.values()), found
    elif stage == "ablations":
        assert len(found["generator_ms"]) == 5 and found["generator_ms"].keys() == found["predicted_ms"].keys()
    elif stage == "kernels":
        assert 0 < len(found["kernels"]) <= 20 and sum(k["share"] for k in found["kernels"]) <= 1.001
    else:
        assert found["overlapped"]["fps"] > 0 and found["overlapped"]["steps"] == (8 if stage == "wide" else 4)
        assert found["stages"].keys() == {"generator", "commit", "decoder", "hand-off", "serial step"}
        assert found["stages"]["serial step"]["p50"] >= found["stages"]["generator"]["p50"]
        assert found["attained"].keys() == {"generator", "decoder"}


def test_a_prediction_is_work_over_rate(model: ModuleType) -> None:
    profile = load("aapt-8b-736x416-h100")
    found = model.predicted(profile, "fp8")
    parts = [value for name, value in found.items() if name.startswith("generator: ")]
    assert sum(parts) == pytest.approx(found["generator"], abs=0.01)
    generator = next(stage for stage in cost_of(profile).stages if stage.name == "generator")
    assert found["generator: products"] == pytest.approx(generator.products_gflop / (1979 * 0.60), rel=1e-3)  # GFLOP / TFLOP/s = ms
    assert found["generator: attention"] == pytest.approx(generator.attention_gflop / (1979 * 0.33), rel=1e-3)
    assert max(found["generator"], found["decoder"]) < found["overlapped step"] < found["generator"] + found["decoder"] + found["hand-off"]
    slower = [model.predicted(profile, "fp8", name)["generator"] for name in ("small operations unfused", "no captured graph", "bf16")]
    assert min(slower) > found["generator"] > model.predicted(profile, "fp8", "one FP8 scale for all rows")["generator"]
    shorter = profile.replace(window=dataclasses.replace(profile.window, frames=15))
    assert model.predicted(shorter, "fp8")["generator: attention"] < 0.6 * found["generator: attention"]
    said = (ROOT / "docs" / "log.md").read_text()  # the table there is this one
    assert f"| {found['generator']:.1f} | {found['decoder']:.1f} | {found['overlapped step']:.1f} | {found['fps']:.0f} |" in said


def test_a_share_of_the_floor_is_its_time_over_the_measured(model: ModuleType) -> None:
    planned = cost_of(load("aapt-8b-736x416-h100"))
    floor = next(stage.floor_ms for stage in planned.stages if stage.name == "generator")
    found = model.share_of_floor(planned, {"generator": 2 * floor})["generator"]
    assert found["share"] == 0.5 and found["tflops"] == pytest.approx((9753.6 + 20384.1) / (2 * floor), rel=1e-3)


GOOD = {
    "parity": {"psnr_db_by_block": [44.0, 41.0], "captured": True},
    "wide": {
        "overlapped": {"steps": 2000, "asked": 2000, "fps": 75.0, "last_tenth_over_first": 1.01, "allocated_bytes_more": 0},
        "stages": {"generator": {"p50": 42.0}},
    },
    "rivals": {"a": {"ms": {"p50": 130.0}}, "b": {"not_run": "why"}, "seconds": 3.0},
}


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        (None, {}),
        ("parity", {"psnr_db_by_block": [44.0, 39.9], "captured": True}),
        ("parity", {"psnr_db_by_block": [44.0], "captured": False}),
        ("wide", {"overlapped": GOOD["wide"]["overlapped"] | {"fps": 59.0}}),
        ("wide", {"overlapped": GOOD["wide"]["overlapped"] | {"allocated_bytes_more": 512}}),
        ("wide", {"overlapped": GOOD["wide"]["overlapped"] | {"last_tenth_over_first": 1.06}}),
        ("wide", {"overlapped": GOOD["wide"]["overlapped"] | {"steps": 1999}}),
        ("wide", {"stages": {"generator": {"p50": 44.0}}}),
        ("rivals", {"a": {"ms": {"p50": 120.0}}}),
    ],
)
def test_each_goal_can_be_missed(model: ModuleType, stage: str | None, change: dict[str, object]) -> None:
    record = {name: dict(found) for name, found in GOOD.items()}
    if stage:
        record[stage] |= change
    found = model.goals(record)
    assert len(found) == 7 and list(found.values()).count(False) == (1 if stage else 0)
    assert model.goals({"wide": {"error": "took longer"}}) == {}


def test_as_a_command_it_writes_its_record(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    done = subprocess.run([sys.executable, BENCH, "--small", "--only", "kernels", "--out", out], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr  # no stage that has a goal was asked for
    record = json.loads(out.read_text())
    assert record["gpu"] == "small" and record["kernels"]["exit_code"] == 0 and "error" not in record["kernels"]
    assert json.loads(done.stdout)["failed"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so_in_two_lines(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, BENCH, "--out", tmp_path / "x.json"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (5, "", [])
    error, hint = done.stderr.strip().splitlines()
    assert error.startswith("error: ") and hint.startswith("hint: ")
