"""The documents: links lead somewhere, lines fit, and figures are those of the records."""

import json
import re

import pytest

from tests.support import ROOT

FOUND = (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("plugins/**/*.md"))
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in FOUND)
COLUMNS = 100
WIDE = ("docs/log.md", "plugins/block_causal_attention/README.md")  # a diary, and drawings
MOST_LINES = 400  # of a page that is not the diary
MINUTE = "docs/measurements/minute-2026-11-29.json"
WINDOWS = ("0-5 s", "25-30 s", "55-60 s")


def prose(text: str) -> list[str]:
    """The lines of a page without code and tables, which cannot be broken."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return [line for line in text.splitlines() if not line.startswith(("|", "    ", "<!--"))]


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings give."""
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    plain = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    return {f"{name}-{plain[:i].count(name)}".removesuffix("-0") for i, name in enumerate(plain)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)|^\[\w+\]: (\S+)", text, re.M):
        target, _, anchor = (link[0] or link[1]).partition("#")
        if "://" in target:
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        if not path.exists():
            broken.append(target)
        elif anchor and anchor not in anchors(path.read_text(encoding="utf-8")):
            broken.append(f"{target}#{anchor}")
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_read(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    if page != "docs/log.md":
        assert len(text.splitlines()) <= MOST_LINES
    if page not in WIDE:
        assert [line for line in prose(text) if len(line) > COLUMNS] == []


def test_the_log_has_an_index_of_its_entries() -> None:
    text = (ROOT / "docs" / "log.md").read_text(encoding="utf-8")
    index, entries = text.split("\n## ", 2)[1], text.split("\n## ")[2:]
    linked = re.findall(r"\]\(#([^)]+)\)", index)
    assert index.startswith("Index\n") and set(linked) <= anchors(text)
    assert set(linked) == anchors("\n".join(f"## {entry.splitlines()[0]}" for entry in entries))


def test_the_minute_table_is_the_record_s() -> None:
    text = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    record = json.loads((ROOT / MINUTE).read_text(encoding="utf-8"))
    made = record["made"]["shipped"]
    windows = [made["windows"][0], made["windows"][5], made["windows"][-1]]
    columns = [*windows, record["true"]["last"], made["again"]]
    assert [w["from_s"] for w in windows] == [0, 25, 55] and " | ".join(WINDOWS) in text

    def row(name: str, figures: list[float], form: str) -> str:
        return f"| {name} | " + " | ".join(format(figure, form) for figure in figures) + " |"

    rows = [
        row("sharpness", [c["sharpness"] for c in columns], ".2f"),
        row("change, block to block", [c["dynamics"] for c in columns], ".2f"),
        row("optical flow, block to block", [c["flow"] for c in columns], ".2f"),
        row("colour, levels of 255", [c["colour"] for c in columns], ".0f"),
        row("Frechet distance", [c["distance"] for c in columns], ".2f"),
        row("prompt obeyed", [sum(c["prompt"].values()) / 4 for c in columns], ".2f"),
    ]
    for command in ("yaw", "pitch", "forward", "strafe"):
        rows.append(row(f"answer to {command}", [c["gains"][command] for c in columns], ".2f"))
        errors = [f"{c['gain_errors'][command]:.2f}".removeprefix("0") for c in columns]
        rows.append(f"| its standard error | {' | '.join(errors)} |")
    for key, name in (("right", "sideways"), ("down", "up and down"), ("zoom", "zoom")):
        figures = [c["correlation"][key] for c in columns]
        rows.append(row(f"motion against command: {name}", figures, ".2f"))
    assert [line for line in rows if line not in text] == []
