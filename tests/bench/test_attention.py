"""bench/attention.py without a GPU: stages over NumPy, the model, what is said of a fault."""

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from aapt_deploy.ops.block_causal_attention import kernels
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import TILE_KEYS, Swizzle, geometry
from tests.support import ROOT
from tests.support.attention_checks import Case, image


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    import attention as module

    monkeypatch.setattr(sys.modules["stages"].HOW, "small", True)
    return module


@pytest.mark.parametrize("stage", ["machine", "smoke", "products", "speed", "correct"])
def test_every_stage_runs_and_nothing_is_wrong(attention: ModuleType, stage: str) -> None:
    parts = sys.modules["stages"].Parts()
    attention.RUNNABLE[stage](parts)
    told = {name: part for name, part in parts.found.items() if isinstance(part, dict)}
    assert told and not [name for name, part in told.items() if isinstance(part.get("error"), str)]
    assert all(part["ok"] for part in told.values() if "ok" in part)
    if stage == "speed":
        ours = [name for name in told if name.removesuffix(", again").endswith("loads first")]
        assert len(ours) == 2 and all(told[name]["predicted_tflops"] for name in ours)


def test_fp8_that_is_wrong_is_not_run_again(
    attention: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules["stages"].HOW, "precision", "bf16")
    parts = sys.modules["stages"].Parts()
    attention.speed(parts)
    assert parts.found and not [n for n in parts.found if n.rpartition(": ")[2] in kernels.VARIANTS]
    parts = sys.modules["stages"].Parts()
    attention.correct(parts)
    assert parts.found.keys() == {"bf16 attention"} and parts.found["bf16 attention"]["ok"]


# --- the model ---


def test_waves_are_those_of_132_multiprocessors(attention: ModuleType) -> None:
    model = attention.model
    found = {title: model.waves(shape)[:2] for title, shape in model.SHAPES.items()}
    assert list(found.values()) == [(240, 2), (696, 6), (156, 2), (444, 4)]
    first = model.waves(model.SHAPES["736x416, 30 frames"])
    assert first.filled * first.useful == pytest.approx(0.849, abs=0.001)


def test_goals_are_what_the_model_reaches_at_its_worst(attention: ModuleType) -> None:
    model = attention.model
    worst = model.tflops(model.SHAPES["736x416, 30 frames"], kernels.Variant(), pessimistic=True)
    assert 600 < model.GOAL_TFLOPS < worst and 1 < model.GOAL_RATIO < 1.2


def test_the_log_has_the_models_table(attention: ModuleType) -> None:
    said = (ROOT / "docs" / "log.md").read_text()
    assert [line for line in attention.model.table().splitlines() if line not in said] == []


def test_goals_follow_from_a_record(attention: ModuleType) -> None:
    title, goals = "736x416, 30 frames", attention.model.goals
    fast = {
        f"{title}: prefetch 8": {"tflops": 900.0},
        f"{title}: PyTorch flash bf16": {"tflops": 600.0},
    }
    good = {"correct": {"a": {"error": 0.01, "ok": True}, "finished": True}, "speed": fast}
    assert len(goals(good)) == 3 and all(goals(good).values())
    slow = good | {"speed": fast | {f"{title}: prefetch 8": {"tflops": 601.0}}}
    assert list(goals(slow).values()) == [True, False, False]
    for part in ({"ok": False}, {"error": "took too long"}):
        assert not goals(good | {"correct": {"a": part}})["correct: nothing is wrong"]
    assert goals({}) == {}


# --- what is said of a fault ---


def straight(dim: int) -> tuple[Any, Any]:
    """Offsets of K and V tiles without swizzle; V's keys in the order of columns."""
    shape, plain = geometry(dim), Swizzle(16, 0)  # one piece to a row: nothing to exchange
    keys, channels = np.arange(TILE_KEYS)[:, None], np.arange(dim)
    k = plain.apply(keys * dim + channels)
    back = shape.v_swizzle.apply(np.asarray(shape.v_offsets))  # its own inverse
    return np.asarray(k, np.intp), np.asarray(back, np.intp)


def keys_in_order(dim: int) -> Any:
    swizzle, keys = geometry(dim).v_swizzle, np.arange(TILE_KEYS)[:, None]
    return np.asarray(swizzle.apply(np.arange(dim) * TILE_KEYS + keys), np.intp)


def with_images(case: Case, index: int, offsets: Any) -> None:
    """Lay K (0) or V (1) of `case` out as a kernel with a mistake would read them."""
    codes = case.codes[1 + index]
    case.block[index] = image(codes[case.cached :], offsets)
    clean, capacity = torch.zeros_like(case.cache[index]), case.cached + 70
    case.cache[index] = image(codes[: case.cached], offsets, capacity, clean)


FAULTS = [
    "K is not swizzled",
    "V is not swizzled",
    "V is read in the order of keys, not of P's columns",
    "rows g and g + 8 of Q are exchanged",
    "only the block is seen",
    "scores lack 1 / sqrt(D)",
    "nothing: within rounding of the model",
]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_diagnosis_names_the_fault(attention: ModuleType, fault: str, dim: int) -> None:
    case = Case("plain", 64, 128, 1, dim, 0, "cpu")
    wanted = case.model  # of the case without its fault
    assert wanted.isfinite().all()
    true_q, true_scales = case.q, case.scales
    if fault == FAULTS[0]:
        with_images(case, 0, straight(dim)[0])
    elif fault == FAULTS[1]:
        with_images(case, 1, straight(dim)[1])
    elif fault == FAULTS[2]:
        with_images(case, 1, keys_in_order(dim))
    elif fault == FAULTS[3]:
        case.q = case.q[torch.arange(64) ^ 8].contiguous()
    elif fault == FAULTS[5]:
        scales = {**vars(case.scales), "k": case.scales.k * dim**0.5}
        case.scales = type(case.scales)(**scales)
    cached = case.cached
    case.cached = 0 if fault == FAULTS[4] else cached
    out = case.attend(attention.in_numpy)
    case.q, case.scales, case.cached = true_q, true_scales, cached
    found = attention.diagnose(case, out)
    assert found["explained_by"] == fault, found["if"]
    assert set(found["by_group"]["rows of warp"]) == {"0", "1", "2", "3"}


def test_an_unknown_fault_is_called_that_and_its_group_stands_out(attention: ModuleType) -> None:
    case = Case("plain", 64, 128, 2, 64, 0, "cpu")
    out = case.attend(attention.in_numpy)
    out[16:32, 1] = 0  # the second warp's rows of the second head
    found = attention.diagnose(case, out)
    assert found["explained_by"] == "none of the known mistakes"
    warps, heads = found["by_group"]["rows of warp"], found["by_group"]["head"]
    assert warps["1"] > 0.5 > 0.1 > max(warps["0"], warps["2"], warps["3"])
    assert heads["1"] > 0.3 > 0.1 > heads["0"]
