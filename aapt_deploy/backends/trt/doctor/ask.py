"""`aapt doctor --tensorrt`: what TensorRT does on this machine, asked by micro-engines, and kept as a receipt that the builder reads.

Every question of probes.py runs in a process of its own, `python -m aapt_deploy.backends.trt.doctor.ask NAME`: a crash of TensorRT, or a hang, is a
failed check and not a dead doctor. The answers hold for one GPU architecture, TensorRT, CUDA and driver (receipts.py).
"""

import importlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aapt_deploy.backends.trt.cuda import Gpu
from aapt_deploy.backends.trt.doctor import receipts
from aapt_deploy.backends.trt.doctor.receipts import Choice, Proof
from aapt_deploy.bundle.files import writing
from aapt_deploy.errors import AaptError, MachineError, needs_extra

MODULE = "aapt_deploy.backends.trt.doctor.ask"
PATIENCE_S = 180.0  # for one question; a micro-engine takes seconds
LOOK_S = 60.0  # for what is here


@dataclass(frozen=True)
class Findings:
    """All answers, and where they are kept."""

    here: Gpu
    proofs: list[Proof]
    receipt: Path

    @property
    def choices(self) -> list[Choice]:
        """The forms of attention that a build of an fp8 bundle would try, the best first."""
        return receipts.choose({proof.name: proof for proof in self.proofs}, fp8=True)

    @property
    def usable(self) -> bool:
        """Whether a plan can be built and run here at all."""
        return any(proof.name == receipts.NATIVE_BUILDS and proof.ok for proof in self.proofs)


def examine(
    report: Callable[[str], None],
    names: Sequence[str] = receipts.PROBES,
    patience_s: float = PATIENCE_S,
) -> Findings:
    """Ask every question, one after the other, and keep the receipt.

    Raises MachineError where TensorRT, a driver or a GPU is missing, OutputError when the receipt cannot be written.
    """
    told, reason = _ask("here", LOOK_S)
    if told is None or "error" in told:
        raise MachineError(
            str(told["error"]) if told else f"TensorRT cannot be looked at: {reason}",
            str(told["hint"]) if told else "aapt doctor",
        )
    here = Gpu(**told)
    found = []
    for name in names:
        report(f"{name} on {here.gpu}, TensorRT {here.tensorrt}")
        began = time.monotonic()
        told, reason = _ask(name, patience_s)
        ok, said = (
            (told.get("ok") is True, str(told.get("found", told.get("error", ""))))
            if told
            else (False, reason)
        )
        found.append(Proof(name, ok, said, round(time.monotonic() - began, 1)))
    with writing(receipts.receipt_file(here), "set XDG_CACHE_HOME to a folder of yours"):
        return Findings(here, found, receipts.save(here, found))


def _ask(name: str, patience_s: float) -> tuple[dict[str, Any] | None, str]:
    """The answer of one process, or None and why there is none."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", MODULE, name],
            capture_output=True,
            text=True,
            timeout=patience_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {patience_s:.0f} s"
    try:
        told = json.loads(done.stdout.strip().splitlines()[-1])
        if isinstance(told, dict):
            return told, ""
    except (ValueError, IndexError):
        pass
    last = next(
        (line for line in reversed(done.stderr.strip().splitlines()) if line.strip()),
        "it said nothing",
    )
    if done.returncode < 0:
        return None, f"crashed with {signal.Signals(-done.returncode).name}: {last}"
    return None, f"ended with code {done.returncode}: {last}"


def _answer(name: str) -> None:
    """Answer in this process: one line of JSON on stdout."""
    try:
        with needs_extra("export"):
            importlib.import_module("aapt_deploy.backends.trt.doctor.probes").main(name)
    except AaptError as error:
        print(json.dumps({"error": str(error), "hint": error.hint}), flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    _answer(sys.argv[1])
