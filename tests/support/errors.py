"""Errors that the package raises in a test, whether or not the test looks at their words."""

import re
from collections.abc import Iterator

import pytest

from aapt_deploy.errors import AaptError


@pytest.fixture(autouse=True)
def errors_in_words(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test in which an error has no message, or something else than text in its place.

    A `None` inside the message or the hint is a value that was not there.
    """
    made, wordless = AaptError.__init__, list[tuple[object, object]]()

    def checked(error: AaptError, message: str, hint: str = "") -> None:
        made(error, message, hint)
        words = isinstance(message, str) and message.strip() and isinstance(hint, str)
        if not words or re.search(r"\bNone\b(?! in sys.modules)", f"{message} {hint}"):
            wordless.append((message, hint))

    monkeypatch.setattr(AaptError, "__init__", checked)
    yield
    assert not wordless
