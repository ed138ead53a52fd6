"""aapt doctor --tensorrt runs every check in a process of its own.

So a crash, a hang or nonsense is a failed check, and the next one runs.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from aapt_deploy.backends.trt.cuda import Gpu
from aapt_deploy.backends.trt.doctor import ask, receipts
from aapt_deploy.errors import BundleError, MachineError, OutputError
from tests.support.opening import silent

HERE = {
    "tensorrt": "11.4.0.106",
    "sm": 90,
    "cuda": "13.0",
    "driver": "580.65.06",
    "gpu": "Stand-in H100",
    "kernels": "k" * 64,
}
STAND_IN = f"""
import json, os, signal, sys, time
name = sys.argv[1]
here = {HERE!r}
if name == "here":
    print("noise of a library")
    print(json.dumps(here))
elif name == "crash":
    print("TensorRT: about to die", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGSEGV)
elif name == "hang":
    time.sleep(60)
elif name == "silence":
    pass
elif name == "nonsense":
    print("no json")
    print("Traceback ...\\nValueError: of the test", file=sys.stderr)
    sys.exit(1)
elif name == "list":
    print("[1]")
elif name == "word":
    print(json.dumps({{"ok": "yes", "found": "a word for a truth"}}))
elif name == "broken":
    print(json.dumps({{"error": "no package 'onnx'", "hint": "install it"}}))
elif name == "wordless":
    print(json.dumps({{"ok": False}}))
elif name == "no":
    print(json.dumps({{"ok": False, "found": "differs by 0.5"}}))
else:
    print(json.dumps({{"ok": True, "found": name + " works"}}))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that answers in the place of probes.py."""
    file = tmp_path / "stand_in_probes.py"
    file.write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ask, "MODULE", "stand_in_probes")
    return file


def test_whatever_happens_in_a_question_is_its_answer(stand_in: Path) -> None:
    names = (
        "crash", "hang", "silence", "nonsense", "list", "word", "broken", "wordless", "no", "yes",
    )  # fmt: skip
    said: list[str] = []
    findings = ask.examine(said.append, names, patience_s=2.0)
    assert [(proof.name, proof.ok, proof.found) for proof in findings.proofs] == [
        ("crash", False, "crashed with SIGSEGV: TensorRT: about to die"),
        ("hang", False, "no answer within 2 s"),
        ("silence", False, "ended with code 0: it said nothing"),
        ("nonsense", False, "ended with code 1: ValueError: of the test"),
        ("list", False, "ended with code 0: it said nothing"),
        ("word", False, "a word for a truth"),
        ("broken", False, "no package 'onnx'"),
        ("wordless", False, ""),
        ("no", False, "differs by 0.5"),
        ("yes", True, "yes works"),
    ]
    assert said == [f"{name} on Stand-in H100, TensorRT 11.4.0.106" for name in names]
    assert 2 <= findings.proofs[1].seconds < 30
    assert all(round(proof.seconds, 1) == proof.seconds for proof in findings.proofs)
    assert findings.receipt == receipts.receipt_file(findings.here)
    assert findings.here == Gpu(**HERE) and receipts.load(findings.here) == {
        proof.name: proof for proof in findings.proofs
    }  # type: ignore[arg-type]
    assert not findings.usable and findings.choices[0].form == receipts.NATIVE


def test_the_command_shows_a_table_keeps_a_receipt_and_gives_json(
    stand_in: Path, aapt: Any
) -> None:
    ran = aapt("doctor", "--tensorrt", "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["verified_on"] == HERE and [check["name"] for check in told["checks"]] == list(
        receipts.PROBES
    )
    assert "Stand-in H100 (SM 90), TensorRT 11.4.0.106, CUDA 13.0, driver 580.65.06" in ran.err
    assert (
        "attention in form python for an fp8 bundle: proved here" in ran.err
        and "receipt: " in ran.err
    )
    assert receipts.load(Gpu(**HERE)) is not None  # type: ignore[arg-type]


def test_where_no_plan_can_run_the_verdict_is_bad(stand_in: Path, aapt: Any) -> None:
    stand_in.write_text(STAND_IN.replace('name == "no"', 'name == "native attention"'))
    ran = aapt("doctor", "--tensorrt")
    assert ran.code == 3 and "NO" in ran.err


def test_without_tensorrt_two_lines_and_exit_5(aapt: Any) -> None:
    """No stand-in: the real module, on a machine without TensorRT."""
    if "tensorrt" in sys.modules:
        pytest.skip("TensorRT is installed here")
    ran = aapt("doctor", "--tensorrt")
    assert ran.code == 5 and ran.out == ""
    assert "cannot be loaded" in ran.error and "pip install 'aapt_deploy[tensorrt]'" in ran.err


def test_a_machine_that_cannot_be_looked_at_is_told(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in.write_text('print(\'{"error": "no NVIDIA driver", "hint": "install the driver"}\')')
    with pytest.raises(MachineError, match="no NVIDIA driver") as caught:
        ask.examine(silent)
    assert caught.value.hint == "install the driver"
    stand_in.write_text("import os; os.abort()")
    with pytest.raises(
        MachineError, match="TensorRT cannot be looked at: crashed with SIGABRT"
    ) as c:
        ask.examine(silent)
    assert c.value.hint == "aapt doctor"
    stand_in.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(ask, "LOOK_S", 0.6)
    with pytest.raises(MachineError, match="no answer within 1 s"):
        ask.examine(silent)


def test_a_receipt_that_cannot_be_written_is_told(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    where = receipts.receipt_file(Gpu(**HERE))  # type: ignore[arg-type]
    with pytest.raises(OutputError, match=f"^{where} cannot be written: Not a directory") as caught:
        ask.examine(silent, ("yes",))
    assert "XDG_CACHE_HOME" in caught.value.hint


# --- the answering process ---


class Probes:
    """In the place of probes.py: cannot answer."""

    def __init__(self, problem: Exception) -> None:
        self.problem = problem

    def main(self, name: str) -> None:
        raise self.problem


@pytest.mark.parametrize(
    ("problem", "told", "code"),
    [
        (BundleError("no graph", "make one"), {"error": "no graph", "hint": "make one"}, 4),
        (ModuleNotFoundError("No module named 'onnx'", name="onnx"),
         {"error": "package 'onnx' is not installed", "hint": "pip install 'aapt_deploy[export]'"},
         5),
    ],
)  # fmt: skip
def test_a_question_that_cannot_be_asked_is_answered_with_the_error(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    problem: Exception,
    told: dict[str, str],
    code: int,
) -> None:
    name = "aapt_deploy.backends.trt.doctor.probes"
    monkeypatch.setitem(sys.modules, name, Probes(problem))  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as ended:
        ask._answer("anything")
    assert ended.value.code == code and json.loads(capsys.readouterr().out) == told
