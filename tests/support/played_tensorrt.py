"""A GPU and a TensorRT that are played, and a bundle whose plans are a few bytes.

What they are asked to open is counted; the plans that they give back run over the emulated device.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from aapt_deploy.backends.trt import cuda, opening
from aapt_deploy.backends.trt.flavour import PROPER, Flavour
from aapt_deploy.backends.trt.plan_file import Receipt
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.bundle.scales import FILE, Scales, save
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.profiles import Profile
from tests.support import cuda_emulator
from tests.support.cuda_emulator import Driver
from tests.support.trt_plans import by_onnx, tensors_of, toy_scales

VERSION = "11.4.0.106"


class Machine:
    """The emulated GPU and TensorRT, and what was opened on them."""

    def __init__(self, bundle: Path, profile: Profile) -> None:
        self.driver, self.version, self.opened = Driver(), VERSION, list[str]()
        self.bundle, self.profile = bundle, profile
        self.plans: dict[str, cuda_emulator.Plan] = {}
        self.capturable = True
        self.found: tuple[str, list[str]] = ("VALID", [])

    def open_plan(self, file: Path) -> cuda_emulator.Plan:
        self.opened.append(file.stem)
        plan = cuda_emulator.Plan(
            self.driver,
            tensors_of(signatures(self.profile)[file.stem]),
            by_onnx(self.bundle / f"{file.stem}.onnx"),
        )
        plan.capturable = self.capturable
        self.plans[file.stem] = plan
        return plan

    def validity(self, file: Path) -> tuple[str, list[str]]:
        return self.found


def played(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, flavour: Flavour = PROPER
) -> Iterator[Machine]:
    """Put `machine` in the place of TensorRT and of the driver; nothing may be left on it."""
    module: Any = ModuleType("aapt_deploy.backends.trt.api")
    module.version, module.open_plan = lambda: machine.version, machine.open_plan
    monkeypatch.setitem(sys.modules, "aapt_deploy.backends.trt.api", module)
    module.FLAVOUR, module.validity = flavour, machine.validity
    monkeypatch.setattr(opening, "with_driver", lambda: cuda.Device(machine.driver))
    yield machine
    assert not (
        machine.driver.held
        or machine.driver.pinned
        or machine.driver.streams
        or machine.driver.graphs
    ), "something was left behind"


def receipt(bundle: Bundle, graph: str) -> Receipt:
    return Receipt(
        VERSION,
        (90,),
        "",
        bundle.manifest["files"][f"{graph}.onnx"]["sha256"],
        "13.0",
        "580.65",
        "NVIDIA H100",
    )


def built(
    path: Path,
    change: Callable[[dict[str, Any]], None] = lambda entry: None,
    scales: bool = False,
    backend: str = "tensorrt",
) -> Bundle:
    """The bundle with a TensorRT engine whose plans are a few bytes."""
    opened = Bundle.open(path)
    with opened.add_engine(f"{backend}-fp32") as stage:
        names = list(signatures(opened.profile))
        for name in names:
            (stage.path / f"{name}.plan").write_bytes(b"plan of " + name.encode())
        stage.entry |= {
            "backend": backend, "precision": "fp32", "threads": 1, "spinning": False,
            "step_ms": 1.0, "plugin": "native",
            "graphs": {name: f"{stage.relative}/{name}.plan" for name in names},
            "receipts": {name: receipt(opened, name).to_dict() for name in names},
        }  # fmt: skip
        if scales:
            save(Scales({}, toy_scales(opened.profile)), stage.path / FILE)
            stage.entry["scales"] = f"{stage.relative}/{FILE}"
        change(stage.entry)
    return Bundle.open(path)
