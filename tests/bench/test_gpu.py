"""bench/gpu.py rehearsed on a CPU: hangs, crashes, wrong results, a full disk, no git."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support import ROOT

BENCH = ROOT / "bench"
FAKE = """
import json, sys
sys.path.insert(0, {bench!r})
from stages import Parts
given = sys.argv[1:]
value = lambda name: given[given.index(name) + 1]
skip = given[given.index("--skip") + 1 :] if "--skip" in given else []
parts = Parts(skip, float(value("--seconds")), printed=True)
for name, result in json.loads({results!r}).get(value("--stage"), {{}}).items():
    def call(result=result):
        if result == "hang":
            import time
            time.sleep(60)
        return result
    parts.run(name, call)
parts.run("given", lambda: [x for x in given if x.startswith(("--precision", "--variant"))])
"""
RIGHT = {"ok": True}
SMOKE = {"fp8 attention, D = 128": RIGHT, "fp8 attention, D = 64": RIGHT, "fp8 product": RIGHT}
WRONG = {"ok": False}
VARIANTS = {"variant prefetch 8": RIGHT, "variant K6V5": RIGHT, "variant loads first": WRONG}
SPEED = {"a: prefetch 8": {"ms": 2.0}, "a: K6V5": {"ms": 1.9}, "a: loads first": {"ms": 1.0}}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    import gpu as module

    monkeypatch.setattr(module.HOW, "small", True)
    return module


@pytest.fixture
def faked(
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[dict[str, Any], list[str], float], dict[str, Any]]:
    """The record of a run whose stages only say what they are told to."""
    true = gpu.command

    def run(results: dict[str, Any], names: list[str], budget: float = 300) -> dict[str, Any]:
        script = tmp_path / "fake.py"
        script.write_text(FAKE.format(bench=str(BENCH), results=json.dumps(results)))
        like = lambda name, record: [sys.executable, str(script), *true(name, record)[2:]]
        monkeypatch.setattr(gpu, "command", like)
        run.code = gpu.run(names, tmp_path / "out", budget)  # type: ignore[attr-defined]
        found: dict[str, Any] = json.loads((tmp_path / "out" / "record.json").read_text())
        return found

    return run


# --- the plan ---


def test_shares_fit_the_time_and_the_first_command_has_what_is_worth_most(gpu: ModuleType) -> None:
    shares = {name: stage.seconds for name, stage in gpu.STAGES.items()}
    worth = [name for name in shares if name not in gpu.ASKED_FOR]
    assert sum(shares[name] for name in worth) <= gpu.WHOLE_S <= 15 * 60 - 120
    first = worth[: worth.index("kernels") + 1]
    assert sum(shares[name] for name in first) <= gpu.BUDGET_S < 600
    order = "smoke products speed correct wide kernels rivals hd15 parity tests ablations hd30"
    assert worth[1:] == [*order.split(), "compile"]
    assert shares["smoke"] == gpu.allowed("smoke", 1000, 1000) == 25


def test_a_stage_may_use_what_others_left_but_not_more_than_twice_its_share(
    gpu: ModuleType,
) -> None:
    share = gpu.STAGES["wide"].seconds
    assert gpu.allowed("wide", 0, 1000) == gpu.allowed("wide", -50, 1000) == share
    assert gpu.allowed("wide", 30, 1000) == share + 30
    assert gpu.allowed("wide", 500, 1000) == 2 * share
    assert gpu.allowed("wide", 500, 10) == 10


@pytest.mark.parametrize(
    ("smoke", "precision", "words"),
    [
        (SMOKE, "fp8", "smoke is right"),
        (SMOKE | {"fp8 product": {"ok": False}}, "bf16", "fp8 product"),
        (SMOKE | {"fp8 product": {"error": "took too long"}}, "bf16", "fp8 product"),
        ({"fp8 product": RIGHT, "error": "took longer than 25 s"}, "bf16", "25 s"),
        ({}, "bf16", "no smoke run"),
        (SMOKE | {"bf16 attention": {"ok": False}}, "fp8", "smoke is right"),
    ],
)
def test_the_smoke_run_decides(
    gpu: ModuleType,
    smoke: dict[str, Any],
    precision: str,
    words: str,
) -> None:
    found = gpu.decided({"smoke": smoke})
    assert found["precision"] == precision and words in found["why"] and "variant" not in found


def test_the_fastest_variant_is_taken_among_the_right_ones(gpu: ModuleType) -> None:
    record = {"smoke": SMOKE | VARIANTS, "speed": SPEED}
    assert gpu.decided(record)["variant"] == "K6V5"
    lone = SPEED | {"b: prefetch 8": {"ms": 9.0}, "b: K6V5": {"error": "took too long"}}
    assert gpu.fastest_variant(record | {"speed": lone}) == "prefetch 8"
    assert gpu.fastest_variant(record | {"speed": {"a: Triton bf16": {"ms": 0.1}}}) is None


# --- a run of stages that only say what they are told ---


def test_stages_behind_the_smoke_are_told_what_it_decided(faked: Any) -> None:
    found = faked({"smoke": SMOKE | VARIANTS, "speed": SPEED}, ["smoke", "speed", "wide"])
    assert found["speed"]["given"] == ["--precision=fp8"]
    assert found["wide"]["given"] == ["--precision=fp8", "--variant=K6V5"]
    found = faked({}, ["smoke", "wide", "hd15"])
    assert found["hd15"]["given"] == ["--precision=fp8", "--variant=K6V5"], "finished: kept"


def test_wrong_fp8_sends_the_rest_to_bf16(faked: Any) -> None:
    wrong = SMOKE | {"fp8 attention, D = 128": {"ok": False, "diagnosis": "rows"}}
    found = faked({"smoke": wrong}, ["smoke", "wide"])
    assert found["wide"]["given"] == ["--precision=bf16"]
    assert found["decided"]["why"] == "wrong: fp8 attention, D = 128" and faked.code == 3


def test_a_second_run_goes_on_with_what_is_not_finished(
    faked: Any,
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = {name: stage._replace(seconds=3) for name, stage in gpu.STAGES.items()}
    monkeypatch.setattr(gpu, "STAGES", short)
    results = {"smoke": SMOKE, "correct": {"one": RIGHT, "two": "hang"}}
    names = ["smoke", "correct", "hd15"]
    found = faked(results, names)
    assert found["correct"]["one"] == RIGHT and not found["correct"]["finished"]
    assert "took longer" in found["correct"]["error"] and found["hd15"]["finished"]
    again = {"smoke": {}, "correct": {"one": {"ok": "run anew"}, "two": RIGHT}}
    found = faked(again, names)
    assert found["correct"]["one"] == found["correct"]["two"] == RIGHT
    assert found["correct"]["finished"] and "error" not in found["correct"]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("smoke: begins") == log.count("hd15: begins") == 1
    assert log.count("correct: begins") == 2


def test_without_time_a_stage_is_not_begun(faked: Any, tmp_path: Path) -> None:
    found = faked({"smoke": SMOKE}, ["smoke", "wide"], 20)
    assert found["smoke"]["finished"] and "wide" not in found
    assert "wide: no time left" in (tmp_path / "out" / "log.txt").read_text()


def test_an_end_from_outside_leaves_the_table_and_the_record(
    faked: Any,
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true = gpu.run_one

    def run_one(name: str, *given: Any) -> Any:
        if name == "wide":
            sys.exit(143)  # what the handler of SIGTERM does
        return true(name, *given)

    monkeypatch.setattr(gpu, "run_one", run_one)
    with pytest.raises(SystemExit):
        faked({"smoke": SMOKE}, ["smoke", "wide"])
    assert json.loads((tmp_path / "out" / "record.json").read_text())["smoke"]["finished"]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "smoke      finished" in log and "wide       not begun" in log


def test_a_folder_that_cannot_be_made_is_told_before_anything_runs(
    gpu: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    assert gpu.run(["smoke"], tmp_path / "file" / "out", 10) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: cannot make the folder") and hint.startswith("hint: ")


def test_figures_of_a_rehearsal_and_of_a_gpu_do_not_mix(
    faked: Any,
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    faked({"smoke": SMOKE}, ["smoke"])
    before = (tmp_path / "out" / "record.json").read_bytes()
    monkeypatch.setattr(gpu.HOW, "small", False)
    capsys.readouterr()
    assert gpu.run(["smoke"], tmp_path / "out", 100) == 2
    assert capsys.readouterr().err.splitlines()[0].endswith("has figures of --small")
    assert (tmp_path / "out" / "record.json").read_bytes() == before


def test_without_git_there_is_a_record_without_a_revision(
    faked: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert faked({"smoke": SMOKE}, ["smoke"])["git"] is None


# --- the true stages ---

FAULTS = {  # stage: part: what is planted
    "products": {"accumulator": "crash"},
    "speed": {"loads first": "hang", "Triton": "refuse"},
    "correct": {"D 64, T 65": "crash"},
    "wide": {"stages": "stall"},
    "rivals": {"without": "hang"},
    "ablations": {"unfused": "crash"},
    "compile": {"one layer": "refuse"},
}
BRIEF = {"wide": 40, "smoke": 60}  # seconds; a CPU that others use needs longer for the smoke run


@pytest.fixture
def planted(
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[dict[str, Any], list[str]], dict[str, Any]]:
    """The record of a run of the true stages with faults, without git and most packages."""
    true, monkey = gpu.command, str(ROOT / "tests" / "support" / "planted_stage.py")
    stages = {name: s._replace(seconds=BRIEF.get(name, 150)) for name, s in gpu.STAGES.items()}
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setenv("PATH", str(tmp_path))

    def run(faults: dict[str, Any], names: list[str]) -> dict[str, Any]:
        def command(name: str, record: dict[str, Any]) -> list[str]:
            python, *rest = true(name, record)
            return [python, monkey, json.dumps(faults), *rest]

        monkeypatch.setattr(gpu, "command", command)
        gpu.run(names, tmp_path / "out", 3600)
        found: dict[str, Any] = json.loads((tmp_path / "out" / "record.json").read_text())
        return found

    return run


@pytest.mark.slow
def test_a_rehearsal_with_a_fault_in_nearly_every_stage(
    gpu: ModuleType,
    planted: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each costs its part alone; the disk is full while three of the stages run."""
    true, full = gpu.run_one, tmp_path / "out" / "record.tmp"

    def run_one(name: str, *given: Any) -> Any:
        if name == "correct":
            full.symlink_to("/dev/full")
        if name == "rivals":
            full.unlink()
        return true(name, *given)

    monkeypatch.setattr(gpu, "run_one", run_one)
    names = [name for name in gpu.STAGES if name not in gpu.ASKED_FOR]
    found = planted(FAULTS, names)
    parts = [(stage, part) for stage in names for part in found[stage] if part not in gpu.META]
    lost = {(stage, part) for stage, part in parts if gpu.failed(found[stage][part])}
    pairs = {(stage, key) for stage, keys in FAULTS.items() for key in keys}
    missed = [key for stage, key in pairs if not [p for s, p in lost if s == stage and key in p]]
    assert missed == ["stages"]  # whose time was up with the stage's
    assert all(any(key in part for s, key in pairs if s == stage) for stage, part in lost)
    unfinished = [stage for stage in names if not found[stage]["finished"]]
    assert unfinished == ["wide"] and found["wide"]["overlapped"]["fps"] > 0
    assert found["git"] is None and found["decided"]["precision"] == "fp8"
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "begins again" in log and "wide       cut short" in log

    monkeypatch.setattr(gpu, "run_one", true)
    patient = gpu.STAGES | {"wide": gpu.STAGES["wide"]._replace(seconds=300)}
    monkeypatch.setattr(gpu, "STAGES", patient)
    again = planted({}, names)
    assert again["wide"]["finished"] and again["wide"]["overlapped"] == found["wide"]["overlapped"]
    assert [stage for stage in names if not again[stage]["finished"]] == []


@pytest.mark.slow
def test_a_rehearsal_with_a_wrong_kernel_names_its_mistake(planted: Any) -> None:
    """And goes on in bf16."""
    found = planted({"smoke": {"kernel": "wrong"}}, ["machine", "smoke", "wide"])
    diagnosis = found["smoke"]["fp8 attention, D = 128"]["diagnosis"]
    assert diagnosis["explained_by"] == "only the block is seen"
    assert found["decided"]["precision"] == "bf16"
    assert found["wide"]["opened"]["precision"] == "fp32"  # what --small has in its place
