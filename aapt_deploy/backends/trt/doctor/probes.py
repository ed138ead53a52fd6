"""The checks of `aapt doctor --tensorrt`, one a process.

`main` builds a micro-engine, runs it and compares. It prints one line of JSON: {"ok": ...,
"found": ...}. A check that makes TensorRT crash ends this process and nothing else: ask.py
starts it, limits its time and reads its answer. The name `here` returns what an answer is valid
for. A form of attention and a portable plan of it are for the lean runtime, in a process that
another check starts.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aapt_deploy.backends.trt import api, cuda
from aapt_deploy.backends.trt.doctor import ask, cases, receipts
from aapt_deploy.backends.trt.doctor.cases import Case
from aapt_deploy.backends.trt.doctor.receipts import AOT, NATIVE, PYTHON
from aapt_deploy.backends.trt.flavour import LEAN
from aapt_deploy.backends.trt.plan_file import audit
from aapt_deploy.backends.trt.plans import Settings, Tensor
from aapt_deploy.errors import AaptError, MachineError, ParityError
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
        graph, log = self.folder / "probe.onnx", api.Messages(_to_stderr)
        graph.write_bytes(case.model.SerializeToString())
        settings = Settings(case.plugin_layers, WORKSPACE_BYTES, portable=portable)
        built = api.build(graph, settings, None, self.failures, log)
        self.plan_file.write_bytes(built.plan)
        return api.open_plan(self.plan_file, api.Messages(_to_stderr))

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


# The questions


def _with_plugin(bench: Bench) -> None:
    from aapt_deploy.backends.trt.plugin import python as python_plugin

    kernels.launcher(hopper_fp8.NAME, cases.HEAD_DIM)
    bench.failures = python_plugin.register(kernels.launcher).failures


def native(bench: Bench, captured: bool = False) -> str:
    case = cases.native()
    plan = bench.build(case)
    fused = audit(plan.layers(), 0).attention
    return f"{check(bench.run(plan, case, captured), case, 'bf16')}, {fused} fused attention layers"


def slot(bench: Bench) -> str:
    """Check that an output may be inside a larger buffer, and nothing beside it is written."""
    case = cases.native()
    plan = bench.build(case)
    whole, row = case.inputs["k_cache"].nbytes, case.inputs["k_cache"].nbytes // cases.RING.tokens
    offset, wanted = cases.SLOT * row, case.blocks["k_block"].view(np.uint8).reshape(-1)
    found = bench.run(plan, case, inside=Inside("k_block", whole, offset))["k_block"]
    if not np.array_equal(found[offset : offset + wanted.size], wanted):
        raise ParityError("the block is not in its slot", "")
    if found[:offset].any() or found[offset + wanted.size :].any():
        raise ParityError("something beside the slot was written", "")
    return f"{wanted.size} bytes at offset {offset} of {whole}, nothing beside them"


def fp8_products(bench: Bench) -> str:
    case = cases.fp8_product()
    plan = bench.build(case)
    audit(plan.layers(), 0, fp8_layers=1)
    return check(bench.run(plan, case), case, "bf16")


def plugin(
    bench: Bench, packed: bool = False, captured: bool = False, with_function: bool = False
) -> str:
    _with_plugin(bench)
    case = cases.plugin(packed, with_function=with_function)
    plan = bench.build(case)
    audit(plan.layers(), 1)
    return check(bench.run(plan, case, captured), case, "fp8")


def plugin_captured(bench: Bench) -> str:
    """Capture the plugin with the form of caches that works here."""
    try:
        return plugin(bench, captured=True)
    except AaptError:
        return f"{plugin(bench, packed=True, captured=True)}; int32 caches"


def aot_small(bench: Bench, shared_bytes: int, dynamic: bool) -> str:
    from aapt_deploy.backends.trt.doctor import smallest_plugin

    smallest_plugin.define(shared_bytes, dynamic)
    case = cases.small_plugin(smallest_plugin.NAME, smallest_plugin.THREADS)
    return check(bench.run(bench.build(case), case), case, "bf16")


def aot_small_at(shared_bytes: int, dynamic: bool) -> Callable[[Bench], str]:
    return lambda bench: aot_small(bench, shared_bytes, dynamic)


def ahead_of_time_plugin() -> None:
    from aapt_deploy.backends.trt.plugin import ahead_of_time

    ahead_of_time.define_once(kernels.ptx_launch)


def aot(bench: Bench) -> str:
    ahead_of_time_plugin()
    case = cases.plugin(aot=True)
    return check(bench.run(bench.build(case), case), case, "fp8")


def fp8_attention(bench: Bench) -> str:
    case = cases.fp8_attention()
    plan = bench.build(case)
    if not any(layer.is_attention and layer.reads_fp8 for layer in plan.layers()):
        raise ParityError("TensorRT's attention is not one FP8 kernel here", "")
    return check(bench.run(plan, case), case, "fp8, TensorRT's")


PACKED = "python, int32 caches"
PORTABLE: dict[str, tuple[Callable[[], Case], str]] = {  # form -> case and kind of its answer
    NATIVE: (cases.native, "bf16"),
    PYTHON: (cases.plugin, "fp8"),
    PACKED: (lambda: cases.plugin(packed=True), "fp8"),
    AOT: (lambda: cases.plugin(aot=True), "fp8"),
}


def portable(bench: Bench, form: str) -> str:
    """Build a portable plan, and let the lean runtime of this release run it."""
    version = api.version()
    if LEAN.installed != version:
        raise MachineError(f"not asked; first {LEAN.pinned(version)}")
    if form in (PYTHON, PACKED):
        _with_plugin(bench)
    elif form == AOT:
        ahead_of_time_plugin()
    bench.build(PORTABLE[form][0](), portable=True)
    told, reason = ask.ask_process(form, ask.LOOK_S, str(bench.plan_file))
    if told is None or told.get("ok") is not True:
        said = str(told.get("found", told.get("error"))) if told else reason
        raise ParityError(f"the lean runtime: {said}", "")
    return str(told["found"])


def run_portable(bench: Bench, form: str, plan: Path) -> str:
    """Run a plan of `portable` in the process of the lean runtime."""
    if form in (PYTHON, PACKED):
        _with_plugin(bench)
    case, kind = PORTABLE[form][0](), PORTABLE[form][1]
    opened = api.open_plan(plan, api.Messages(_to_stderr))
    return check(bench.run(opened, case), case, kind)


def portable_plugin(bench: Bench) -> str:
    """Make the plugin portable, with the form of caches that works here."""
    try:
        return portable(bench, PYTHON)
    except AaptError:
        return f"{portable(bench, PACKED)}; int32 caches"


PROBES: dict[str, Callable[[Bench], str]] = {
    receipts.NATIVE_BUILDS: native,
    receipts.CAPTURED: lambda bench: native(bench, captured=True),
    receipts.SLOT: slot,
    receipts.FP8_PRODUCTS: fp8_products,
    receipts.PLUGIN_FP8: plugin,
    receipts.PLUGIN_PACKED: lambda bench: plugin(bench, packed=True),
    receipts.PLUGIN_CAPTURED: plugin_captured,
    receipts.FUNCTION: lambda bench: plugin(bench, with_function=True),
    receipts.AOT_WORKS: aot_small_at(1 << 10, dynamic=False),
    receipts.AOT_STATIC: aot_small_at(64 << 10, dynamic=False),
    receipts.AOT_DYNAMIC: aot_small_at(64 << 10, dynamic=True),
    receipts.AOT_OP: aot,
    receipts.FP8_ATTENTION: fp8_attention,
    receipts.PORTABLE_NATIVE: lambda bench: portable(bench, NATIVE),
    receipts.PORTABLE_PLUGIN: portable_plugin,
    receipts.PORTABLE_AOT: lambda bench: portable(bench, AOT),
}


def answer(name: str, device: cuda.Device, *plan: str) -> dict[str, object]:
    """Run one check, or `plan` in the form `name`. Any exception is the answer."""
    with tempfile.TemporaryDirectory(prefix="aapt-probe-") as folder:
        bench = Bench(device, Path(folder))
        try:
            found = run_portable(bench, name, Path(*plan)) if plan else PROBES[name](bench)
            return {"ok": True, "found": found}
        except Exception as error:  # TensorRT's and CUDA's types are many; each is a finding
            kind = "" if isinstance(error, AaptError) else f"{type(error).__name__}: "
            return {"ok": False, "found": f"{kind}{error}"}


def main(name: str, *plan: str) -> None:
    device = cuda.with_driver()
    here = asdict(device.gpu(api.version(), kernels.source_hash())) if name == "here" else None
    print(json.dumps(here or answer(name, device, *plan)), flush=True)
