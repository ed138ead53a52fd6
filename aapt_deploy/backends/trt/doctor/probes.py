"""The checks of `aapt doctor --tensorrt`, one a process.

`main` builds a micro-engine, runs it and compares. It prints one line of JSON: {"ok": ...,
"found": ...}. A check that makes TensorRT crash ends this process and nothing else: ask.py
starts it, limits its time and reads its answer. The name `here` returns what an answer is valid
for.
"""

import json
from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from aapt_deploy.backends.trt import api, cuda
from aapt_deploy.backends.trt.doctor import cases, receipts
from aapt_deploy.backends.trt.doctor.bench import Bench, Inside, answer_of, check, with_plugin
from aapt_deploy.backends.trt.doctor.cases import PACKED, PORTABLE, WITH_PLUGIN
from aapt_deploy.backends.trt.doctor.process import ask_process
from aapt_deploy.backends.trt.doctor.receipts import AOT, NATIVE, PYTHON
from aapt_deploy.backends.trt.flavour import LEAN
from aapt_deploy.backends.trt.lean import installed, pinned
from aapt_deploy.backends.trt.plan_file import audit
from aapt_deploy.errors import AaptError, MachineError, ParityError
from aapt_deploy.ops.block_causal_attention import kernels

LEAN_RUN = "aapt_deploy.backends.trt.doctor.lean_run"
LOOK_S = 60.0  # for a plan in the lean runtime; two must fit into the time of one check


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
    with_plugin(bench)
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


def portable(bench: Bench, form: str) -> str:
    """Build a portable plan, and let the lean runtime of this release run it."""
    version = api.version()
    if installed(LEAN) != version:
        raise MachineError(f"not asked; first {pinned(LEAN, version)}")
    if form in WITH_PLUGIN:
        with_plugin(bench)
    elif form == AOT:
        ahead_of_time_plugin()
    bench.build(PORTABLE[form][0](), portable=True)
    told, reason = ask_process(LEAN_RUN, [form, str(bench.plan_file)], LOOK_S)
    if told is None or told.get("ok") is not True:
        said = told["found"] if told else reason
        raise ParityError(f"the lean runtime: {said}", "")
    return str(told["found"])


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


def answer(name: str, device: cuda.Device) -> dict[str, object]:
    """Run one check. Any exception is the answer."""
    return answer_of(device, PROBES[name])


def main(name: str) -> None:
    device = cuda.with_driver()
    here = asdict(device.gpu(api.version(), kernels.source_hash())) if name == "here" else None
    print(json.dumps(here or answer(name, device)), flush=True)
