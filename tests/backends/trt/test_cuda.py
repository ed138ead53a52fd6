"""The part of the CUDA driver that an engine uses, over the emulated one."""

import dataclasses
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aapt_deploy.backends.trt import cuda
from aapt_deploy.backends.trt.cuda import Gpu
from aapt_deploy.backends.trt.remedies import SMALLER
from aapt_deploy.errors import MachineError
from tests.support.cuda_emulator import Driver

GPU = Gpu("11.4.0.106", 90, "13.0", "580.65.06", "A GPU", "k" * 64)


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def device(driver: Driver) -> cuda.Device:
    return cuda.Device(driver)


# --- what is here ---


@pytest.mark.parametrize(
    ("content", "release"),
    [
        (None, ""), ("no number\n", ""), ("version 58.65\n", ""),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\n"
         "GCC version: gcc 13.3.0\n", "580.65.06"),
        ("Kernel Module  1090.1\n", "1090.1"),
    ],
)  # fmt: skip
def test_a_drivers_release_is_read_from_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, release: str
) -> None:
    file = tmp_path / "version"
    monkeypatch.setattr(cuda, "Path", {"/proc/driver/nvidia/version": file}.__getitem__)
    if content is not None:
        file.write_text(content)
    assert cuda.driver_release() == release


def test_the_device_is_that_of_the_installed_bindings(
    monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    place = types.ModuleType("cuda.bindings")
    place.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", place)
    device = cuda.with_driver()
    assert device.name == "Emulated H100" and device.sm == 90 and device.cuda == "13.0"
    assert driver.journal[0] == "cuInit(0)"

    def missing(*_: object) -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1\nmore of it")

    place.driver = types.SimpleNamespace(cuInit=missing)  # type: ignore[attr-defined]
    with pytest.raises(
        MachineError, match=r"^no NVIDIA driver: Failed to dlopen libcuda.so.1$"
    ) as c:
        cuda.with_driver()
    assert c.value.hint == f"install the driver; {cuda.HINT}"


def test_without_a_gpu_or_with_a_driver_that_fails_the_fix_is_told(driver: Driver) -> None:
    driver.devices = 0
    with pytest.raises(MachineError, match="the NVIDIA driver sees no GPU") as caught:
        cuda.Device(driver)
    assert "CUDA_VISIBLE_DEVICES" in caught.value.hint
    driver.answers["cuInit"] = driver.CUresult.CUDA_ERROR_NO_DEVICE
    with pytest.raises(MachineError, match="CUDA: cuInit answers CUDA_ERROR_NO_DEVICE") as caught:
        cuda.Device(driver)
    assert caught.value.hint == cuda.HINT


@pytest.mark.parametrize(("sm", "version", "cuda_"), [(89, 12080, "12.8"), (120, 13010, "13.1")])
def test_a_gpu_is_described_with_its_software(
    monkeypatch: pytest.MonkeyPatch, sm: int, version: int, cuda_: str
) -> None:
    monkeypatch.setattr(cuda, "driver_release", lambda: "580.1")
    driver = Driver(sm=sm)
    driver._cuDriverGetVersion = lambda: version  # type: ignore[method-assign]
    device = cuda.Device(driver)
    assert device.gpu("11.4", "kkk") == Gpu("11.4", sm, cuda_, "580.1", "Emulated H100", "kkk")
    assert "cuCtxSetCurrent(#1)" in driver.journal
    driver.free = 12_345
    assert device.free_bytes == 12_345


def test_a_receipts_name_tells_everything_apart_but_the_gpus_name() -> None:
    others: list[dict[str, Any]] = [
        {"tensorrt": "11.4.0.107"}, {"sm": 89}, {"cuda": "13.1"}, {"driver": "590"},
        {"kernels": ""},
    ]  # fmt: skip
    keys = [dataclasses.replace(GPU, **other).key for other in others]
    assert len({GPU.key, *keys}) == 6
    assert dataclasses.replace(GPU, gpu="Another").key == GPU.key
    prefix, digest = GPU.key.rsplit("-", 1)
    assert prefix == "sm90-11.4.0.106" and len(digest) == 16 and int(digest, 16)


# --- memory ---


def test_memory_is_the_devices_until_it_closes(driver: Driver, device: cuda.Device) -> None:
    address = device.memory(1000)
    assert driver.held[address].nbytes == 1000 and isinstance(address, int)
    array = device.pinned((3, 5), np.float32)
    assert array.shape == (3, 5) and array.dtype == np.float32 and not array.any()
    assert driver.pinned == {array.ctypes.data: 60}
    array[1, 2] = 7
    device.close()
    assert not driver.held and not driver.pinned
    assert array[1, 2] == 7, "the array outlives the device"


def test_a_full_gpu_tells_what_is_left(driver: Driver, device: cuda.Device) -> None:
    driver.free = 2_500_000_000
    driver._cuMemGetInfo = lambda: (  # type: ignore[method-assign]
        driver.CUresult.CUDA_SUCCESS, driver.free, 8_000_000_000,
    )  # fmt: skip
    with pytest.raises(
        MachineError,
        match=r"GPU Emulated H100 has no 3\.00 GB left \(2\.50 of 8\.00 GB are free\)",
    ) as caught:
        device.memory(3_000_000_000)
    assert caught.value.hint == SMALLER
    driver.answers["cuMemAlloc"] = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(MachineError, match="CUDA: cuMemAlloc answers CUDA_ERROR_INVALID_VALUE"):
        device.memory(16)


def test_a_sealed_device_makes_nothing_more(device: cuda.Device) -> None:
    device.memory(16)
    device.seal()
    asks: list[tuple[Callable[[], object], str]] = [
        (lambda: device.memory(17), "17 bytes asked"),
        (lambda: device.pinned((3, 5), np.float32), "60 bytes of pinned memory asked"),
        (device.stream, "a stream asked"),
    ]
    for ask, words in asks:
        with pytest.raises(AssertionError, match=f"{words} of a sealed device"):
            ask()


# --- streams ---


def test_copies_go_where_they_are_told_and_happen_when_they_are_waited_for(
    driver: Driver, device: cuda.Device
) -> None:
    stream = device.stream()
    one, two = device.memory(24), device.memory(24)
    host, back = device.pinned((4,), np.int32), device.pinned((6,), np.int32)
    host[:] = [1, 2, 3, 4]
    stream.zero(one, 24)
    stream.upload(one + 4, host)
    stream.copy(two, one, 24)
    stream.download(back, two)
    assert not back.any(), "nothing has happened yet"
    stream.wait()
    assert back.tolist() == [0, 1, 2, 3, 4, 0]
    stream.copy(two + 8, one + 4, 8)
    stream.zero(two, 4)
    stream.download(back, two)
    stream.wait()
    assert back.tolist() == [0, 1, 1, 2, 4, 0]
    strided = host[::2]
    for call in (lambda: stream.upload(one, strided), lambda: stream.download(strided, one)):
        with pytest.raises(AssertionError, match=r"array\.strides=\(8,\)"):
            call()


def test_a_stream_waits_for_itself_alone(driver: Driver, device: cuda.Device) -> None:
    first, second = device.stream(), device.stream()
    assert first.handle != second.handle and {first.handle, second.handle} == {*driver.streams}
    address, back = device.memory(4), device.pinned((1,), np.int32)
    second.zero(address, 4)
    first.wait()
    assert len(driver.streams[second.handle]) == 1
    second.download(back, address)
    second.wait()
    assert back[0] == 0 and not driver.streams[second.handle]


def test_a_wait_asks_until_the_stream_is_done_and_sleeps_between(
    driver: Driver, device: cuda.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(cuda.time, "sleep", slept.append)
    stream, address = device.stream(), device.memory(4)
    for _ in range(3):
        stream.zero(address, 4)
    stream.wait()
    assert slept == [cuda.POLL_S] * 4  # three fills and the event
    driver.answers["cuEventQuery"] = driver.CUresult.CUDA_ERROR_LAUNCH_FAILED
    with pytest.raises(MachineError, match="the GPU stopped with CUDA_ERROR_LAUNCH_FAILED") as c:
        stream.wait()
    assert "aapt doctor" in c.value.hint


def test_work_runs_once_and_is_then_captured_for_replay(
    driver: Driver, device: cuda.Device
) -> None:
    stream, address, runs = device.stream(), device.memory(4), list[int]()
    back = device.pinned((1,), np.int32)

    def work() -> None:
        runs.append(len(driver.capturing))
        stream.zero(address, 4)
        stream.download(back, address)

    back[0] = 5
    replay = stream.prepare(work)
    assert runs == [0, 1] and back[0] == 0, "the first run was waited for; the second captured"
    begun = [call for call in driver.journal if call.startswith("cuStreamBeginCapture")]
    assert len(begun) == 1 and begun[0].endswith("CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)")
    assert len(driver.graphs) == 1, "only the ready graph is kept"
    for _ in range(2):
        back[0] = 5
        replay()
        assert back[0] == 5
        stream.wait()
        assert back[0] == 0
    assert len(runs) == 2
    device.close()
    assert not driver.graphs and not driver.streams


def test_work_that_is_not_captured_is_done_anew_each_time(
    driver: Driver, device: cuda.Device
) -> None:
    stream, runs = device.stream(), list[int]()
    work = lambda: runs.append(1)
    again = stream.prepare(work, captured=False)
    assert again is work and runs == [1]
    assert not any("Capture" in call for call in driver.journal)


def test_a_stream_belongs_to_one_thread_at_a_time(driver: Driver, device: cuda.Device) -> None:
    stream, order, entered = device.stream(), list[str](), threading.Event()

    def other() -> None:
        entered.set()
        with stream.mine():
            order.append("other")

    thread = threading.Thread(target=other)
    with stream.mine():
        thread.start()
        assert entered.wait(20)
        thread.join(0.05)
        order.append("first")
    thread.join(20)
    assert order == ["first", "other"]
    current = driver.journal.count("cuCtxSetCurrent(#1)")
    assert current == 3, "once when it was opened, once for each thread"


# --- the end ---


def test_closing_waits_then_frees_in_reverse_order_and_once(
    driver: Driver, device: cuda.Device
) -> None:
    address, stream, done = device.memory(4), device.stream(), list[str]()
    device.undo(lambda: done.append("first"))
    device.undo(lambda: done.append("second"))
    stream.zero(address, 4)
    driver.journal.clear()
    device.close()
    names = [call.split("(")[0] for call in driver.journal]
    assert names[:2] == ["cuCtxSetCurrent", "cuEventRecord"]
    assert names[-3:] == ["cuEventDestroy", "cuStreamDestroy", "cuMemFree"]
    assert done == ["second", "first"]
    driver.journal.clear()
    device.close()
    assert driver.journal == [] and done == ["second", "first"]
    with pytest.raises(RuntimeError, match="these engines are closed"), stream.mine():
        pass
