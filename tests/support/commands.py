"""The command line as a process of its own, and how a command in this process ended."""

import inspect
import os
import sys
from typing import Any, NamedTuple

import pytest

from tests.support import ROOT


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """Return the text of the only `error:` line.

        The only `hint:` line and nothing else must follow it.
        """
        lines = self.err.splitlines()
        assert sum(line.startswith("error: ") for line in lines) == 1, self.err
        assert sum(line.startswith("hint: ") for line in lines) == 1, self.err
        assert "Traceback" not in self.err
        assert lines[-2].startswith("error: "), self.err
        assert lines[-1].startswith("hint: ") and lines[-1] != "hint: ", self.err
        return lines[-2].removeprefix("error: ")


COMMAND = [sys.executable, "-W", "error", "-m", "aapt_deploy"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def recorded(
    patch: pytest.MonkeyPatch, owner: object, name: str, answer: object
) -> list[dict[str, Any]]:
    """Put a function that returns `answer` in the place of `owner.name`.

    Return its calls, with every argument by the name of its parameter.
    """
    signature, calls = inspect.signature(getattr(owner, name)), list[dict[str, Any]]()

    def call(*given: Any, **named: Any) -> object:
        bound = signature.bind(*given, **named)
        bound.apply_defaults()
        calls.append(dict(bound.arguments))
        return answer

    patch.setattr(owner, name, call)
    return calls
