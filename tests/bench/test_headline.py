"""bench/headline.py without a GPU: every stage runs on postage stamps, predictions add up.

And a verdict follows from a record.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from aapt_deploy.models.cost import cost_of
from aapt_deploy.profiles import load
from tests.support import ROOT

BENCH = ROOT / "bench" / "headline.py"


@pytest.fixture
def headline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCH.parent), *sys.path])
    import headline as module

    monkeypatch.setattr(sys.modules["stages"].HOW, "small", True)
    return module


@pytest.fixture
def model(headline: ModuleType) -> ModuleType:
    return sys.modules["headline_model"]


def found(headline: ModuleType, stage: str) -> dict[str, Any]:
    """Parts of a stage, run in this process, as they come home."""
    parts = sys.modules["stages"].Parts()
    headline.RUNNABLE[stage](parts)
    made: dict[str, Any] = json.loads(json.dumps(parts.found))
    assert not [name for name, part in made.items() if isinstance(part, dict) and "error" in part]
    return made


@pytest.mark.parametrize(("stage", "steps"), [("wide", 8), ("hd15", 4)])
def test_a_stream_is_timed_whole_and_stage_by_stage(
    headline: ModuleType,
    stage: str,
    steps: int,
) -> None:
    parts = found(headline, stage)
    assert parts["opened"]["predicted_ms"]["generator"] > 0
    assert parts["overlapped"]["fps"] > 0 and parts["overlapped"]["steps"] == steps
    stages = parts["stages"]
    assert stages.keys() == {"generator", "commit", "decoder", "hand-off", "serial step"}
    assert stages["serial step"]["p50"] >= stages["generator"]["p50"]
    assert parts["attained"].keys() == {"generator", "decoder"}


def test_parity_is_of_frames_and_of_a_captured_pass(headline: ModuleType) -> None:
    parts = found(headline, "parity")
    assert min(parts["psnr_db_by_block"]) > 50 and parts["captured"] is True


def test_rivals_are_timed_with_a_cache_and_without(headline: ModuleType) -> None:
    parts = found(headline, "rivals")
    assert parts.keys() == {"bf16, SDPA, KV cache", "without a KV cache"}
    assert all(part["ms"]["p50"] > 0 for part in parts.values())


def test_compilation_is_a_stage_of_its_own_over_one_layer(headline: ModuleType) -> None:
    assert found(headline, "compile")["one layer"]["ms"]["p50"] > 0


def test_ablations_stand_beside_their_predictions(headline: ModuleType) -> None:
    parts = found(headline, "ablations")
    assert len(parts) == 5 and all(part["predicted_ms"] > 0 for part in parts.values())
    assert all(part["generator_ms"]["p50"] > 0 for part in parts.values())


def test_the_longest_kernels_are_those_of_a_pass(headline: ModuleType) -> None:
    rows = found(headline, "kernels")["kernels"]
    assert 0 < len(rows) <= 20 and sum(row["share"] for row in rows) <= 1.001


@pytest.mark.parametrize("stage", ["kernels", "ablations", "parity"])
def test_no_decoder_is_opened_where_none_is_measured(
    headline: ModuleType,
    stage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*given: object) -> None:
        pytest.fail("a decoder is opened")

    monkeypatch.setattr(
        sys.modules["aapt_deploy.backends.torch_cuda.engine"], "StreamDecoder", refused
    )
    monkeypatch.setattr(headline, "psnr_by_block", lambda: [60.0])  # that is of frames
    assert found(headline, stage)


def test_the_rivals_cache_is_written_in_place(headline: ModuleType) -> None:
    """All of the cache is seen, with the block behind it, and nothing else of it is copied."""
    rivals = sys.modules["headline_rivals"]
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 3, 2, 8, generator=draw) for _ in range(3))
    caches = [torch.randn(1, 7 + 3, 2, 8, generator=draw) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    out = rivals.by_sdpa(q, k, v, *caches, torch.tensor([7]))
    for cache, old, new in zip(caches, before, (k, v), strict=True):
        assert torch.equal(cache[:, :7], old[:, :7]) and torch.equal(cache[:, 7:], new)
    seen = [torch.cat([old[:, :7], new], 1) for old, new in zip(before, (k, v), strict=True)]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, seen[0]) / 8**0.5
    wanted = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), seen[1])
    torch.testing.assert_close(out, wanted)


def test_a_prediction_is_work_over_rate(model: ModuleType) -> None:
    profile = load("aapt-8b-736x416-h100")
    found = model.predicted(profile, "fp8")
    parts = [value for name, value in found.items() if name.startswith("generator: ")]
    assert sum(parts) == pytest.approx(found["generator"], abs=0.01)
    generator = next(stage for stage in cost_of(profile).stages if stage.name == "generator")
    assert found["generator: products"] == pytest.approx(
        generator.products_gflop / (1979 * 0.60), rel=1e-3
    )  # GFLOP / TFLOP/s = ms
    assert found["generator: attention"] == pytest.approx(
        generator.attention_gflop / (1979 * 0.33), rel=1e-3
    )
    assert (
        max(found["generator"], found["decoder"])
        < found["overlapped step"]
        < found["generator"] + found["decoder"] + found["hand-off"]
    )
    slower = [
        model.predicted(profile, "fp8", name)["generator"]
        for name in ("small operations unfused", "no captured graph", "bf16")
    ]
    assert (
        min(slower)
        > found["generator"]
        > model.predicted(profile, "fp8", "one FP8 scale for all rows")["generator"]
    )
    shorter = profile.replace(window=dataclasses.replace(profile.window, frames=15))
    assert (
        model.predicted(shorter, "fp8")["generator: attention"]
        < 0.6 * found["generator: attention"]
    )
    plain = model.predicted(profile, "bf16", model.RIVAL)
    assert min(slower) < plain["generator"]
    said = (ROOT / "docs" / "log.md").read_text()  # the table there is this one
    row = (
        f"| {found['generator']:.1f} | {found['decoder']:.1f} "
        f"| {found['overlapped step']:.1f} | {found['fps']:.0f} |"
    )
    assert row in said


def test_a_share_of_the_floor_is_its_time_over_the_measured(model: ModuleType) -> None:
    planned = cost_of(load("aapt-8b-736x416-h100"))
    floor = next(stage.floor_ms for stage in planned.stages if stage.name == "generator")
    found = model.share_of_floor(planned, {"generator": 2 * floor})["generator"]
    assert found["share"] == 0.5 and found["tflops"] == pytest.approx(
        (9753.6 + 20384.1) / (2 * floor), rel=1e-3
    )


def test_goals_are_within_what_the_model_says(model: ModuleType) -> None:
    profile = load(model.WIDE)
    ours, plain = (model.predicted(profile, "fp8", name) for name in ("", model.RIVAL))
    assert 0.75 * ours["fps"] < model.goal_fps() < ours["fps"]
    ratio = plain["generator"] / ours["generator"]
    assert 0.75 * ratio < model.goal_ratio() < ratio


GOOD = {
    "parity": {"psnr_db_by_block": [44.0, 41.0], "captured": True},
    "wide": {
        "overlapped": {
            "steps": 1000,
            "asked": 1000,
            "fps": 75.0,
            "last_tenth_over_first": 1.01,
            "allocated_bytes_more": 0,
        },
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
        ("wide", {"overlapped": GOOD["wide"]["overlapped"] | {"steps": 999}}),
        ("wide", {"stages": {"generator": {"p50": 84.0}}}),
        ("rivals", {"a": {"ms": {"p50": 65.0}}}),
    ],
)
def test_each_goal_can_be_missed(
    model: ModuleType, stage: str | None, change: dict[str, object]
) -> None:
    record = {name: dict(found) for name, found in GOOD.items()}
    if stage:
        record[stage] |= change
    found = model.goals(record)
    assert len(found) == 7 and list(found.values()).count(False) == (1 if stage else 0)
    assert model.goals({"wide": {"error": "took longer"}}) == {}


def test_as_a_command_it_writes_its_record(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, BENCH, "--small", "--only", "compile", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr  # no stage that has a goal was asked for
    record = json.loads((out / "record.json").read_text())
    assert record["compile"]["finished"] and record["compile"]["one layer"]["ms"]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["stage"], line["part"]) for line in lines] == [("compile", "one layer")]
    assert "compile    finished" in (out / "log.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("bench", ["headline.py", "attention.py", "gpu.py"])
def test_without_a_gpu_it_says_so_in_two_lines(tmp_path: Path, bench: str) -> None:
    command = [sys.executable, BENCH.parent / bench, "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (5, "", [])
    *_, error, hint = done.stderr.strip().splitlines()
    assert error.startswith("error: PyTorch finds no Hopper GPU") and hint.startswith("hint: ")
