"""The CUDA driver as far as an engine needs it: one device, its memory, streams, pinned arrays and captured graphs. No torch.

    with_driver()           the device, with the driver of `pip install 'aapt_deploy[cuda]'`
    Device.memory(bytes)    an address on the device        Device.pinned(shape, dtype)   an array that the device reads and writes
    Device.stream()         a Stream: copies, waits, and `prepare`, which captures work once so that it can be replayed

Whatever a Device gave out it takes back in `close`, in reverse order; after `seal` it gives out nothing more, so a stream of days cannot grow. The
context itself stays until the process ends: kernels that were loaded into it are kept for the next bundle (kernels.load).
Pinned memory belongs to its array and is merely registered with the driver: an array that outlives the device is still safe to read.

`Stream.wait` asks the driver again and again instead of sleeping inside it: Ctrl-C is heard, and another thread can queue the next step meanwhile.

What it deliberately does not do: choose among several GPUs, pool memory, or compute. Nothing here was run on a GPU by us:
tests/backends/trt/test_engine.py
runs it over an emulated driver, tests/backends/trt/bindings checks every call against the signatures of the real bindings.
"""

import contextlib
import hashlib
import json
import math
import mmap
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aapt_deploy.errors import MachineError

POLL_S = 50e-6  # between two questions whether a stream is done
HINT = "aapt doctor tells what this machine lacks"


def driver_release() -> str:
    """Release of the NVIDIA kernel driver, such as "580.65.06"; "" where it does not tell."""
    try:
        found = re.search(
            r"\b\d{3,}(\.\d+)+\b", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        )
    except OSError:
        return ""
    return found[0] if found else ""


def with_driver() -> "Device":
    """The first GPU that CUDA_VISIBLE_DEVICES leaves. Raises MachineError without the bindings, a driver or a GPU."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MachineError(
            f"CUDA's Python bindings are not installed: {error}", "pip install 'aapt_deploy[cuda]'"
        ) from None
    try:
        return Device(driver)
    except RuntimeError as error:  # the library is found at the first call
        raise MachineError(
            f"no NVIDIA driver: {str(error).splitlines()[0]}", f"install the driver; {HINT}"
        ) from None


@dataclass(frozen=True)
class Gpu:
    """A GPU with the software on it: what proofs and plans hold for. All names, as the makers write them."""

    tensorrt: str  # "11.4.0.106"
    sm: int  # compute capability x 10
    cuda: str  # the newest that the driver supports: "13.0"
    driver: str  # release of the driver: "580.65.06"; "" where it does not tell
    gpu: str
    kernels: str  # hash of our kernels' source; "" for a plan without them

    @property
    def key(self) -> str:
        """The receipt's name: everything but the GPU's, which says nothing that SM does not."""
        kept = [self.tensorrt, str(self.sm), self.cuda, self.driver, self.kernels]
        return f"sm{self.sm}-{self.tensorrt}-{hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]}"


class Device:
    """One GPU and its primary context, the one that TensorRT and torch use too. `driver` is cuda.bindings.driver."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self.call(driver.cuInit, 0)
        if not self.call(driver.cuDeviceGetCount):
            raise MachineError(
                "the NVIDIA driver sees no GPU", "look at nvidia-smi and at CUDA_VISIBLE_DEVICES"
            )
        self._device = self.call(driver.cuDeviceGet, 0)
        self.name = self.call(driver.cuDeviceGetName, 128, self._device).rstrip(b"\0").decode()
        attribute = driver.CUdevice_attribute
        major = self.call(
            driver.cuDeviceGetAttribute,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            self._device,
        )
        minor = self.call(
            driver.cuDeviceGetAttribute,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            self._device,
        )
        self.sm = 10 * int(major) + int(minor)
        self._context = self.call(driver.cuDevicePrimaryCtxRetain, self._device)
        self._undo: list[Callable[[], object]] = []
        self._streams: list[Stream] = []
        self.sealed = self.closed = False
        self.use()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function` of the driver answers. Raises MachineError with the driver's own name of what went wrong."""
        status, *values = function(*arguments)
        self._expect(function, status)
        return values[0] if values else None

    def _expect(self, function: Callable[..., Any], status: Any) -> None:
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise MachineError(f"CUDA: {function.__name__} answers {status.name}", HINT)

    def use(self) -> None:
        """Make the context current in the calling thread."""
        self.call(self._driver.cuCtxSetCurrent, self._context)

    @property
    def cuda(self) -> str:
        """The newest CUDA that the driver supports: "13.0"."""
        version = int(self.call(self._driver.cuDriverGetVersion))
        return f"{version // 1000}.{version % 1000 // 10}"

    def gpu(self, tensorrt: str, kernels: str) -> Gpu:
        """This GPU and driver, with what the caller knows of TensorRT and our kernels' hash."""
        return Gpu(tensorrt, self.sm, self.cuda, driver_release(), self.name, kernels)

    @property
    def free_bytes(self) -> int:
        """Device memory that nobody uses at this moment."""
        return int(self._driver.cuMemGetInfo()[1])

    def memory(self, size: int) -> int:
        """Address of `size` bytes, not initialised. Raises MachineError when the device is full."""
        self._refuse_if_sealed(f"{size} bytes")
        status, address = self._driver.cuMemAlloc(size)
        if status == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            _, free, total = self._driver.cuMemGetInfo()
            raise MachineError(
                f"GPU {self.name} has no {size / 1e9:.2f} GB left ({free / 1e9:.2f} of {total / 1e9:.2f} GB are free)",
                "close other programs on the GPU, or take a smaller profile; aapt plan NAME tells what one needs",
            )
        self._expect(self._driver.cuMemAlloc, status)
        self._undo.append(lambda: self.call(self._driver.cuMemFree, address))
        return int(address)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Zeros that the device reads and writes directly."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        self._refuse_if_sealed(f"{size} bytes of pinned memory")
        array = np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)  # whole pages of its own
        self.call(self._driver.cuMemHostRegister, array.ctypes.data, size, 0)
        self._undo.append(lambda: self.call(self._driver.cuMemHostUnregister, array.ctypes.data))
        return array

    def stream(self) -> "Stream":
        """A stream that does not wait for the default one."""
        self._refuse_if_sealed("a stream")
        stream = Stream(self, self._driver)
        self._streams.append(stream)
        return stream

    def undo(self, action: Callable[[], object]) -> None:
        """Do `action` when the device closes."""
        self._undo.append(action)

    def seal(self) -> None:
        """Give out nothing more."""
        self.sealed = True

    def _refuse_if_sealed(self, what: str) -> None:
        assert not self.sealed, (
            f"{what} asked of a device that is sealed: everything must be made before the first step"
        )

    def close(self) -> None:
        """Wait for whoever works on a stream, then take everything back. A second call does nothing."""
        with contextlib.ExitStack() as held:
            for stream in self._streams:
                held.enter_context(stream.lock)
            if self.closed:
                return
            self.closed = True
            for action in (
                self.use,
                *(stream.wait for stream in self._streams),
                *reversed(self._undo),
            ):
                with contextlib.suppress(
                    MachineError
                ):  # a GPU that has failed refuses everything; why was told when it did
                    action()
            self._undo.clear()


class Stream:
    """Work in order. `with stream.mine():` around a call that must not mix with another thread's."""

    def __init__(self, device: Device, driver: Any) -> None:
        self._device, self._driver = device, driver
        self._stream = device.call(
            driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
        )
        device.undo(lambda: device.call(driver.cuStreamDestroy, self._stream))
        self._done = device.call(
            driver.cuEventCreate, driver.CUevent_flags.CU_EVENT_DISABLE_TIMING.value
        )
        device.undo(lambda: device.call(driver.cuEventDestroy, self._done))
        self.handle = int(self._stream)
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def mine(self) -> Iterator[None]:
        """Hold the stream and make its context current. Raises RuntimeError once the device is closed."""
        with self.lock:
            if self._device.closed:
                raise RuntimeError("these engines are closed")
            self._device.use()
            yield

    def upload(self, address: int, array: np.ndarray) -> None:
        """Host -> device. The array must stay as it is until `wait`."""
        assert array.flags.c_contiguous, f"{array.strides=}"
        self._device.call(
            self._driver.cuMemcpyHtoDAsync, address, array.ctypes.data, array.nbytes, self._stream
        )

    def download(self, array: np.ndarray, address: int) -> None:
        """Device -> host. The array holds the answer after `wait`."""
        assert array.flags.c_contiguous, f"{array.strides=}"
        self._device.call(
            self._driver.cuMemcpyDtoHAsync, array.ctypes.data, address, array.nbytes, self._stream
        )

    def copy(self, target: int, source: int, size: int) -> None:
        """Device -> device."""
        self._device.call(self._driver.cuMemcpyDtoDAsync, target, source, size, self._stream)

    def zero(self, address: int, size: int) -> None:
        self._device.call(self._driver.cuMemsetD8Async, address, 0, size, self._stream)

    def wait(self) -> None:
        """Until everything queued so far is done. Raises MachineError when any of it failed."""
        self._device.call(self._driver.cuEventRecord, self._done, self._stream)
        results = self._driver.CUresult
        while (answer := self._driver.cuEventQuery(self._done)[0]) == results.CUDA_ERROR_NOT_READY:
            time.sleep(POLL_S)
        if answer != results.CUDA_SUCCESS:
            raise MachineError(
                f"the GPU stopped with {answer.name}",
                "run again; if it stays, report it with what aapt doctor shows",
            )

    def prepare(self, work: Callable[[], None], captured: bool = True) -> Callable[[], None]:
        """`work`, which queues things on this stream, as something to be repeated: captured into a graph, or as it is.

        It runs once beforehand, because libraries allocate and load kernels in their first run, which a capture forbids. Raises MachineError when
        something in it cannot be captured.
        """
        work()
        self.wait()
        if not captured:
            return work
        driver, call = self._driver, self._device.call
        call(
            driver.cuStreamBeginCapture,
            self._stream,
            driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
        )
        try:
            work()
        except BaseException:
            driver.cuStreamEndCapture(
                self._stream
            )  # or nothing could be queued any more; its answer is that the capture failed
            raise
        graph = call(driver.cuStreamEndCapture, self._stream)
        ready = call(driver.cuGraphInstantiate, graph, 0)
        call(driver.cuGraphDestroy, graph)
        self._device.undo(lambda: call(driver.cuGraphExecDestroy, ready))
        return lambda: call(driver.cuGraphLaunch, ready, self._stream)
