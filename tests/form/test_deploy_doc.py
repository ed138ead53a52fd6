"""docs/deploy-h100.md is true: its commands parse, and it names the doctor's questions."""

import re
import shlex

import pytest
import typer.main

from aapt_deploy.cli.commands import app
from tests.support import ROOT

TEXT = (ROOT / "docs" / "deploy-h100.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in TEXT.splitlines() if line.startswith("    aapt ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line: str) -> None:
    words = shlex.split(re.split(r"[|>]", line)[0], comments=True)[1:]
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    with commands[words[0]].make_context(words[0], words[1:]) as context:
        assert context.command.name == words[0]


def test_there_is_something_to_check() -> None:
    assert len(COMMANDS) >= 9


def test_every_question_of_the_doctor_is_one_that_it_asks() -> None:
    files = (ROOT / "aapt_deploy").rglob("*.py")
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    table = TEXT[TEXT.index("| question |") : TEXT.index("## 2.")]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    questions = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    assert len(questions) >= 12
    assert [name for name in questions if f'"{name}"' not in source] == []
