"""docs/deploy-h100.md is true: its commands parse, its messages are the code's, its exit codes are those of errors.py."""

import re
import shlex

import typer.main

from aapt_deploy import errors
from aapt_deploy.cli import app
from tests.support.commands import ROOT

TEXT = (ROOT / "docs" / "deploy-h100.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in TEXT.splitlines() if line.startswith("    aapt ")]
MESSAGES = dict(re.findall(r"^\| `([^`]+)`[^|]*\| (\d) \|", TEXT, re.M))
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "aapt_deploy").rglob("*.py"))


def test_every_command_parses() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in COMMANDS:
        words = shlex.split(re.split(r"[|>]", line)[0], comments=True)[1:]
        with commands[words[0]].make_context(words[0], words[1:]) as context:
            assert context.command.name == words[0], line


def test_there_is_something_to_check() -> None:
    assert len(COMMANDS) >= 9 and len(MESSAGES) >= 20


def test_every_message_is_one_of_the_code_s() -> None:
    made = {"has no tensorrt engine": "has no {backend} engine"}
    assert [message for message in MESSAGES if made.get(message, message) not in SOURCE] == []


def test_exit_codes_are_those_of_the_errors() -> None:
    found = {int(code) for code in re.findall(r"^\| (\d) \|", TEXT, re.M)}
    assert found == {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.AaptError)} - {1}
    assert {int(code) for code in MESSAGES.values()} <= found
