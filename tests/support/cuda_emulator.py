"""A CUDA driver without a GPU, in the place of cuda.bindings.driver.

It is strict about its calls, and as late as a GPU may be.

Memory is NumPy arrays at made-up addresses, filled with 0xff (NaN in every float) until something
is written; whatever leaves its allocation fails the test. A stream is a list of things that have
not happened yet: they happen when, and only when, somebody asks whether that stream has come so
far. A wait that is missing, or is for another stream, therefore shows as old data. `eager` is the
other extreme: everything happens at once.

Every call is checked against the signature in the real bindings' docstring, and noted in `journal`:
addresses as m3+256 (device), h1 (pinned).
"""

import ctypes
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cuda.bindings import driver as real

Results = real.CUresult
NUMBERS = {"int", "size_t", "unsigned int", "unsigned char", "unsigned long long"}
FIRST_ADDRESS, PAGE = 0x7F00_0000_0000, 1 << 12


def check(name: str, arguments: tuple[Any, ...]) -> None:
    """Raise TypeError where the real binding would.

    It would for a wrong number of arguments, and for a number or an enum that is none.
    """
    first = str(getattr(real, name).__doc__).strip().splitlines()[0]
    inside = re.fullmatch(rf"{name}\((.*)\)", first)
    assert inside, first
    wanted = [part.strip() for part in inside[1].split(",") if part.strip()]
    if len(wanted) != len(arguments):
        raise TypeError(f"{first} was given {len(arguments)} arguments")
    for part, value in zip(wanted, arguments, strict=True):
        kind = part.split(":")[1].strip() if ":" in part else part.rsplit(" ", 1)[0]
        if kind in NUMBERS and type(value) is not int:
            raise TypeError(f"{first}: {part} was given {value!r}")
        if ":" in part and not isinstance(value, getattr(real, kind)):
            raise TypeError(f"{first}: {part} was given {value!r}")


class Driver:
    """The module. `queue` lets fakes of TensorRT and of kernels put things on a stream."""

    def __init__(self, sm: int = 90, memory: int = 1 << 34, eager: bool = False) -> None:
        self.sm, self.free, self.eager = sm, memory, eager
        self.devices = 1
        self.journal: list[str] = []
        self.held: dict[int, np.ndarray] = {}  # base address -> bytes
        self.allocated: list[
            tuple[int, int]
        ] = []  # address and size of all allocations ever, for the journal's names
        self.pinned: dict[int, int] = {}  # host address -> bytes
        self.hosts: list[int] = []
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.capturing: dict[int, list[Callable[[], None]]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.events: dict[int, bool] = {}
        self.event_streams: dict[int, int] = {}
        self.answers: dict[str, Any] = {}  # function -> a failure to answer with
        self.next_handle, self.next_address = 1, FIRST_ADDRESS

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return getattr(real, name)  # enums and handle types
        act = getattr(self, f"_{name}")

        def call(*arguments: Any) -> tuple[Any, ...]:
            check(name, arguments)
            self.journal.append(f"{name}({', '.join(map(self.show, arguments))})")
            if name in self.answers:
                return (self.answers[name], None)
            answer = act(*arguments)
            return (
                answer
                if isinstance(answer, tuple)
                else (Results.CUDA_SUCCESS, *([] if answer is None else [answer]))
            )

        call.__name__ = name
        return call

    def show(self, value: Any) -> str:
        """An argument as the journal has it: m3+256, h1, an enum's name, #7 for a handle."""
        if hasattr(value, "name"):
            return str(value.name)
        number = int(value)
        for index, (base, size) in enumerate(self.allocated):
            if base <= number < base + size:
                return f"m{index}" + (f"+{number - base}" if number > base else "")
        for index, base in enumerate(self.hosts):
            if base <= number < base + self.pinned.get(base, 0):
                return f"h{index}"
        return "host" if number >= 1 << 40 else str(number) if type(value) is int else f"#{number}"

    # What emulated plans and kernels use

    def view(self, address: int, size: int) -> np.ndarray:
        """Bytes on the device. Fails the test when they are not all in one allocation."""
        base = max((base for base in self.held if base <= address), default=0)
        assert base and address + size <= base + self.held[base].nbytes, (
            f"{size} bytes at {address:#x} are outside every allocation"
        )
        return self.held[base][address - base : address - base + size]

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.view(address, size).view(dtype).reshape(shape)

    def queue(self, stream: int, action: Callable[[], None]) -> None:
        if stream in self.capturing:
            self.capturing[stream].append(action)
        elif self.eager:
            action()
        else:
            self.streams[stream].append(action)

    def _handle(self) -> int:
        self.next_handle += 1
        return self.next_handle

    # Device and memory

    def _cuInit(self, flags: int) -> None:
        assert flags == 0

    def _cuDeviceGetCount(self) -> int:
        return self.devices

    def _cuDeviceGet(self, ordinal: int) -> Any:
        return real.CUdevice(ordinal)

    def _cuDeviceGetName(self, length: int, device: Any) -> bytes:
        return b"Emulated H100\0\0"

    def _cuDeviceGetAttribute(self, attribute: Any, device: Any) -> int:
        return self.sm // 10 if attribute.name.endswith("MAJOR") else self.sm % 10

    def _cuDriverGetVersion(self) -> int:
        return 13000

    def _cuDevicePrimaryCtxRetain(self, device: Any) -> Any:
        return real.CUcontext(1)

    def _cuCtxSetCurrent(self, context: Any) -> None:
        assert int(context) == 1

    def _cuMemAlloc(self, size: int) -> Any:
        if size > self.free:
            return Results.CUDA_ERROR_OUT_OF_MEMORY, None
        self.free -= size
        address, self.next_address = (
            self.next_address,
            self.next_address + -(-size // PAGE) * PAGE + PAGE,
        )
        self.held[address] = np.full(size, 0xFF, np.uint8)
        self.allocated.append((address, size))
        return real.CUdeviceptr(address)

    def _cuMemFree(self, address: Any) -> None:
        del self.held[int(address)]

    def _cuMemGetInfo(self) -> tuple[Any, int, int]:
        return Results.CUDA_SUCCESS, self.free, self.free

    def _cuMemHostRegister(self, address: int, size: int, flags: int) -> None:
        assert address % PAGE == 0 and size > 0 and flags == 0
        self.pinned[address] = size
        self.hosts.append(address)

    def _cuMemHostUnregister(self, address: int) -> None:
        del self.pinned[address]

    # Streams

    def _cuStreamCreate(self, flags: int) -> Any:
        assert flags == real.CUstream_flags.CU_STREAM_NON_BLOCKING.value
        stream = real.CUstream(self._handle())
        self.streams[int(stream)] = []
        return stream

    def _cuStreamDestroy(self, stream: Any) -> None:
        assert not self.streams.pop(int(stream))

    def _cuEventCreate(self, flags: int) -> Any:
        assert flags == real.CUevent_flags.CU_EVENT_DISABLE_TIMING.value
        return real.CUevent(self._handle())

    def _cuEventDestroy(self, event: Any) -> None:
        self.events.pop(int(event), None)

    def _cuEventRecord(self, event: Any, stream: Any) -> None:
        self.events[int(event)], self.event_streams[int(event)] = False, int(stream)
        self.queue(int(stream), lambda: self.events.update({int(event): True}))

    def _cuEventQuery(self, event: Any) -> tuple[Any]:
        """One more thing happens on the event's stream, and on no other."""
        if self.events[int(event)]:
            return (Results.CUDA_SUCCESS,)
        self.streams[self.event_streams[int(event)]].pop(0)()
        return (Results.CUDA_ERROR_NOT_READY,)

    def _cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: Any) -> None:
        host = (ctypes.c_ubyte * size).from_address(source)
        now = (
            None if source in self.pinned else np.array(host, np.uint8)
        )  # pageable memory is read before the call returns
        self.queue(
            int(stream),
            lambda: np.copyto(
                self.view(target, size), np.frombuffer(host, np.uint8) if now is None else now
            ),
        )

    def _cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: Any) -> None:
        assert target in self.pinned, "pageable memory would make the copy wait"
        host = (ctypes.c_ubyte * size).from_address(target)
        self.queue(
            int(stream), lambda: np.copyto(np.frombuffer(host, np.uint8), self.view(source, size))
        )

    def _cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: Any) -> None:
        self.queue(int(stream), lambda: np.copyto(self.view(target, size), self.view(source, size)))

    def _cuMemsetD8Async(self, target: int, value: int, size: int, stream: Any) -> None:
        self.queue(int(stream), lambda: self.view(target, size).fill(value))

    # Graphs

    def _cuStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        assert not self.streams[int(stream)], "a capture begins while work is pending"
        self.capturing[int(stream)] = []

    def _cuStreamEndCapture(self, stream: Any) -> Any:
        graph = real.CUgraph(self._handle())
        self.graphs[int(graph)] = self.capturing.pop(int(stream))
        return graph

    def _cuGraphInstantiate(self, graph: Any, flags: int) -> Any:
        assert flags == 0
        ready = real.CUgraphExec(self._handle())
        self.graphs[int(ready)] = [*self.graphs[int(graph)]]
        return ready

    def _cuGraphDestroy(self, graph: Any) -> None:
        del self.graphs[int(graph)]

    def _cuGraphExecDestroy(self, ready: Any) -> None:
        del self.graphs[int(ready)]

    def _cuGraphLaunch(self, ready: Any, stream: Any) -> None:
        for action in self.graphs[int(ready)]:
            self.queue(int(stream), action)

    def _cuLaunchKernel(self, *arguments: Any) -> None:
        """Noted; kernels compute nothing here."""


# Plans

STORED = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": np.uint16,
    "FP8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
}


class Tensor(NamedTuple):
    """As api.Tensor."""

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]


Compute = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]


class Plan:
    """As api.Plan: computes by NumPy in, NumPy out, in the types that its tensors are stored in."""

    scratch_bytes = 0

    def __init__(self, driver: Driver, tensors: list[Tensor], compute: Compute) -> None:
        self.driver, self.tensors, self.compute = driver, tensors, compute
        self.contexts: list[tuple[bool, Path | None]] = []
        self.capturable = True

    def context(self, captured: bool = True, compiled: Path | None = None) -> "Context":
        self.contexts.append((captured, compiled))
        return Context(self)

    def keep_compiled(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"compiled")

    def layers(self) -> list[Any]:
        return []


class Context:
    """As api.Context: what it enqueues reads and writes the addresses bound at that moment."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.bound = plan, dict[str, int]()

    def bind(self, name: str, address: int) -> None:
        assert name in {tensor.name for tensor in self.plan.tensors}, name
        self.bound[name] = address

    def enqueue(self, stream: int) -> None:
        assert stream in self.plan.driver.streams, "the default stream, or none"
        where = dict(self.bound)
        missing = {tensor.name for tensor in self.plan.tensors} - where.keys()
        assert not missing, f"no address for {missing}"
        self.plan.driver.queue(stream, lambda: self._run(where))

    def capturable(self, stream: int) -> bool:
        return self.plan.capturable

    def _run(self, where: dict[str, int]) -> None:
        driver = self.plan.driver
        arrays = {
            tensor.name: driver.array(where[tensor.name], tensor.shape, STORED[tensor.dtype])
            for tensor in self.plan.tensors
        }
        given = {
            tensor.name: arrays[tensor.name] for tensor in self.plan.tensors if tensor.is_input
        }
        written = {
            tensor.name: arrays[tensor.name] for tensor in self.plan.tensors if not tensor.is_input
        }
        for name, array in written.items():  # TensorRT may write before it has read everything
            assert not any(np.shares_memory(array, other) for other in given.values()), (
                f"{name} is written over an input"
            )
        found = self.plan.compute({name: array.copy() for name, array in given.items()})
        for name, array in written.items():
            assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
            array[...] = found[name]

    def timed(self, stream: int, wait: Callable[[], None], runs: int) -> dict[str, list[float]]:
        for _ in range(runs):
            self.enqueue(stream)
            wait()
        return {"attention": [2.0] * runs, "product": [1.0] * runs}
