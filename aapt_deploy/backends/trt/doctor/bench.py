"""Build and run a micro-engine on this GPU, and compare what it computes."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aapt_deploy.backends.trt import api, cuda
from aapt_deploy.backends.trt.doctor import cases
from aapt_deploy.backends.trt.doctor.cases import Case
from aapt_deploy.backends.trt.plans import Settings, Tensor
from aapt_deploy.backends.trt.remedies import Messages
from aapt_deploy.errors import AaptError, ParityError
from aapt_deploy.ops.block_causal_attention import hopper_fp8, kernels

WORKSPACE_BYTES = 256 << 20
# Relative error by rounding: of a product in bf16; of attention with FP8 keys, values and weights.
CLOSE = {"bf16": 0.02, "fp8": 0.10, "fp8, TensorRT's": 0.02}
SAME_BYTES = 0.999  # of a block: a quotient on the edge of two codes may be rounded either way
ITEM_BYTES = {"FLOAT": 4, "INT32": 4, "BF16": 2, "HALF": 2, "FP8": 1, "UINT8": 1}


class Inside(NamedTuple):
    """An output in a buffer of `size` bytes, from byte `offset` on."""

    output: str
    size: int
    offset: int


class Bench:
    """A device, and one plan at a time on it."""

    def __init__(self, device: cuda.Device, folder: Path) -> None:
        self.device, self.stream, self.folder = device, device.stream(), folder
        self.failures: list[Exception] = []  # of our plugin

    @property
    def plan_file(self) -> Path:
        return self.folder / "probe.plan"

    def build(self, case: Case, portable: bool = False) -> api.Plan:
        """Build and open the plan of `case`; the network must have its plugin layers."""
        graph, log = self.folder / "probe.onnx", Messages(_to_stderr)
        graph.write_bytes(case.model.SerializeToString())
        settings = Settings(case.plugin_layers, WORKSPACE_BYTES, portable=portable)
        built = api.build(graph, settings, None, self.failures, log)
        self.plan_file.write_bytes(built.plan)
        return self.open(self.plan_file)

    def open(self, file: Path) -> api.Plan:
        return api.open_plan(file, Messages(_to_stderr))

    def run(
        self, plan: api.Plan, case: Case, captured: bool = False, inside: Inside | None = None
    ) -> dict[str, np.ndarray]:
        """Run `plan` once more than a capture needs; return every output's bytes.

        `inside` binds one output inside a larger buffer.
        """
        device, stream, context = self.device, self.stream, plan.context()
        outputs: dict[str, tuple[int, int]] = {}
        for tensor in plan.tensors:
            size = _bytes(tensor)
            if tensor.is_input:
                address = device.memory(size)
                stream.upload(address, np.ascontiguousarray(case.inputs[tensor.name]))
            else:
                whole, offset = inside[1:] if inside and inside.output == tensor.name else (size, 0)
                base = device.memory(whole)
                stream.zero(base, whole)
                outputs[tensor.name], address = (base, whole), base + offset
            context.bind(tensor.name, address)
        step = stream.prepare(lambda: context.enqueue(stream.handle), captured)
        step()
        found = {}
        for name, (address, size) in outputs.items():
            found[name] = device.pinned((size,), np.uint8)
            stream.download(found[name], address)
        stream.wait()
        return found


def _bytes(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape)) * ITEM_BYTES[tensor.dtype]


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def check(found: dict[str, np.ndarray], case: Case, kind: str) -> str:
    """Compare what a plan computed. Raises ParityError."""
    out = found["out"].view(np.float32).reshape(case.out.shape).astype(np.float64)
    error = float(np.linalg.norm(out - case.out) / np.linalg.norm(case.out))
    if not error <= CLOSE[kind]:
        raise ParityError(f"the answer differs by {error:.4f} of its size, above {CLOSE[kind]}", "")
    said = [f"differs by {error:.4f} of its size"]
    for name, wanted in case.blocks.items():
        expected = np.ascontiguousarray(wanted).view(np.uint8).reshape(-1)
        share = float(np.mean(found[name] == expected))
        if share < SAME_BYTES:
            raise ParityError(f"{name} has {share:.2%} of its bytes right", "")
        said.append(f"{name} {share:.2%} of bytes")
    return ", ".join(said)


def with_plugin(bench: Bench) -> None:
    """Register our plugin, with its kernels loaded."""
    from aapt_deploy.backends.trt.plugin import python as python_plugin

    kernels.launcher(hopper_fp8.NAME, cases.HEAD_DIM)
    bench.failures = python_plugin.register(kernels.launcher).failures


def answer_of(device: cuda.Device, question: Callable[[Bench], str]) -> dict[str, object]:
    """Ask one question. Any exception is the answer."""
    with tempfile.TemporaryDirectory(prefix="aapt-probe-") as folder:
        try:
            return {"ok": True, "found": question(Bench(device, Path(folder)))}
        except Exception as error:  # TensorRT's and CUDA's types are many; each is a finding
            kind = "" if isinstance(error, AaptError) else f"{type(error).__name__}: "
            return {"ok": False, "found": f"{kind}{error}"}
