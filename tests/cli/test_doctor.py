"""`aapt doctor`: what it prints, its JSON, and the exit codes of both kinds of question."""

import dataclasses
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from aapt_deploy.backends.trt.doctor import ask
from aapt_deploy.cli import reports
from aapt_deploy.errors import MachineError
from aapt_deploy.measure import doctor
from aapt_deploy.measure.doctor import Check
from tests.support.commands import Ran

Aapt = Callable[..., Ran]


@pytest.mark.parametrize(
    ("ok", "needed", "code", "state"),
    [(True, True, 0, "ok"), (False, False, 0, "absent"), (False, True, 3, "MISSING")],
)
def test_only_what_is_needed_decides(
    aapt: Aapt, monkeypatch: pytest.MonkeyPatch, ok: bool, needed: bool, code: int, state: str
) -> None:
    check = Check("av", ok, needed, "15.0", "pip install av")
    monkeypatch.setattr(doctor, "examine", lambda: [check])
    ran = aapt("doctor", "--json")
    assert (ran.code, json.loads(ran.out)) == (code, [dataclasses.asdict(check)])
    assert state in ran.err and ("pip install av" in ran.err) is not ok
    assert aapt("doctor").out == ""


@dataclasses.dataclass
class Gpu:
    gpu: str = "H100"


@dataclasses.dataclass
class Proof:
    name: str = "plugin"


@pytest.mark.parametrize(("usable", "code"), [(True, 0), (False, 3)])
def test_tensorrt_is_usable_or_not(
    aapt: Aapt, monkeypatch: pytest.MonkeyPatch, usable: bool, code: int
) -> None:
    found = SimpleNamespace(here=Gpu(), proofs=[Proof()], usable=usable)
    reported: list[Any] = []
    monkeypatch.setattr(ask, "examine", lambda step: found)
    monkeypatch.setattr(reports, "tensorrt", reported.append)
    ran = aapt("doctor", "--tensorrt", "--json")
    record = {"verified_on": {"gpu": "H100"}, "checks": [{"name": "plugin"}]}
    assert (ran.code, json.loads(ran.out)) == (code, record)
    assert reported == [found]


def test_no_tensorrt_is_an_error_with_a_hint(aapt: Aapt, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(step: object) -> None:
        raise MachineError("TensorRT cannot be loaded", "pip install it")

    monkeypatch.setattr(ask, "examine", missing)
    ran = aapt("doctor", "--tensorrt", "--json")
    assert (ran.code, ran.out, ran.error) == (5, "", "TensorRT cannot be loaded")
