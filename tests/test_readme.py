"""The README is true: its tree names every module, and every command it shows is one that the command line accepts."""

import re
import shlex

import typer.main

from aapt_deploy.cli import app
from tests.support.commands import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.strip().removeprefix("$ ") for line in README.splitlines() if re.match(r"    (\$ )?aapt ", line)]


def test_the_tree_names_every_module() -> None:
    tree = README[README.index("    aapt_deploy/\n") :]
    missing = [path.name for path in (ROOT / "aapt_deploy").rglob("*.py") if path.name != "__init__.py" and path.name not in tree]
    assert not missing


def test_the_tree_names_no_module_that_is_gone() -> None:
    tree = README[README.index("    aapt_deploy/\n") :]
    there = {path.name for path in (ROOT / "aapt_deploy").rglob("*.py")}
    assert set(re.findall(r"\b\w+\.py\b", tree)) <= there


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 6


def test_every_command_parses() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in COMMANDS:
        words = shlex.split(line.split("|")[0], comments=True)[1:]
        with commands[words[0]].make_context(words[0], words[1:]) as context:  # raises for what is not there
            assert context.command.name == words[0], line


def test_every_file_it_points_to_exists() -> None:
    paths = [a or b for a, b in re.findall(r"\((docs/[^)]+)\)|`(docs/[^`]+)`", README)]
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
