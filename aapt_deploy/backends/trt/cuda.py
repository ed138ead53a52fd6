"""The part of the CUDA driver that an engine needs, without torch.

    with_driver()          the device, with the driver of `pip install 'aapt_deploy[cuda]'`
    Device.memory(bytes)   an address on the device
    Device.pinned(...)     an array that the device reads and writes
    Device.stream()        a Stream: copies, waits, and `prepare`, which captures work for replay

`Device.close` frees everything that a Device made, in reverse order. After `seal` it makes nothing
more, so a stream of days cannot grow. The context stays until the process ends, because kernels in
it are kept for the next bundle (kernels.load). Pinned memory belongs to its array and is only
registered with the driver, so an array that outlives the device is safe to read.

`Stream.wait` polls the driver instead of blocking in it. So Ctrl-C works, and another thread can
queue the next step meanwhile. This module does not choose among GPUs, pool memory or compute.
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

from aapt_deploy.backends.trt.remedies import SMALLER
from aapt_deploy.errors import MachineError

POLL_S = 50e-6  # between two questions whether a stream is done
HINT = "aapt doctor tells what this machine lacks"


def driver_release() -> str:
    """Return the release of the NVIDIA kernel driver, such as "580.65.06"; "" if unknown."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"\b\d{3,}(\.\d+)+\b", text)
    return found[0] if found else ""


def with_driver() -> "Device":
    """Return the first GPU in CUDA_VISIBLE_DEVICES.

    Raises MachineError without the bindings, a driver or a GPU.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        hint = "pip install 'aapt_deploy[cuda]'"
        raise MachineError(f"CUDA's Python bindings are not installed: {error}", hint) from None
    try:
        return Device(driver)
    except RuntimeError as error:  # the library is found at the first call
        reason = str(error).splitlines()[0]
        raise MachineError(f"no NVIDIA driver: {reason}", f"install the driver; {HINT}") from None


@dataclass(frozen=True)
class Gpu:
    """A GPU with the software on it: what a proof or a plan is valid for."""

    tensorrt: str  # "11.4.0.106"
    sm: int  # compute capability x 10
    cuda: str  # the newest that the driver supports: "13.0"
    driver: str  # release of the driver: "580.65.06"; "" where it does not tell
    gpu: str
    kernels: str  # hash of our kernels' source; "" for a plan without them

    @property
    def key(self) -> str:
        """Return the name of a receipt: everything but the GPU's name, which SM implies."""
        kept = [self.tensorrt, str(self.sm), self.cuda, self.driver, self.kernels]
        digest = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
        return f"sm{self.sm}-{self.tensorrt}-{digest[:16]}"


class Device:
    """One GPU and its primary context, shared with TensorRT and torch.

    `driver` is cuda.bindings.driver.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self.call(driver.cuInit, 0)
        if not self.call(driver.cuDeviceGetCount):
            hint = "look at nvidia-smi and at CUDA_VISIBLE_DEVICES"
            raise MachineError("the NVIDIA driver sees no GPU", hint)
        self._device = self.call(driver.cuDeviceGet, 0)
        self.name = self.call(driver.cuDeviceGetName, 128, self._device).rstrip(b"\0").decode()
        attribute = driver.CUdevice_attribute
        major = attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        minor = attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
        ask = driver.cuDeviceGetAttribute
        tens, ones = (int(self.call(ask, part, self._device)) for part in (major, minor))
        self.sm = 10 * tens + ones
        self._context = self.call(driver.cuDevicePrimaryCtxRetain, self._device)
        self._undo: list[Callable[[], object]] = []
        self._streams: list[Stream] = []
        self.sealed = self.closed = False
        self.use()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call `function` of the driver and return its value.

        Raises MachineError with the driver's own name of the failure.
        """
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
        """Return the newest CUDA that the driver supports: "13.0"."""
        version = int(self.call(self._driver.cuDriverGetVersion))
        return f"{version // 1000}.{version % 1000 // 10}"

    def gpu(self, tensorrt: str, kernels: str) -> Gpu:
        """Describe this GPU and driver, with TensorRT's version and our kernels' hash."""
        return Gpu(tensorrt, self.sm, self.cuda, driver_release(), self.name, kernels)

    @property
    def free_bytes(self) -> int:
        """Return the device memory that is free now."""
        return int(self._driver.cuMemGetInfo()[1])

    def memory(self, size: int) -> int:
        """Allocate `size` bytes, not initialised. Raises MachineError if the device is full."""
        self._refuse_if_sealed(f"{size} bytes")
        status, address = self._driver.cuMemAlloc(size)
        if status == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            _, free, total = self._driver.cuMemGetInfo()
            left = f"{free / 1e9:.2f} of {total / 1e9:.2f} GB are free"
            raise MachineError(f"GPU {self.name} has no {size / 1e9:.2f} GB left ({left})", SMALLER)
        self._expect(self._driver.cuMemAlloc, status)
        self._undo.append(lambda: self.call(self._driver.cuMemFree, address))
        return int(address)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return zeros that the device reads and writes directly."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        self._refuse_if_sealed(f"{size} bytes of pinned memory")
        array = np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)  # whole pages of its own
        self.call(self._driver.cuMemHostRegister, array.ctypes.data, size, 0)
        self._undo.append(lambda: self.call(self._driver.cuMemHostUnregister, array.ctypes.data))
        return array

    def stream(self) -> "Stream":
        """Make a stream that does not wait for the default one."""
        self._refuse_if_sealed("a stream")
        stream = Stream(self, self._driver)
        self._streams.append(stream)
        return stream

    def undo(self, action: Callable[[], object]) -> None:
        """Do `action` when the device closes."""
        self._undo.append(action)

    def seal(self) -> None:
        """Refuse every later allocation."""
        self.sealed = True

    def _refuse_if_sealed(self, what: str) -> None:
        assert not self.sealed, f"{what} asked of a sealed device, after the first step"

    def close(self) -> None:
        """Wait for every stream, then free everything. A second call does nothing."""
        with contextlib.ExitStack() as held:
            for stream in self._streams:
                held.enter_context(stream.lock)
            if self.closed:
                return
            self.closed = True
            waits = [stream.wait for stream in self._streams]
            for action in (self.use, *waits, *reversed(self._undo)):
                with contextlib.suppress(MachineError):  # of a GPU that has failed before
                    action()
            self._undo.clear()


class Stream:
    """Queue of work. `with stream.mine():` keeps other threads' calls out."""

    def __init__(self, device: Device, driver: Any) -> None:
        self._device, self._driver = device, driver
        flag = driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
        self._stream = device.call(driver.cuStreamCreate, flag)
        device.undo(lambda: device.call(driver.cuStreamDestroy, self._stream))
        flag = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING.value
        self._done = device.call(driver.cuEventCreate, flag)
        device.undo(lambda: device.call(driver.cuEventDestroy, self._done))
        self.handle = int(self._stream)
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def mine(self) -> Iterator[None]:
        """Lock the stream and make its context current. Raises RuntimeError once it is closed."""
        with self.lock:
            if self._device.closed:
                raise RuntimeError("these engines are closed")
            self._device.use()
            yield

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy host -> device. The array must stay as it is until `wait`."""
        assert array.flags.c_contiguous, f"{array.strides=}"
        host = array.ctypes.data
        self._queue(self._driver.cuMemcpyHtoDAsync, address, host, array.nbytes)

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy device -> host. The array is complete after `wait`."""
        assert array.flags.c_contiguous, f"{array.strides=}"
        host = array.ctypes.data
        self._queue(self._driver.cuMemcpyDtoHAsync, host, address, array.nbytes)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy device -> device."""
        self._queue(self._driver.cuMemcpyDtoDAsync, target, source, size)

    def zero(self, address: int, size: int) -> None:
        self._queue(self._driver.cuMemsetD8Async, address, 0, size)

    def _queue(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._device.call(function, *arguments, self._stream)

    def wait(self) -> None:
        """Wait for everything queued so far. Raises MachineError if any of it failed."""
        self._device.call(self._driver.cuEventRecord, self._done, self._stream)
        results = self._driver.CUresult
        while (answer := self._driver.cuEventQuery(self._done)[0]) == results.CUDA_ERROR_NOT_READY:
            time.sleep(POLL_S)
        if answer != results.CUDA_SUCCESS:
            hint = "run again; if it stays, report it with what aapt doctor shows"
            raise MachineError(f"the GPU stopped with {answer.name}", hint)

    def prepare(self, work: Callable[[], None], captured: bool = True) -> Callable[[], None]:
        """Return `work`, which queues on this stream, ready to be repeated.

        `captured` puts it into a graph. It runs once before, because libraries allocate and load
        kernels in their first run, which a capture forbids. Raises MachineError if it cannot be
        captured.
        """
        work()
        self.wait()
        if not captured:
            return work
        driver, call = self._driver, self._device.call
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        call(driver.cuStreamBeginCapture, self._stream, mode)
        try:
            work()
        except BaseException:
            driver.cuStreamEndCapture(self._stream)  # or nothing could be queued any more
            raise
        graph = call(driver.cuStreamEndCapture, self._stream)
        ready = call(driver.cuGraphInstantiate, graph, 0)
        call(driver.cuGraphDestroy, graph)
        self._device.undo(lambda: call(driver.cuGraphExecDestroy, ready))
        return lambda: call(driver.cuGraphLaunch, ready, self._stream)
