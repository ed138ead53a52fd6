"""Opening engines on a GPU that is played: tensors lie on the CPU, plain kernels do the work.

Checks what is decided before the first kernel runs, and what only a GPU is given.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from aapt_deploy.backends.torch_cuda import engine as torch_cuda
from aapt_deploy.backends.torch_cuda import lane as torch_lane
from aapt_deploy.backends.torch_cuda.kernels import plain
from aapt_deploy.backends.torch_eager import EagerEngines
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import MachineError, UsageError
from aapt_deploy.models.checkpoint import Checkpoint
from aapt_deploy.profiles import Profile, load
from tests.support.bundles import rewrite_manifest
from tests.support.tiny import Exported, frames_of
from tests.support.trt_plans import decibels

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BIG = load("aapt-8b-736x416-h100")


class OnCpu(TorchFunctionMode):
    """Puts on the CPU what is asked for on the GPU, and says that it is there."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.device.__get__:
            found = func(*args)
            return GPU if found == CPU else found
        given = dict(kwargs or {})
        self.pinned += bool(given.pop("pin_memory", False))
        here = lambda x: CPU if isinstance(x, torch.device) and x.type == "cuda" else x
        return func(*map(here, args), **{name: here(x) for name, x in given.items()})


class Stream:
    def __init__(self, device: torch.device, priority: int) -> None:
        assert device == GPU

    def synchronize(self) -> None:
        pass


class Event:
    def __init__(self, enable_timing: bool) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return 1.0


@pytest.fixture
def emptied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Hopper GPU is here. Return what was done with its memory."""
    done: list[str] = []
    parts = {
        "is_available": lambda: True, "get_device_capability": lambda: (9, 0),
        "get_device_name": lambda: "a GPU", "synchronize": lambda device: None,
        "Stream": Stream, "Event": Event, "stream": lambda stream: contextlib.nullcontext(),
        "empty_cache": lambda: done.append("emptied"),
    }  # fmt: skip
    for name, part in parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    monkeypatch.setattr(torch_cuda, "on_gpu", plain)
    monkeypatch.setattr(torch_lane.Lane, "prepare", lambda lane, call: call)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    return done


@pytest.fixture
def played(emptied: list[str]) -> Iterator[OnCpu]:
    with OnCpu() as mode:
        yield mode


def in_this_thread(engines: torch_cuda.GpuEngines) -> torch_cuda.GpuEngines:
    """No pass runs ahead in another thread, which the mode would not reach."""
    engines.overlapped = False
    return engines


def test_a_bundle_is_opened_in_bf16_and_streams_as_the_reference_does(
    bundle: Path, loaded: Checkpoint, emptied: list[str], played: OnCpu
) -> None:
    opened = Bundle.open(bundle)
    engines = torch_cuda.open_bundle(opened, "bf16")
    assert engines.precision == "bf16" and engines.backend == "torch-cuda" and engines.overlapped
    assert torch.backends.cudnn.benchmark and emptied == ["emptied"]
    assert played.pinned == 4, "two uploads, the latent and the frames"
    assert {cache.dtype for cache in engines.generator.cache.caches} == {torch.bfloat16}  # type: ignore[union-attr]
    frames = frames_of(in_this_thread(engines), opened, 3, 5)
    exact = frames_of(EagerEngines(copy.deepcopy(loaded), 1, "fp32"), opened, 3, 5)
    assert 30 < decibels(frames, exact) < 90
    engines.close()
    assert engines.engines == {}


def test_an_fp8_bundle_is_opened_with_its_own_scales(
    exported: Exported, exported_frames: list[np.ndarray], played: OnCpu
) -> None:
    opened = Bundle.open(exported.path)
    engines = torch_cuda.open_bundle(opened, "fp8")
    assert engines.precision == "fp8"
    assert {cache.dtype for cache in engines.generator.cache.caches} == {torch.uint8}  # type: ignore[union-attr]
    assert decibels(frames_of(in_this_thread(engines), opened, 2, 3), exported_frames[:3]) > 26


def test_without_a_decoder_there_is_none(loaded: Checkpoint) -> None:
    options = torch_cuda.Options.of("fp32", CPU)
    networks = copy.deepcopy(loaded.generator), copy.deepcopy(loaded.vae)
    engines = torch_cuda.GpuEngines(*networks, None, options, decoder=False)
    assert list(engines.engines) == ["encoder", "prompt", "generator"]
    assert not any(parameter.requires_grad for parameter in networks[1].parameters())


@pytest.mark.parametrize(("precision", "found"), [("fp8", None), ("bf16", "some")])
def test_scales_are_for_fp8_and_for_nothing_else(
    loaded: Checkpoint, precision: str, found: Any
) -> None:
    options = torch_cuda.Options.of(precision, CPU)
    with pytest.raises(AssertionError, match=f"options.precision='{precision}'"):
        torch_cuda.GpuEngines(loaded.generator, loaded.vae, found, options)


def test_kernels_are_the_devices_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_cuda, "on_gpu", lambda: "a GPU's")
    assert torch_cuda.Options.of("bf16", GPU).kernels == "a GPU's"
    of_cpu = torch_cuda.Options.of("fp8", CPU, by_row=False)
    assert (of_cpu.precision, of_cpu.kernels, of_cpu.by_row) == ("fp8", plain(), False)
    assert torch_cuda.Options.of("fp8", CPU).by_row


@pytest.mark.parametrize(
    ("weights", "asked", "precision"),
    [("fp8_e4m3", None, "fp8"), ("fp32", None, "bf16"), ("fp8_e4m3", "bf16", "bf16")],
)
def test_random_weights_have_the_profiles_precision_unless_another_is_asked_for(
    emptied: list[str],
    monkeypatch: pytest.MonkeyPatch,
    weights: str,
    asked: str | None,
    precision: str,
) -> None:
    given: list[tuple[object, ...]] = []
    monkeypatch.setattr(torch_cuda, "random_engines", lambda *each: given.append(each) or "opened")  # type: ignore[func-returns-value]
    own = dataclasses.replace(BIG.precision, weights=weights)
    profile = dataclasses.replace(BIG, precision=own)
    assert torch_cuda.open_random(profile, asked) == "opened"  # type: ignore[comparison-overlap]
    assert given == [(profile, precision, 0, GPU)]


# --- refusals ---

Open = Callable[[Bundle, Profile, str], object]
OPENS = pytest.mark.parametrize(
    "opens",
    [lambda bundle, _, precision: torch_cuda.open_bundle(bundle, precision),
     lambda _, profile, precision: torch_cuda.open_random(profile, precision)],
    ids=["bundle", "random"],
)  # fmt: skip


@OPENS
def test_without_a_gpu_nothing_is_opened(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, opens: Open
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    opened = Bundle.open(bundle)
    with pytest.raises(MachineError, match="PyTorch finds no CUDA GPU") as caught:
        opens(opened, opened.profile, "bf16")
    assert "aapt doctor" in caught.value.hint and "--device cpu" in caught.value.hint


@OPENS
def test_a_gpu_whose_memory_is_full_is_named_with_the_profile(
    bundle: Path, emptied: list[str], monkeypatch: pytest.MonkeyPatch, opens: Open
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB. GPU 0 has a total of 1 GiB. More")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    monkeypatch.setattr(torch_cuda, "random_engines", full)
    opened = Bundle.open(bundle)
    words = r"profile tiny-cpu does not fit into the memory of a GPU: Tried to allocate 9 GiB$"
    with pytest.raises(MachineError, match=words) as caught:
        opens(opened, opened.profile, "bf16")
    assert "aapt plan tiny-cpu" in caught.value.hint and "nvidia-smi" in caught.value.hint


@OPENS
def test_a_gpu_without_the_fp8_kernels_is_refused(
    copied: Path, emptied: list[str], monkeypatch: pytest.MonkeyPatch, opens: Open
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    rewrite_manifest(copied, lambda manifest: manifest.update(precision="fp8"))
    with pytest.raises(MachineError, match=r"this one has compute capability 8\.9"):
        opens(Bundle.open(copied), BIG, "fp8")


@OPENS
def test_a_precision_that_a_gpu_does_not_have_is_refused(
    bundle: Path, emptied: list[str], opens: Open
) -> None:
    with pytest.raises(UsageError, match="precision 'int8' does not exist for torch on a GPU"):
        opens(Bundle.open(bundle), BIG, "int8")


def test_a_bundle_without_scales_says_how_to_export_it(bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"bundle .* has no FP8 scales") as caught:
        torch_cuda.open_bundle(Bundle.open(bundle), "fp8")
    assert caught.value.hint.endswith("--precision fp8")
