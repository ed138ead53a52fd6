"""Emulated plans that ONNX Runtime computes, and frames compared."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest

from aapt_deploy.backends.trt import cuda, engine
from aapt_deploy.backends.trt.engine import TrtEngines
from aapt_deploy.backends.trt.state import from_bf16, to_bf16
from aapt_deploy.bundle.signature import GraphSignature
from aapt_deploy.models.family import family_of
from aapt_deploy.ops.block_causal_attention import NEXT, hopper_fp8, kernels
from aapt_deploy.profiles import Profile
from tests.support import cuda_emulator
from tests.support.cuda_emulator import Compute, Driver, Tensor


def decibels(frames: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    errors = [
        np.square(a.astype(np.float64) - b).mean()
        for a, b in zip(frames[1:], wanted[1:], strict=True)
    ]
    return float(10 * np.log10(255**2 / np.mean(errors)))


TYPES = {"float32": "FLOAT", "int32": "INT32", "int64": "INT64", "uint8": "UINT8"}


def tensors_of(signature: GraphSignature) -> list[Tensor]:
    inputs = [Tensor(spec.name, True, TYPES[spec.dtype], spec.shape) for spec in signature.read]
    outputs = [
        Tensor(spec.name, False, TYPES[spec.dtype], spec.shape) for spec in signature.outputs
    ]
    kept = (
        []
        if signature.name == "generator"
        else [Tensor(spec.name + NEXT, False, "FLOAT", spec.shape) for spec in signature.state]
    )
    return [*inputs, *outputs, *kept]


def by_onnx(path: Path) -> Compute:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda given: dict(zip(names, session.run(None, given), strict=True))


def stored_as(kind: str, compute: Compute, names: set[str]) -> Compute:
    """A plan that holds the tensors `names` in bf16 or half."""
    if kind == "BF16":
        into, out = to_bf16, from_bf16
    else:
        into, out = (
            (lambda array: array.astype(np.float16)),
            (lambda array: array.astype(np.float32)),
        )

    def run(given: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        found = compute(
            {name: out(array) if name in names else array for name, array in given.items()}
        )
        return {name: into(array) if name in names else array for name, array in found.items()}

    return run


def plans(
    driver: Driver,
    profile: Profile,
    computes: Mapping[str, Compute],
    kinds: Callable[[str, str], str | None] = lambda *_: None,
) -> Any:
    """Emulated plans; `kinds` says (graph, tensor) -> another type than the signature's."""
    made = {}
    for name, signature in family_of(profile).signatures(profile).items():
        tensors = [
            tensor._replace(dtype=kinds(name, tensor.name) or tensor.dtype)
            for tensor in tensors_of(signature)
        ]
        compute = computes[name]
        for kind in ("BF16", "HALF"):
            if changed := {tensor.name for tensor in tensors if tensor.dtype == kind}:
                compute = stored_as(kind, compute, changed)
        made[name] = cuda_emulator.Plan(driver, tensors, compute)
    return made


def opened_over(
    driver: Driver,
    profile: Profile,
    computes: Mapping[str, Compute],
    module: ModuleType = engine,
    **more: Any,
) -> TrtEngines:
    device = (
        module.cuda_module.Device(driver) if hasattr(module, "cuda_module") else cuda.Device(driver)
    )
    captured = more.pop("captured", True)
    return module.TrtEngines(
        profile,
        plans(driver, profile, computes, **more),
        device,
        "fp32",
        module.RunOptions(captured=captured),
    )  # type: ignore[no-any-return]


def differ(a: list[np.ndarray], b: list[np.ndarray]) -> tuple[int, float]:
    """Largest difference in grey levels, and the share of values that differ."""
    one, two = (np.concatenate(frames).astype(np.int16) for frames in (a, b))
    return int(np.abs(one - two).max()), float((one != two).mean())


def assert_same(frames: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    highest, share = differ(frames, wanted)
    assert highest <= 1 and share < 1 / 500, (highest, share)


def toy_scales(profile: Profile) -> list[hopper_fp8.Scales]:
    """Scales that differ from layer to layer, for keys of unit size and small values."""
    heads, dim, made = profile.model.heads, profile.head_dim, []
    for layer in range(profile.model.depth):
        rng = np.random.default_rng(layer)
        one, two, three = (
            rng.uniform(3, 6, shape).astype(np.float32) / 448
            for shape in ((heads,), (heads,), (heads, dim))
        )
        made.append(
            hopper_fp8.Scales(
                one, two, rng.standard_normal((heads, dim)).astype(np.float32) / 4, three
            )
        )
    return made


def emulated_kernels(driver: Driver, profile: Profile) -> Callable[[int], Any]:
    """aapt_pack and aapt_commit in NumPy, queued as the real ones are."""
    heads, dim = profile.model.heads, profile.head_dim

    def launch(kernel: str, inputs: Any, numbers: Any, outputs: Any, stream: int) -> None:
        abi = kernels.ABI[kernel]
        assert (
            tuple(map(len, (inputs, numbers, outputs))) == tuple(map(len, abi))
            and numbers[1] == heads
        )
        where, tokens = (
            dict(zip(abi.inputs + abi.outputs, (*inputs, *outputs), strict=True)),
            numbers[0],
        )
        block = hopper_fp8.image_shape(heads, tokens, dim)

        def pack() -> None:
            k, v = (
                from_bf16(driver.array(where[name], (tokens, heads, dim), np.uint16))
                for name in ("k", "v")
            )
            parts = {"k_scale": (heads,), "k_mean": (heads, dim), "v_scale": (heads, dim)}
            given = {
                name: driver.array(where[name], shape, np.float32) for name, shape in parts.items()
            }
            images = hopper_fp8.pack(
                k, v, hopper_fp8.Scales(q_scale=np.ones(heads, np.float32), **given)
            )
            for name, image in zip(("k_block", "v_block"), images, strict=True):
                driver.array(where[name], block, np.uint8)[...] = image

        def commit() -> None:
            cache = (heads, numbers[2], block[2])
            images = [driver.array(where[name], block, np.uint8) for name in ("k_block", "v_block")]
            slot = int(driver.array(where["slot"], (1,), np.int32)[0])
            hopper_fp8.commit(
                *images,
                tokens,
                slot,
                *(driver.array(where[name], cache, np.uint8) for name in ("k_cache", "v_cache")),
            )

        driver.queue(stream, {"aapt_pack": pack, "aapt_commit": commit}[kernel])

    return lambda head_dim: launch if head_dim == dim else pytest.fail(f"{head_dim=}")
