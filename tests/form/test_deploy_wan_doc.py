"""docs/deploy-wan.md is true: its commands parse, its presets ship, its floors are the plan's."""

import re
import shlex

import pytest
import typer.main

from aapt_deploy import profiles
from aapt_deploy.cli.commands import app
from aapt_deploy.models import cost, published
from tests.support import ROOT

TEXT = (ROOT / "docs" / "deploy-wan.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in TEXT.splitlines() if line.startswith("    aapt ")]
FLOORS = re.findall(r"^\| `([\w-]+)`,.*\| (\d+) \| (\d+) \| (\d+) \|$", TEXT, re.M)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line: str) -> None:
    words = shlex.split(line)[1:]
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    with commands[words[0]].make_context(words[0], words[1:]) as context:
        assert context.command.name == words[0]
    if "--preset" in words:
        profiles.load(words[words.index("--preset") + 1])


def test_there_is_something_to_check() -> None:
    assert len(COMMANDS) >= 15 and len(FLOORS) == 4


@pytest.mark.parametrize(("preset", "floor_ms", "budget_ms", "memory_gb"), FLOORS)
def test_floors_are_the_plan_s(preset: str, floor_ms: str, budget_ms: str, memory_gb: str) -> None:
    planned = cost.cost_of(profiles.load(preset))
    assert (round(planned.floor_ms or 0), round(planned.budget_ms)) == (
        int(floor_ms), int(budget_ms),
    )  # fmt: skip
    assert round(planned.total_gb) == int(memory_gb)


def test_every_known_file_is_in_the_table() -> None:
    for known in published.KNOWN:
        repository, _, file = known.place.partition(": ")
        assert file in TEXT and repository in TEXT and f"`{known.preset}-*`" in TEXT
