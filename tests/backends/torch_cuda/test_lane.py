"""Lanes and packed uploads: what is queued where and in which order, on a GPU that is played."""

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from aapt_deploy.backends.torch_cuda.lane import ALIGNMENT, WARM_UPS, Lane, Packed
from aapt_deploy.bundle.signature import TensorSpec

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


class Played:
    """The parts of torch.cuda that a lane uses. They write down what happens."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.clock_ms, self.timed = 0.0, 0
        self.streams: list[str] = []
        played = self

        class Stream:
            def __init__(self, device: torch.device, priority: int) -> None:
                assert device == GPU
                self.name = f"stream of priority {priority}"

            def synchronize(self) -> None:
                played.log.append(f"wait for {self.name}")

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing
                self.at_ms: float | None = None

            def record(self) -> None:
                assert played.streams, "recorded on another stream"
                self.at_ms = played.clock_ms
                played.log.append("event")

            def synchronize(self) -> None:
                played.log.append("wait for event")

            def elapsed_time(self, end: "Event") -> float:
                assert self.at_ms is not None and end.at_ms is not None
                return end.at_ms - self.at_ms

        class CUDAGraph:
            def replay(self) -> None:
                played.log.append("replay")

        @contextlib.contextmanager
        def stream(entered: Stream) -> Iterator[None]:
            played.streams.append(entered.name)
            yield
            played.streams.pop()

        @contextlib.contextmanager
        def graph(captured: CUDAGraph, stream: Stream) -> Iterator[None]:
            assert isinstance(captured, CUDAGraph) and not played.streams
            played.log.append(f"capture on {stream.name}")
            yield
            played.log.append("captured")

        def synchronize(device: torch.device) -> None:
            assert device == GPU
            played.log.append("settle")

        self.parts = {
            "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph,
            "stream": stream, "graph": graph, "synchronize": synchronize,
        }  # fmt: skip

    def call(self) -> None:
        """Queue something that takes 8 ms the first time and 2 ms from then on."""
        assert not torch.is_grad_enabled()
        self.log.append(f"call on {self.streams[-1]}" if self.streams else "call")
        self.clock_ms += 2 if self.timed else 8
        self.timed += 1


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    made = Played()
    for name, part in made.parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    return made


def test_a_prepared_call_runs_a_few_times_and_is_then_captured_once(played: Played) -> None:
    lane = Lane(GPU, priority=-1)
    replay = lane.prepare(played.call)
    mine = "stream of priority -1"
    assert played.log == [
        "settle", *[f"call on {mine}"] * WARM_UPS,
        "settle", f"capture on {mine}", "call", "captured", "settle",
    ]  # fmt: skip
    played.log.clear()
    replay()
    assert played.log == ["replay"] and not played.streams


def test_a_time_is_that_of_the_second_call_on_the_lane_in_seconds(played: Played) -> None:
    assert Lane(GPU).seconds(played.call) == pytest.approx(0.002)
    call = "call on stream of priority 0"
    assert played.log == [call, "event", call, "event", "wait for event"]


def test_waiting_is_for_the_lane_and_settling_for_all_streams(played: Played) -> None:
    lane = Lane(GPU)
    lane.wait()
    lane.settle()
    assert played.log == ["wait for stream of priority 0", "settle"]


def test_on_a_cpu_a_lane_runs_every_call_at_once_and_never_waits(played: Played) -> None:
    lane = Lane(CPU)
    call = lane.prepare(played.call)
    lane.wait()
    lane.settle()
    assert played.log == ["call"] * WARM_UPS and lane.stream is None
    with lane.mine():
        call()
    assert played.log == ["call"] * (WARM_UPS + 1)
    with pytest.raises(AssertionError):
        lane.seconds(played.call)


SPECS = [
    TensorSpec("wide", (3, 5, 7), "float32"),  # 105 numbers: two alignments
    TensorSpec("one", (1,), "int32"),
    TensorSpec("full", (2, 32), "float32"),  # one alignment and no more
    TensorSpec("last", (2,), "int32"),
]


def test_packed_tensors_are_aligned_parts_of_one_buffer() -> None:
    packed = Packed(SPECS, CPU)
    starts = {name: x.storage_offset() for name, x in packed.tensors.items()}
    assert starts == {"wide": 0, "one": 128, "full": 192, "last": 256}
    assert all(start % ALIGNMENT == 0 for start in starts.values())
    assert packed.device.shape == packed.host.shape == (320,)
    assert not packed.host.any() and not packed.device.any() and not packed.host.is_pinned()
    kinds = {"float32": torch.float32, "int32": torch.int32}
    for spec in SPECS:
        tensor, array = packed.tensors[spec.name], packed.arrays[spec.name]
        assert tensor.shape == array.shape == spec.shape
        assert tensor.dtype == kinds[spec.dtype] and array.dtype == np.dtype(spec.dtype)


def test_an_upload_keeps_what_is_not_in_it() -> None:
    packed, rng = Packed(SPECS, CPU), np.random.default_rng(0)
    wide = rng.standard_normal((3, 5, 7)).astype(np.float32)
    full = rng.standard_normal((2, 32)).astype(np.float32)
    packed.upload({"wide": wide, "one": -7, "full": full, "last": [2**30 + 1, 3]})
    packed.upload({"one": 9})
    found = {name: tensor.numpy() for name, tensor in packed.tensors.items()}
    np.testing.assert_array_equal(found["wide"], wide)
    np.testing.assert_array_equal(found["full"], full)
    assert found["one"].tolist() == [9] and found["last"].tolist() == [2**30 + 1, 3]


def test_the_hosts_buffer_is_pinned_for_a_gpu_and_copied_without_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the copy would wait for all that was queued before it."""
    asked: list[tuple[bool, torch.device | None]] = []
    zeros = torch.zeros

    def on_cpu(
        size: int, pin_memory: bool = False, device: torch.device | None = None
    ) -> torch.Tensor:
        asked.append((pin_memory, device))
        return zeros(size)

    monkeypatch.setattr(torch, "zeros", on_cpu)
    packed = Packed(SPECS, GPU)
    assert asked == [(True, None), (False, GPU)]
    asked.clear()
    Packed(SPECS, CPU)
    assert asked == [(False, None), (False, CPU)]

    class Copied:
        def copy_(self, source: torch.Tensor, non_blocking: bool) -> None:
            assert source is packed.host and non_blocking
            asked.append((True, None))

    packed.device = Copied()  # type: ignore[assignment]
    packed.upload({"one": 1})
    assert asked[2:] == [(True, None)]
