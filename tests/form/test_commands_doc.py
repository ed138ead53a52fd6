"""docs/commands.md and docs/messages.md are what the program says."""

import re

import pytest

from tests.support import ROOT, pages


@pytest.mark.parametrize("page", pages.PAGES)
def test_a_page_is_what_the_program_says(page: str) -> None:
    written = (ROOT / page).read_text(encoding="utf-8")
    assert written == pages.PAGES[page](), f"{page} is out of date; renew it with: {pages.RENEW}"


def test_the_pages_are_not_empty() -> None:
    named = re.findall(r"^## (aapt .+)$", pages.commands(), re.M)
    assert {"aapt export", "aapt stream", "aapt train run"} <= set(named)
    found = list(pages.raised(pages.parsed()))
    assert len(found) > 150 and {row.exit_code for row in found} == set(pages.meanings()) - {3}


def test_messages_are_read_whole() -> None:
    """Constants are filled in, variables are named, and hints of a function are followed.

    Hints that depend on the case are the exception, so their number has a limit.
    """
    text = pages.messages()
    assert "| `package {name} is not installed` | pip install 'aapt_deploy[{extra}]' |" in text
    assert "| `bundle {path} exists` | add --force to replace it |" in text
    assert "| `checkpoint {path} is not of format aapt-checkpoint-1: {found}` |" in text
    assert "make a whole one in its place with: aapt export CKPT -o {path} --force |" in text
    assert text.count("*as printed*") <= 12


def test_pages_name_their_maker() -> None:
    assert all(pages.NOTE in (ROOT / page).read_text(encoding="utf-8") for page in pages.PAGES)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "\ndocs: " in makefile and "-m tests.support.pages" in makefile
