"""A stream of the GPU with its captured graphs, and the small tensors uploaded together.

On a CPU every call runs at once.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from aapt_deploy.bundle.signature import TensorSpec

WARM_UPS = 3  # runs before a capture: they compile, load and choose
ALIGNMENT = 64  # of a tensor inside a packed buffer, in numbers of four bytes


class Lane:
    """A stream of the device: captured calls, copies, waits."""

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        """Make a stream. A lane of lower `priority` has its thread blocks scheduled first."""
        self.device = device
        cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device, priority=priority) if cuda else None

    @contextlib.contextmanager
    def mine(self) -> Iterator[None]:
        """Queue calls inside the context on this lane, from any thread."""
        stream = torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext()
        with torch.no_grad(), stream:
            yield

    def prepare(self, call: Callable[[], object]) -> Callable[[], object]:
        """Return `call`, captured. It runs a few times first, so it must leave no trace."""
        self.settle()
        with self.mine():
            for _ in range(WARM_UPS):
                call()
        if self.stream is None:
            return call
        self.settle()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph, stream=self.stream):
            call()
        self.settle()
        return graph.replay

    def settle(self) -> None:
        """Wait for all streams of the device."""
        if self.stream:
            torch.cuda.synchronize(self.device)

    def wait(self) -> None:
        """Wait for this lane; other Python threads run meanwhile."""
        if self.stream:
            self.stream.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """Time one run of `call` on the device, after an untimed one."""
        assert self.stream
        with self.mine():
            call()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            call()
            last.record()
            last.synchronize()
        milliseconds: float = first.elapsed_time(last)
        return milliseconds / 1000


class Packed:
    """Small tensors that are uploaded together, from a pinned buffer by one copy."""

    def __init__(self, specs: list[TensorSpec], device: torch.device) -> None:
        sizes = [-(-spec.bytes // 4 // ALIGNMENT) * ALIGNMENT for spec in specs]
        self.host = torch.zeros(sum(sizes), pin_memory=device.type == "cuda")
        self.device = torch.zeros(sum(sizes), device=device)
        self.tensors, self.arrays, first = {}, {}, 0
        for spec, size in zip(specs, sizes, strict=True):
            kind, part = getattr(torch, spec.dtype), slice(first, first + spec.bytes // 4)
            self.tensors[spec.name] = self.device[part].view(kind).view(spec.shape)
            self.arrays[spec.name] = self.host[part].view(kind).view(spec.shape).numpy()
            first += size

    def upload(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self.arrays[name][...] = value
        self.device.copy_(self.host, non_blocking=True)
