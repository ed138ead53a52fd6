"""The README is true: its commands parse, its rooms exist, its figures are those of the records."""

import ast
import json
import re
import shlex

import pytest
import typer.main

from aapt_deploy.cli.commands import app
from tests.support import ROOT

PACKAGE = ROOT / "aapt_deploy"
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (?:\$ )?(aapt .+)$", README, re.M)
LINES, COLUMNS = 120, 100
CPU = "docs/measurements/cpu-2026-11-24.json"
MINUTE = "docs/measurements/minute-2026-11-29.json"


def rooms() -> list[str]:
    """The rooms that the README lists, as `name.py` and `name/`."""
    tree = README[README.index("    aapt_deploy/\n") :].split("\n\n")[0]
    return re.findall(r"^      (\w+(?:\.py|/))", tree, re.M)


def test_the_tree_names_every_room() -> None:
    there = {f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    there |= {path.name for path in PACKAGE.glob("[!_]*.py")}
    assert sorted(rooms()) == sorted(there)


def test_every_room_lists_its_files() -> None:
    missing = []
    for room in (PACKAGE / name for name in rooms() if name.endswith("/")):
        source = (room / "__init__.py").read_text(encoding="utf-8")
        text = ast.get_docstring(ast.parse(source)) or ""
        names = [path.stem for path in room.glob("[!_]*.py")]
        names += [path.name for path in room.iterdir() if (path / "__init__.py").is_file()]
        missing += [f"{room.name}/{name}" for name in names if not re.search(rf"\b{name}\b", text)]
    assert missing == []


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line: str) -> None:
    words = shlex.split(line.split("|")[0], comments=True)[1:]
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    with commands[words[0]].make_context(words[0], words[1:]) as context:  # raises if it is wrong
        assert context.command.name == words[0]


def test_it_fits_a_screen() -> None:
    lines = README.splitlines()
    assert len(lines) <= LINES
    assert [line for line in lines if len(line) > COLUMNS] == []


def test_every_figure_is_the_one_of_its_record() -> None:
    cpu = json.loads((ROOT / CPU).read_text(encoding="utf-8"))
    minute = json.loads((ROOT / MINUTE).read_text(encoding="utf-8"))
    latency = cpu["latency"]
    p95, budget, fps = (
        latency["steady"]["step"]["p95_ms"],
        latency["budget_ms"],
        latency["sustained_fps"],
    )
    first_block_s = cpu["start"]["stream_first_block_ms"] / 1e3
    psnr = cpu["engines"]["onnxruntime-int8"]["psnr_db"]
    last = minute["made"]["shipped"]["windows"][-1]["sharpness"]
    told = (
        f"verdict: within budget: step p95 {p95:.1f} ms of {budget:.1f} ms ({p95 / budget:.0%})",
        f"real time: {fps:.0f} fps of {latency['machine']['cores']} CPU cores, 24 needed",
        f"It makes {fps:.0f} frames a second",
        f"({budget:.1f} ms) | [{p95:.1f} ms]({CPU})",
        f"[{fps:.0f}]({CPU})",
        f"[{first_block_s:.2f} s]({CPU})",
        f"[{psnr:.1f} dB]({CPU})",
        f"after a minute ({minute['true']['last']['sharpness']:.2f}) | [{last:.2f}]({MINUTE})",
    )
    assert [figure for figure in told if figure not in README] == []
