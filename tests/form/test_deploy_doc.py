"""The pages docs/deploy-*.md are true.

Commands parse, figures are those of plan and record, messages are the program's own.
"""

import json
import re
import shlex
import sys

import pytest
import typer.main

from aapt_deploy.backends.trt.remedies import REMEDIES
from aapt_deploy.cli.commands import app
from aapt_deploy.models.cost import cost_of
from aapt_deploy.profiles import Precision, load, preset_folder
from tests.support import ROOT

DOCS = {name: (ROOT / "docs" / f"deploy-{name}.md").read_text("utf-8") for name in ("h100", "rtx")}
COMMANDS = [
    (name, line.strip())
    for name, text in DOCS.items()
    for line in text.splitlines()
    if line.startswith("    aapt ")
]
BUILDS = "rtx-builds-2026-11-30.json"


def source() -> str:
    files = (ROOT / "aapt_deploy").rglob("*.py")
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_every_command_parses(page: str, line: str) -> None:
    words = shlex.split(re.split(r"[|>]", line)[0], comments=True)[1:]
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    with commands[words[0]].make_context(words[0], words[1:]) as context:
        assert context.command.name == words[0]


@pytest.mark.parametrize("page", DOCS)
def test_there_is_something_to_check(page: str) -> None:
    assert sum(name == page for name, _ in COMMANDS) >= 9


def test_every_question_of_the_doctor_is_one_that_it_asks() -> None:
    text, asked = DOCS["h100"], source()
    table = text[text.index("| question |") : text.index("## 2.")]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    questions = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    assert len(questions) >= 12
    assert [name for name in questions if f'"{name}"' not in asked] == []


# --- deploy-rtx.md ---


@pytest.mark.parametrize("name", sorted(p.stem for p in preset_folder().glob("*-rtx*.toml")))
def test_every_preset_for_rtx_has_its_row_of_the_plan(name: str) -> None:
    planned = cost_of(load(name))
    assert planned.floor_ms is not None
    share = f"{planned.floor_ms / planned.budget_ms:.0%}".replace("%", " %")
    late = ": late" * (planned.floor_ms > 0.75 * planned.budget_ms)
    memory = f"{planned.total_gb:.2f} of {planned.limit_gb}"
    row = f"| `{name}` | {planned.target} | {memory} | {planned.floor_ms:.1f} | {share}{late} |"
    assert row in DOCS["rtx"].splitlines()


def test_what_wider_caches_need_is_the_plan_s() -> None:
    profile, text = load("aapt-8b-736x416-rtx-5090"), " ".join(DOCS["rtx"].split())
    wide = cost_of(profile.replace(precision=Precision("bf16", "fp8_e4m3", "bf16")))
    assert f"the 8B needs {wide.total_gb:.2f} GB at {profile.window.frames} frames" in text
    assert f"A step's floor is then {wide.floor_ms:.1f} ms on an RTX 5090" in text


def test_what_builds_take_is_the_record_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    import rtx

    record = json.loads((ROOT / "docs" / "measurements" / BUILDS).read_text(encoding="utf-8"))
    assert rtx.table(record["rows"]) in DOCS["rtx"]
    assert ("had other work" in DOCS["rtx"]) == record["loaded_machine"]
    peaks = {
        (row["shape"], row["form"]): row["peak_mb"]
        for row in record["rows"]
        if row["graph"] == "generator"
    }

    def of_36_layers(form: str) -> str:
        one, two = peaks["8B, 1 layer", form], peaks["8B, 2 layers", form]
        return f"{(one + 35 * (two - one)) / 1000:.0f} GB"

    told = f"{of_36_layers('fp8')} for its generator in FP8 and {of_36_layers('bf16')} in bf16"
    assert told in " ".join(DOCS["rtx"].split())


def test_every_message_is_one_of_tensorrt_or_of_ours() -> None:
    table = DOCS["rtx"][DOCS["rtx"].index("| it says |") :]
    said = re.findall(r"^\| `([^`]+)`", table, re.M)
    assert len(said) >= 10
    ours = source()
    known = lambda text: any(re.search(remedy.said, text) for remedy in REMEDIES)
    own = lambda text: re.sub(r" \d+$", " ", text) in ours
    assert [text for text in said if not known(text) and not own(text)] == []
