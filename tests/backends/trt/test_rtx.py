"""The backend `tensorrt-rtx` over the emulated device; nothing of it has run on a GPU.

What it compiles just in time is kept, graphs are captured only where it allows it, and plans are
checked before they are opened. The real compiler is in test_real_tensorrt.py.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aapt_deploy.backends.table import precision_of
from aapt_deploy.backends.trt import cuda, loading, opening
from aapt_deploy.backends.trt.flavour import PROPER, RTX
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import BundleError, MachineError
from aapt_deploy.measure import doctor
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.profiles import Profile
from tests.support.opening import open_engines
from tests.support.played_tensorrt import Machine, built, played
from tests.support.tiny import FEW_BLOCKS, frames_of
from tests.support.trt_plans import assert_same


@pytest.fixture
def here(
    bundle: Path, tiny: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    machine = Machine(bundle, tiny)
    machine.driver.sm, machine.version = 89, "1.7.1.116"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield from played(machine, monkeypatch, RTX)


def rtx(path: Path, change: Callable[[dict[str, Any]], None] = lambda entry: None) -> Bundle:
    """The bundle with an engine as `build-engine --sm 89,120` leaves it without a GPU."""

    def for_two(entry: dict[str, Any]) -> None:
        nowhere = {"tensorrt": "1.7.1.116", "sms": [89, 120], "cuda": "", "driver": "", "gpu": ""}
        for receipt in entry["receipts"].values():
            receipt.update(nowhere)
        entry["step_ms"] = None
        change(entry)

    return built(path, for_two, backend="tensorrt-rtx")


def test_an_engine_streams_as_the_cpu_s_does_and_keeps_what_was_compiled(
    copied: Path, here: Machine, tmp_path: Path
) -> None:
    opened, said = rtx(copied), list[str]()
    frames = []
    for start in range(2):
        engines = open_engines(opened, "tensorrt-rtx", None, said.append)
        assert (engines.backend, engines.precision) == ("tensorrt-rtx", "fp32")
        frames.append(frames_of(engines, opened, FEW_BLOCKS, 3))
        files = {name: plan.contexts[0][1] for name, plan in here.plans.items()}
        assert all(plan.contexts[0][0] for plan in here.plans.values()), "captured"
        engines.close()
        assert len({file for file in files.values() if file}) == len(signatures(opened.profile))
        for file in files.values():
            assert file and file.is_relative_to(tmp_path / "cache") and file.read_bytes()
            assert "-sm89-1.7.1.116" in file.name, start
    engines = open_engines(opened, "onnxruntime", "fp32")
    assert_same(frames[0], frames_of(engines, opened, FEW_BLOCKS, 3))
    assert len(said) == 2 and all("was built without its GPU and never compared" in s for s in said)
    assert "aapt build-engine" in said[0] and "--backend tensorrt-rtx --precision fp32" in said[0]


def test_graphs_are_left_to_tensorrt_where_it_does_not_allow_a_capture(
    copied: Path, here: Machine
) -> None:
    here.capturable = False
    opened = rtx(copied)
    engines = open_engines(opened, "tensorrt-rtx", None, lambda text: None)
    assert not here.driver.graphs
    for plan in here.plans.values():
        assert [captured for captured, _ in plan.contexts] == [True, False]
    engines.close()


def test_a_cache_that_cannot_be_written_does_not_stop_a_stream(
    copied: Path, here: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    open_engines(rtx(copied), "tensorrt-rtx", None, lambda text: None).close()


def test_a_plan_for_other_gpus_is_refused(copied: Path, here: Machine) -> None:
    opened = rtx(copied)
    here.driver.sm = 86
    with pytest.raises(MachineError, match=r"for SM 89, 120; this GPU is SM 86") as caught:
        open_engines(opened, "tensorrt-rtx", None, lambda text: None)
    assert "aapt build-engine" in caught.value.hint and not here.opened


def test_a_form_with_our_kernels_is_refused(copied: Path, here: Machine) -> None:
    opened = rtx(copied, lambda entry: entry.update(plugin="python"))
    with pytest.raises(BundleError, match="is not whole"):
        open_engines(opened, "tensorrt-rtx", None, lambda text: None)


def test_doctor_says_of_each_engine_whether_it_runs_here(copied: Path, here: Machine) -> None:
    opened = rtx(copied)
    checks = {check.name: check for check in doctor.engines(opened)}
    assert checks["onnxruntime-fp32"].ok and checks["onnxruntime-fp32"].found == "runs on the cpu"
    found = checks["tensorrt-rtx-fp32"]
    assert found.ok and "(SM 89); decoder.plan valid; encoder.plan valid" in found.found
    assert not here.opened, "nothing was opened"
    here.found = ("INVALID", ["INSUFFICIENT_GPU_MEMORY", "OLD_CUDA_DRIVER"])
    found = {check.name: check for check in doctor.engines(opened)}["tensorrt-rtx-fp32"]
    assert not found.ok and "invalid: INSUFFICIENT_GPU_MEMORY, OLD_CUDA_DRIVER" in found.found
    here.driver.sm = 75
    found = {check.name: check for check in doctor.engines(opened)}["tensorrt-rtx-fp32"]
    assert not found.ok and "this GPU is SM 75" in found.found and "build-engine" in found.fix


@pytest.mark.parametrize(
    ("sm", "said"),
    [
        (89, "SM 89, CUDA 13.0: fp8, bf16, fp32 by tensorrt or tensorrt-rtx"),
        (86, "SM 86, CUDA 13.0: bf16, fp32 by tensorrt or tensorrt-rtx"),
        (90, "SM 90, CUDA 13.0: fp8, bf16, fp32 by tensorrt;"),
        (75, "SM 75, CUDA 13.0: fp32 by tensorrt;"),
    ],
)
def test_doctor_names_the_gpu_and_what_it_computes_in(
    here: Machine, sm: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.driver.sm = sm
    monkeypatch.setattr(cuda, "with_driver", lambda: cuda.Device(here.driver))
    (check,) = [check for check in doctor.examine() if check.name == "nvidia gpu"]
    assert check.ok and said in check.found


def test_a_process_has_one_flavour(here: Machine) -> None:
    assert loading.api_of(RTX).FLAVOUR is RTX
    with pytest.raises(MachineError, match="this process uses TensorRT-RTX already") as caught:
        loading.api_of(PROPER)
    assert "TensorRT in a process of its own" in caught.value.hint


def test_an_engine_that_never_ran_is_behind_one_that_did(copied: Path, here: Machine) -> None:
    """Among precisions of one backend, the measured one is taken."""
    opened = rtx(copied)
    other = dict(opened.engines["tensorrt-rtx-fp32"], precision="bf16", step_ms=7.0)
    opened.engines["tensorrt-rtx-bf16"] = other
    profile_s_own = opened.profile.precision.weights
    assert precision_of(opened, "tensorrt-rtx", None) == (
        profile_s_own if profile_s_own in ("bf16", "fp32") else "bf16"
    )
    assert opening.runs_here(opened, "fp32", RTX)
