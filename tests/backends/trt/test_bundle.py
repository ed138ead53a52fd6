"""Opening a TensorRT engine from a bundle.

What does not belong on this machine is refused before one byte of a plan is deserialised.
TensorRT's module is a fake that counts what it is asked to open; the plans that it gives back run
over the emulated device.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aapt_deploy.backends.trt import cuda, opening
from aapt_deploy.backends.trt import lean as lean_module
from aapt_deploy.backends.trt.flavour import LEAN, PROPER, Flavour
from aapt_deploy.backends.trt.plan_file import graph_sha256
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import AaptError, BundleError, InputError, MachineError
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.profiles import Profile
from tests.support import cuda_emulator
from tests.support.cuda_emulator import Driver
from tests.support.opening import open_engines
from tests.support.played_tensorrt import VERSION, Machine, built, played, receipt
from tests.support.trt_plans import toy_scales


@pytest.fixture
def here(bundle: Path, tiny: Profile, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield from played(Machine(bundle, tiny), monkeypatch)


def test_every_plan_that_belongs_here_is_opened_once(copied: Path, here: Machine) -> None:
    opened = built(copied)
    engines = open_engines(opened, "tensorrt")
    assert (engines.backend, engines.precision) == ("tensorrt", "fp32")
    engines.close()
    assert sorted(here.opened) == sorted(signatures(opened.profile))


FOREIGN: dict[str, tuple[dict[str, Any], type[AaptError], str]] = {
    "a GPU of another kind": (
        {"sms": [89], "gpu": "NVIDIA L40S"},
        MachineError,
        r"SM 89 \(NVIDIA L40S\); this GPU is SM 90",
    ),
    "another TensorRT": (
        {"tensorrt": "10.16.1.11"},
        MachineError,
        "TensorRT 10.16.1.11; here is 11.4.0.106",
    ),
    "other kernels": ({"kernels": "b" * 64}, BundleError, "kernels bbbbbbbbbbbb"),
    "a stale graph": ({"graph_sha256": "d" * 64}, BundleError, "another graph"),
    "half a receipt": ({"sms": ["90"]}, BundleError, "no whole receipt"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_or_stale_plan_is_refused_before_anything_is_deserialised(
    copied: Path, here: Machine, case: str
) -> None:
    """Whichever plan it is: the first of the bundle, or the last."""
    change, kind, reason = FOREIGN[case]
    for graph in ("decoder", "prompt"):
        opened = built(copied, lambda entry, graph=graph: entry["receipts"][graph].update(change))
        with pytest.raises(kind, match=reason) as caught:
            open_engines(opened, "tensorrt")
        assert "aapt build-engine" in caught.value.hint
        assert here.opened == []


@pytest.mark.parametrize(
    ("whole", "lean", "taken"),
    [
        (VERSION, None, PROPER), (VERSION, VERSION, PROPER), (None, VERSION, LEAN),
        ("11.5.0.1", VERSION, LEAN), ("10.16.1.11", VERSION, LEAN),
    ],
)  # fmt: skip
def test_a_portable_engine_runs_with_tensorrt_or_its_lean_runtime(
    copied: Path, here: Machine, monkeypatch: pytest.MonkeyPatch,
    whole: str | None, lean: str | None, taken: Flavour,
) -> None:  # fmt: skip
    there = {PROPER: whole, LEAN: lean}
    monkeypatch.setattr(lean_module, "installed", lambda flavour: there[flavour])
    monkeypatch.setattr(sys.modules["aapt_deploy.backends.trt.api"], "FLAVOUR", taken)
    engines = open_engines(built(copied, lambda entry: entry.update(portable=True)), "tensorrt")
    engines.close()
    assert engines.backend == "tensorrt" and len(here.opened) == 4


def test_only_portable_plans_run_with_the_lean_runtime(
    copied: Path, here: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["aapt_deploy.backends.trt.api"], "FLAVOUR", LEAN)
    with pytest.raises(MachineError, match="uses TensorRT's lean runtime already"):
        open_engines(built(copied), "tensorrt")
    assert here.opened == []


@pytest.mark.parametrize("there", ["11.5.0.1", "11.3.0.1"])
def test_another_release_cannot_run_a_portable_plan_without_code_in_it(
    copied: Path, here: Machine, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    monkeypatch.setattr(lean_module, "installed", lambda flavour: there)
    opened = built(copied, lambda entry: entry.update(portable=True))
    wanted = f"with TensorRT {VERSION}; .* here is TensorRT {there} and TensorRT's lean"
    with pytest.raises(MachineError, match=wanted) as caught:
        open_engines(opened, "tensorrt")
    assert lean_module.pinned(LEAN, VERSION) in caught.value.hint and here.opened == []


def test_without_either_runtime_both_are_named(
    copied: Path, here: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lean_module, "installed", lambda flavour: None)
    opened = built(copied, lambda entry: entry.update(portable=True))
    with pytest.raises(MachineError, match="here is neither") as caught:
        open_engines(opened, "tensorrt")
    hint = caught.value.hint
    assert f"aapt_deploy[tensorrt-lean]' tensorrt-lean-cu13-libs=={VERSION}" in hint
    assert f"aapt_deploy[tensorrt]' tensorrt=={VERSION}" in hint
    assert here.opened == [] and not here.driver.journal


def test_a_second_bundle_opens_in_the_same_process(copied: Path, here: Machine) -> None:
    """The context outlives the first: compiled kernels are kept in it."""
    opened = built(copied)
    for _ in range(2):
        engines = open_engines(opened, "tensorrt")
        engines["decoder"].reset()
        engines.close()
    assert not [
        call
        for call in here.driver.journal
        if "Ctx" in call and "Retain" not in call and "SetCurrent" not in call
    ]


def test_this_machine_s_own_versions_count(copied: Path, here: Machine) -> None:
    opened = built(copied)
    here.driver.sm = 100
    with pytest.raises(MachineError, match="this GPU is SM 100"):
        open_engines(opened, "tensorrt")
    here.driver.sm, here.version = 90, "11.4.0.107"
    with pytest.raises(MachineError, match=r"here is 11\.4\.0\.107"):
        open_engines(opened, "tensorrt")
    assert here.opened == []


def test_a_plan_whose_bytes_were_changed_is_refused(copied: Path, here: Machine) -> None:
    opened = built(copied)
    (copied / opened.engines["tensorrt-fp32"]["graphs"]["decoder"]).write_bytes(b"plan of DECODER")
    with pytest.raises(BundleError, match=r"decoder\.plan does not match the manifest"):
        open_engines(opened, "tensorrt")
    assert here.opened == []


@pytest.mark.parametrize(
    "change",
    [
        {"graphs": None}, {"graphs": {}}, {"receipts": {"encoder": {}}}, {"plugin": "magic"},
        {"plugin": None}, {"scales": 3}, {"cuda_graph": "yes"}, {"portable": "yes"},
        {"graphs": dict.fromkeys(("encoder", "prompt", "generator", "decoder"), 7)},
    ],
)  # fmt: skip
def test_an_entry_that_is_not_whole_is_refused(
    copied: Path, here: Machine, change: dict[str, Any]
) -> None:
    opened = built(copied, lambda entry: entry.update(change))
    with pytest.raises(BundleError, match="not whole") as caught:
        open_engines(opened, "tensorrt")
    assert caught.value.hint and here.opened == [] and not here.driver.journal


def test_a_plan_of_another_profile_is_refused(
    copied: Path, here: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = built(copied)
    real = here.open_plan

    def other(file: Path) -> cuda_emulator.Plan:
        plan = real(file)
        if file.stem == "generator":
            for index, tensor in enumerate(plan.tensors):
                if tensor.name == "k_cache.01":
                    plan.tensors[index] = tensor._replace(shape=(1, 7, 2, 16))
                if tensor.name == "time":
                    plan.tensors[index] = tensor._replace(dtype="INT32")
                if tensor.name == "clean":
                    plan.tensors[index] = tensor._replace(name="dirty")
        return plan

    sys.modules["aapt_deploy.backends.trt.api"].open_plan = other  # type: ignore[attr-defined]
    with pytest.raises(
        BundleError,
        match=r"k_cache\.01 is FLOAT \[1, 7, 2, 16\], not .*no clean; "
        r"time is INT32 .*unknown dirty",
    ):
        open_engines(opened, "tensorrt")


def test_without_room_on_the_gpu_the_profile_s_need_is_named(copied: Path, here: Machine) -> None:
    opened = built(copied)
    here.driver.free = 40_000
    with pytest.raises(MachineError, match=r"Emulated H100 has no .* GB left") as caught:
        open_engines(opened, "tensorrt")
    assert "aapt plan" in caught.value.hint


def test_scales_are_read_and_checked(copied: Path, tiny: Profile) -> None:
    opened = built(copied, scales=True)
    file = opened.engines["tensorrt-fp32"]["scales"]
    for found, wanted in zip(opening._scales(opened, file), toy_scales(tiny), strict=True):
        assert all(
            np.array_equal(array, getattr(wanted, name)) for name, array in vars(found).items()
        )
    (copied / file).write_bytes(b"no tensors")
    with pytest.raises(BundleError, match="does not match"):
        opening._scales(Bundle.open(copied), file)
    loose = Bundle.open(copied)
    loose._seen.add(file)  # as if it had been sealed like that
    with pytest.raises(InputError, match="cannot be read"):
        opening._scales(loose, file)


def test_a_graph_s_hash_is_that_of_its_weights_too() -> None:
    files = {
        "a.onnx": {"sha256": "1" * 64},
        "b.onnx": {"sha256": "1" * 64},
        "b.onnx.data": {"sha256": "2" * 64},
    }
    alone, both = graph_sha256(files, "a"), graph_sha256(files, "b")
    assert (
        alone == "1" * 64 != both
        and graph_sha256(files | {"b.onnx.data": {"sha256": "3" * 64}}, "b") != both
    )
    assert graph_sha256(files, "c") == ""


# --- the device ---


def test_without_bindings_driver_or_gpu_the_fix_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings", None)
        with pytest.raises(MachineError, match="bindings are not installed") as caught:
            cuda.with_driver()
        assert caught.value.hint == "pip install 'aapt_deploy[cuda]'"
    driver = Driver()
    driver.devices = 0
    with pytest.raises(MachineError, match="sees no GPU"):
        cuda.Device(driver)


def test_a_gpu_that_fails_is_told_and_can_still_be_closed() -> None:
    driver = Driver()
    device = cuda.Device(driver)
    stream = device.stream()
    device.memory(16)
    driver.answers["cuEventQuery"] = driver.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(MachineError, match="stopped with CUDA_ERROR_ILLEGAL_ADDRESS"):
        stream.wait()
    for name in ("cuMemFree", "cuStreamDestroy"):
        driver.answers[name] = driver.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    device.close()
    assert device.closed


def test_work_that_cannot_be_captured_leaves_the_stream_usable() -> None:
    driver = Driver()
    device = cuda.Device(driver)
    stream, runs = device.stream(), list[int]()

    def work() -> None:
        runs.append(len(runs))
        if len(runs) == 2:
            raise MachineError("not while capturing")

    with pytest.raises(MachineError, match="not while capturing"):
        stream.prepare(work)
    assert not driver.capturing
    stream.wait()
    device.close()


def test_the_emulated_driver_is_as_strict_as_the_real_one() -> None:
    driver = Driver()
    for name, arguments in (
        ("cuMemAlloc", ()),
        ("cuMemAlloc", ("many",)),
        ("cuStreamBeginCapture", (driver.CUstream(1), 1)),
        ("cuInit", (0, 0)),
    ):
        with pytest.raises(TypeError):
            getattr(driver, name)(*arguments)
    with pytest.raises(AttributeError):
        driver.cuMemAllocate(3)


# --- the commands ---


def test_profile_tells_layers_and_stages_and_the_step_is_not_their_sum(
    copied: Path, here: Machine, aapt: Any
) -> None:
    built(copied)
    ran = aapt("profile", copied, "--backend", "tensorrt", "--blocks", 10, "--json")
    record = json.loads(ran.out)
    assert ran.code in (0, 3), ran.err
    assert record["backend"] == "tensorrt" and record["layers"]["generator"][0] == {
        "name": "attention", "kind": "", "tactic": "", "ms": 2.0,
        "share": pytest.approx(2 / 3, abs=1e-3),
    }  # fmt: skip
    assert set(record["layers"]) == {"generator", "decoder"} and "layers of decoder" in ran.err
    assert (
        record["steady"]["encode"]["count"] == 18 and record["steady"]["generator"]["count"] == 10
    )
    assert record["steady"]["hand-off"]["p50_ms"] < record["steady"]["step"]["p50_ms"]


def test_a_refusal_reaches_the_user_as_two_lines(copied: Path, here: Machine, aapt: Any) -> None:
    built(
        copied,
        lambda entry: entry["receipts"]["generator"].update(
            dataclasses.asdict(receipt(Bundle.open(copied), "generator")) | {"sms": [80]}
        ),
    )
    ran = aapt("stream", copied, "-o", "-", "--backend", "tensorrt")
    assert ran.code == 5 and "SM 80" in ran.error
