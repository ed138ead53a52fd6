"""`aapt doctor --tensorrt`: check what TensorRT does on this machine and keep a receipt.

Every check of probes.py runs in a process of its own, `python -m ... .doctor.ask NAME`. So a
crash or a hang of TensorRT is a failed check, and the next one runs. Answers are
valid for one GPU architecture, TensorRT, CUDA and driver (receipts.py). The builder reads the
receipt.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aapt_deploy.backends.trt.cuda import Gpu
from aapt_deploy.backends.trt.doctor import receipts
from aapt_deploy.backends.trt.doctor.process import ask_process
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
    answer, reason = ask_process(MODULE, ["here"], LOOK_S)
    if answer is None:
        raise MachineError(f"TensorRT cannot be looked at: {reason}", "aapt doctor")
    if "error" in answer:
        raise MachineError(str(answer["error"]), str(answer["hint"]))
    here = Gpu(**answer)
    found = []
    for name in names:
        report(f"{name} on {here.gpu}, TensorRT {here.tensorrt}")
        began = time.monotonic()
        answer, reason = ask_process(MODULE, [name], patience_s)
        ok = answer is not None and answer.get("ok") is True
        if answer:
            reason = str(answer.get("found", answer.get("error", "")))
        found.append(Proof(name, ok, reason, round(time.monotonic() - began, 1)))
    with writing(receipts.receipt_file(here), "set XDG_CACHE_HOME to a folder of yours"):
        return Findings(here, found, receipts.save(here, found))


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
