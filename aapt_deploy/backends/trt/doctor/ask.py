"""`aapt doctor --tensorrt`: check what TensorRT does on this machine and keep a receipt.

Every check of probes.py runs in a process of its own, `python -m ... .doctor.ask NAME`. So a
crash or a hang of TensorRT is a failed check, and the next one runs. Answers are
valid for one GPU architecture, TensorRT, CUDA and driver (receipts.py). The builder reads the
receipt.
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
from aapt_deploy.backends.trt.flavour import LEAN
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
        """Return the forms of attention that a build of an fp8 bundle tries, the best first."""
        return receipts.choose({proof.name: proof for proof in self.proofs}, fp8=True)

    @property
    def usable(self) -> bool:
        """Return whether a plan can be built and run here at all."""
        return any(proof.name == receipts.NATIVE_BUILDS and proof.ok for proof in self.proofs)


def examine(
    report: Callable[[str], None],
    names: Sequence[str] = receipts.PROBES,
    patience_s: float = PATIENCE_S,
) -> Findings:
    """Run every check, one after the other, and keep the receipt.

    Raises MachineError if TensorRT, a driver or a GPU is missing. Raises OutputError if the
    receipt cannot be written.
    """
    answer, reason = ask_process("here", LOOK_S)
    if answer is None:
        raise MachineError(f"TensorRT cannot be looked at: {reason}", "aapt doctor")
    if "error" in answer:
        raise MachineError(str(answer["error"]), str(answer["hint"]))
    here = Gpu(**answer)
    found = []
    for name in names:
        report(f"{name} on {here.gpu}, TensorRT {here.tensorrt}")
        began = time.monotonic()
        answer, reason = ask_process(name, patience_s)
        ok = answer is not None and answer.get("ok") is True
        if answer:
            reason = str(answer.get("found", answer.get("error", "")))
        found.append(Proof(name, ok, reason, round(time.monotonic() - began, 1)))
    with writing(receipts.receipt_file(here), "set XDG_CACHE_HOME to a folder of yours"):
        return Findings(here, found, receipts.save(here, found))


def ask_process(name: str, patience_s: float, *plan: str) -> tuple[dict[str, Any] | None, str]:
    """Return the answer of one process, or None and the reason.

    With a `plan` the process loads the lean runtime to run it.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", MODULE, name, *plan],
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


def _answer(name: str, *plan: str) -> None:
    """Answer in this process: one line of JSON on stdout."""
    try:
        if plan:
            LEAN.api()
        with needs_extra("export"):
            importlib.import_module("aapt_deploy.backends.trt.doctor.probes").main(name, *plan)
    except AaptError as error:
        print(json.dumps({"error": str(error), "hint": error.hint}), flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    _answer(*sys.argv[1:])
