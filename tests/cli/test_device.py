"""`--device` of each command on a machine without a GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aapt_deploy.backends.table import BACKENDS, named, precision_of
from aapt_deploy.backends.torch_cuda import engine
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import UsageError
from aapt_deploy.measure import latency
from aapt_deploy.profiles import Profile
from tests.support.commands import Ran

Aapt = Callable[..., Ran]
needs_no_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="says what happens without a GPU"
)
ON_GPU = ("--backend", "torch", "--device", "cuda")


def test_every_backend_has_its_places() -> None:
    assert named("torch", "cuda") == "torch-cuda"
    assert [named(name, None) for name in ("onnxruntime", "torch", "tensorrt", "what")] == [
        "onnxruntime",
        "torch",
        "tensorrt",
        "what",
    ]
    assert (named("torch", "cpu"), named("onnxruntime", "cpu"), named("tensorrt", "cuda")) == (
        "torch",
        "onnxruntime",
        "tensorrt",
    )
    for backend, device in (("onnxruntime", "cuda"), ("tensorrt", "cpu"), ("torch", "tpu")):
        with pytest.raises(
            UsageError, match=f"{backend!r} does not run on device {device!r}"
        ) as caught:
            named(backend, device)
        assert "--backend torch --device cuda" in caught.value.hint
    assert {named("torch", place) for place in ("cpu", "cuda")} <= set(BACKENDS)


@needs_no_gpu
@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (("profile", "BUNDLE", *ON_GPU), 5, "PyTorch finds no CUDA GPU"),
        (("profile", "aapt-8b-736x416-h100", *ON_GPU), 5, "PyTorch finds no CUDA GPU"),
        (("stream", "BUNDLE", "-o", "x.mp4", *ON_GPU), 5, "PyTorch finds no CUDA GPU"),
        (
            ("quality", "BUNDLE", *ON_GPU, "--reference", "torch-fp32"),
            5,
            "PyTorch finds no CUDA GPU",
        ),
        (
            ("init", "tiny-cpu", "-o", "x.safetensors", "--device", "cuda"),
            5,
            "cannot be drawn on a GPU",
        ),
        (("init", "tiny-cpu", "-o", "x.safetensors", "--device", "tpu"), 2, "device 'tpu'"),
        (("profile", "BUNDLE", *ON_GPU, "--precision", "fp8"), 2, "has no FP8 scales"),
        (
            ("profile", "BUNDLE", *ON_GPU, "--precision", "int8"),
            2,
            "precision 'int8' does not exist",
        ),
        (("profile", "aapt-9b", *ON_GPU), 4, "aapt-9b"),
        (
            ("profile", "BUNDLE", "--device", "cuda"),
            2,
            "'onnxruntime' does not run on device 'cuda'",
        ),
        (
            ("stream", "BUNDLE", "-o", "x.mp4", "--backend", "tensorrt", "--device", "cpu"),
            2,
            "'tensorrt' does not run on device 'cpu'",
        ),
        (("build-engine", "BUNDLE", "--backend", "torch-cuda"), 2, "cannot be built"),
    ],
)
def test_without_a_gpu_each_command_says_so(
    aapt: Aapt, bundle: Path, tmp_path: Path, command: tuple[str, ...], code: int, said: str
) -> None:
    ran = aapt(
        *(
            bundle if word == "BUNDLE" else tmp_path / word if word.startswith("x.") else word
            for word in command
        )
    )
    assert (ran.code, ran.out) == (code, ""), ran.err
    assert said in ran.error
    assert list(tmp_path.iterdir()) == []


def test_no_build_is_asked_for_and_the_precision_follows_the_bundle(
    bare: Path, exported: object
) -> None:
    opened = Bundle.open(bare)
    assert opened.engines == {}
    assert precision_of(opened, "torch-cuda", None) == "bf16"
    assert precision_of(opened, "torch-cuda", "fp8") == "fp8"
    in_fp8 = Bundle.open(exported.path)  # type: ignore[attr-defined]
    assert precision_of(in_fp8, "torch-cuda", None) == "fp8"


def test_a_profile_is_measured_with_random_weights(
    tiny: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `aapt profile PROFILE --device cuda`, with the engine's plain form instead of the GPU."""
    monkeypatch.setattr(engine, "the_gpu", lambda profile, precision: torch.device("cpu"))
    monkeypatch.setitem(engine.PRECISIONS, "bf16", torch.float32)
    done: list[str] = []
    measured = latency.measure_random(tiny, None, 10, done.append)
    assert (measured.profile, measured.backend, measured.precision) == (
        "tiny-cpu",
        "torch-cuda",
        "bf16",
    )
    assert measured.steady["generator"].count == measured.steady["decoder"].count == 10
    assert done[-1] == f"{10 + latency.COLD_BLOCKS} of {10 + latency.COLD_BLOCKS} blocks"
