"""Start a process that answers one question, and read its answer."""

import json
import signal
import subprocess
import sys
from typing import Any


def ask_process(
    module: str, arguments: list[str], patience_s: float
) -> tuple[dict[str, Any] | None, str]:
    """Return the answer of `python -m module arguments`, or None and the reason."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            capture_output=True, text=True, timeout=patience_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"no answer within {patience_s:.0f} s"
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        if isinstance(answer, dict):
            return answer, ""
    except (ValueError, IndexError):
        pass
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    if done.returncode < 0:
        return None, f"crashed with {signal.Signals(-done.returncode).name}: {last}"
    return None, f"ended with code {done.returncode}: {last}"
