"""The command line as a process of its own, and how a command in this process ended."""

import os
import sys
from typing import NamedTuple

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
