"""The FP8 attention kernels on a Hopper GPU, stage by stage; a record in the folder of `--out`.

    machine    what takes part: GPU, packages, the compiler's report
    smoke      small launches of everything, 25 s at most: says whether FP8 can be relied on here,
               and where it is wrong names the rows, the channels and the mistake that explains it
    products   wgmma alone: register maps, descriptors, accumulators, rates (attention_products.py)
    speed      four shapes with random data: every variant of aapt_attend, beside its prediction
               (attention_model.py); then what else runs here; then every variant again
    correct    every kernel against its bytes and float64 attention, caches from empty to 112 000
               tokens, each launch twice; every ring case as a stream, launched and replayed
    sanitizer  memcheck and racecheck over small shapes; only where `--only` asks for it

Each stage is a process whose parts come home one by one (stages.py): a wrong kernel may hang, or
take the CUDA context with it. Needs torch for CUDA, triton, and cuda-bindings with NVRTC. Changes
none of the GPU's settings. `--small` tries all of it on a CPU, over kernels in NumPy.
Exit code 0: all that ran was right and fast enough; 3: not so, the record says what; 5: no GPU
that this can run on.
"""

import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]
import attention_model as model
import gpu
from attention_diagnosis import diagnose
from attention_machine import machine, sanitizer
from attention_products import RATES, SIZES, accumulator, exact_product, rate
from attention_rivals import Meter, rivals, timed
from attention_small import in_numpy
from stages import HOW, Parts, context_is_broken, first_line, say

from aapt_deploy.ops.block_causal_attention import Ring, kernels
from tests.support.attention_checks import RINGS, Case, Run, Stream, on_gpu, replayed

TURN_S = 1.0  # that each variant is timed for, twice
RIVAL_S = 20  # that a rival may take with what it prepares
PART_S = 15  # that one launch and its check may take
SEED = 0


def device() -> str:
    return "cpu" if HOW.small else "cuda"


def run_of(dim: int, variant: str | None = None) -> Run:
    """Launches of the kernels, of a variant or of the chosen one."""
    return in_numpy if HOW.small else on_gpu(dim, variant)


# --- smoke ---


def smoke(parts: Parts) -> None:
    """Parts whose name begins with "fp8" say whether FP8 can be relied on."""
    sizes = ((128, 65, 64), (64, 3, 0)) if HOW.small else ((128, 200, 1024), (64, 65, 128))
    for dim, tokens, cached in sizes:
        call = functools.partial(launches, "plain", tokens, cached, dim)
        parts.run(f"fp8 attention, D = {dim}", call, PART_S)
    parts.run("fp8 product", fp8_product, PART_S)
    for name in variants():
        parts.run(f"variant {name}", functools.partial(variant, name), PART_S)
    parts.run("bf16 attention", bf16_attention, PART_S)


def launches(kind: str, tokens: int, cached: int, dim: int) -> dict[str, Any]:
    """All three kernels on one case; what is wrong with attention where it is wrong."""
    run = run_of(dim)
    case = Case(kind, tokens, cached, 2, dim, SEED + tokens + cached, device())
    pairs = zip(case.pack(run), case.block, strict=True)
    packed = all(torch.equal(made, wanted) for made, wanted in pairs)
    found = {**case.check(run), "pack": packed}
    capacity = case.cache[0].shape[1] * 64
    last = capacity - tokens
    slots = {0, 1, last, max(0, last) // 2, last + 1, -1}
    found["commit"] = all(case.commit(run, slot) for slot in slots)
    if not found["ok"]:
        found["diagnosis"] = diagnose(case, case.attend(run))
        say(f"wrong: {found['diagnosis']}")
    found["ok"] = bool(found["ok"] and packed and found["commit"])
    return found


def variants() -> list[str]:
    """All of them; in NumPy they are one and the same."""
    return list(kernels.VARIANTS)[: 2 if HOW.small else None]


def variant(name: str) -> dict[str, Any]:
    """Whether a variant launches, and gives the bits of the plainest."""
    tokens, cached = (20, 30) if HOW.small else (200, 1000)
    case = Case("plain", tokens, cached, 2, model.DIM, SEED, device())
    wanted, made = (case.attend(run_of(model.DIM, v)) for v in (next(iter(kernels.VARIANTS)), name))
    return {"ok": torch.equal(wanted, made)}


def fp8_product() -> dict[str, Any]:
    """The engine's product of codes with scales by row, against float64."""
    from aapt_deploy.backends.torch_cuda.engine import Options

    draw = torch.Generator(device()).manual_seed(SEED)
    a, b = (torch.randn(n, 256, generator=draw, device=device()) for n in (1196, 512))
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    by_row = torch.rand(1, 512, generator=draw, device=device()) + 0.5
    one = torch.full((1196, 1), 0.5, device=device())
    product = Options.of("fp8", torch.device(device())).kernels.product
    made = product(a8, b8, one, by_row, None, torch.bfloat16).double()
    true = a8.double() @ b8.double().T * 0.5 * by_row.double()
    error = float((made - true).square().mean().sqrt() / true.square().mean().sqrt())
    return {"error": error, "ok": error < 0.02}


def bf16_attention() -> dict[str, Any]:
    """torch.ops.aapt in bf16, with more in the caches than is valid."""
    from aapt_deploy.ops.block_causal_attention import torch_op

    if not HOW.small:
        from aapt_deploy.ops.block_causal_attention import triton_op  # noqa: F401 (the GPU's form)
    case = Case("plain", 130, 500, 2, model.DIM, SEED, device())
    length = torch.tensor([case.cached], dtype=torch.int32, device=device())
    q, k, v = (x[None].contiguous() for x in (case.q, case.k[case.cached :], case.v[case.cached :]))
    past = [torch.cat([x[: case.cached], x[:70]])[None].contiguous() for x in (case.k, case.v)]
    made = torch_op.operator(q, k, v, *past, length)[0][0][case.rows].double()
    error = float((made - case.exact).square().mean().sqrt() / case.exact.square().mean().sqrt())
    return {"error": error, "ok": error < 0.01}


# --- products ---


def products(parts: Parts) -> None:
    for probe in SIZES:
        parts.run(probe, functools.partial(exact_product, probe), PART_S)
    parts.run("accumulator", accumulator, PART_S)
    for name in RATES:
        parts.run(name, lambda name=name: {"tflops": round(rate(name), 1)}, PART_S)


# --- speed ---


def shapes() -> dict[str, model.Shape]:
    return {"small": model.Shape(33, 64, 1)} if HOW.small else model.SHAPES


def speed(parts: Parts) -> None:
    """Our variants, then the rivals at our own shapes, then our variants again. A wrong kernel is
    not timed: with `--precision bf16` only what is not FP8 of ours is."""
    names = variants() if HOW.precision == "fp8" else []
    drawn = functools.lru_cache(1)(case_of)
    for again in ("", ", again"):
        for title, shape in shapes().items():
            for name in names:
                call = functools.partial(ours, drawn, shape, name)
                parts.run(f"{title}: {name}{again}", call, RIVAL_S)
        if again:
            break
        for title, shape in list(shapes().items())[:2]:
            for name, make in rivals(functools.partial(drawn, shape)).items():
                call = functools.partial(rival, make, shape)
                parts.run(f"{title}: {name}", call, RIVAL_S)
    if names:
        first = next(iter(shapes().values()))
        parts.run("beside", lambda: beside(drawn(first)), PART_S)


def case_of(shape: model.Shape) -> Case:
    return Case("plain", shape.tokens, shape.cached, shape.heads, model.DIM, SEED, device())


def entry(call: Callable[[], object], shape: model.Shape, seconds: float) -> dict[str, Any]:
    """Median of about `seconds` of calls."""
    call()
    with Meter() as meter:
        samples = timed(call, seconds)
    ms = 1000 * statistics.median(samples)
    tflops = round(shape.flop / ms / 1e9, 1)
    spread = [round(1000 * edge, 4) for edge in (min(samples), max(samples))]
    return {"ms": round(ms, 4), "ms_range": spread, "tflops": tflops, "meter": meter.summary()}


def ours(drawn: Callable[[model.Shape], Case], shape: model.Shape, name: str) -> dict[str, Any]:
    case, form = drawn(shape), kernels.VARIANTS[name]
    run, out = run_of(model.DIM, name), torch.empty_like(case.q)
    length = torch.tensor([case.cached], dtype=torch.int32, device=device())
    s, numbers = case.scales, (case.tokens, case.heads, case.cache[0].shape[1])
    inputs = [case.q, *case.block, *case.cache, length, s.q, s.k, s.v]
    found = entry(lambda: run("aapt_attend", inputs, numbers, [out]), shape, HOW.brief(TURN_S))
    bounds = [round(model.tflops(shape, form, pessimistic), 0) for pessimistic in (True, False)]
    say(f"speed: {name}: {found['tflops']} TFLOP/s, predicted {bounds}")
    return {**found, "predicted_tflops": bounds, "waves": model.waves(shape)._asdict()}


def rival(make: Callable[[], Callable[[], object]], shape: model.Shape) -> dict[str, Any]:
    """None of them is needed: what is not installed or refuses the shape is left out."""
    try:
        return entry(make(), shape, HOW.brief(TURN_S))
    except Exception as error:
        if context_is_broken():
            raise
        return {"not_run": first_line(error)}


def beside(case: Case) -> dict[str, float]:
    """Microseconds of the two small kernels."""
    run, made = run_of(model.DIM), [x.clone() for x in case.block]
    own, s = [x[case.cached :].contiguous() for x in (case.k, case.v)], case.scales
    where = torch.tensor([37], dtype=torch.int32, device=device())
    sizes = (case.tokens, case.heads, case.cache[0].shape[1])
    calls: dict[str, Callable[[], object]] = {
        "pack": lambda: run("aapt_pack", [*own, s.k, s.k_mean, s.v], sizes[:2], made),
        "commit": lambda: run("aapt_commit", [*case.block, where], sizes, case.cache),
    }
    second = HOW.brief(0.2)
    return {n: round(1e6 * statistics.median(timed(c, second)), 1) for n, c in calls.items()}


# --- correct ---


def correct(parts: Parts) -> None:
    """What is streamed first, then the edges. Nothing of FP8 where it is known to be wrong."""
    if HOW.precision == "bf16":
        parts.run("bf16 attention", bf16_attention, PART_S)
        return
    cases = [("plain", 1196, 36_136), ("sink", 1196, 36_136), ("plain", 3600, 54_256)]
    cases += [("plain", t, s) for t in (1, 63, 64, 65, 1196, 3600) for s in (0, 1, 100, 4801)]
    cases += [(kind, 65, 4801) for kind in ("sharp", "outlier", "sink")]
    cases += [("plain", 1, 112_001), ("sink", 3600, 108_256)]
    if HOW.small:
        cases = [("plain", 65, 130), ("sink", 1, 0)]
    checked(parts, cases, (*RINGS, Ring(256, 1196, 1, 5)))
    if not HOW.small:
        parts.run("torch op", torch_op, PART_S)


def few(parts: Parts) -> None:
    """For the sanitizer, under which everything takes long."""
    checked(parts, [("plain", 65, 130)], RINGS[1:2], captured=(False,))


def checked(
    parts: Parts,
    cases: list[tuple[str, int, int]],
    rings: tuple[Ring, ...],
    captured: tuple[bool, ...] = (False, True),
) -> None:
    for dim in (128, 64):
        for kind, tokens, cached in cases:
            call = functools.partial(launches, kind, tokens, cached, dim)
            parts.run(f"D {dim}, T {tokens}, {cached} cached, {kind}", call, PART_S)
        for ring in rings[:1] if HOW.small else rings:
            for replay in (False,) if HOW.small else captured:
                call = functools.partial(streamed, ring, dim, replay)
                parts.run(f"D {dim}, {ring}, {'replayed' if replay else 'launched'}", call, PART_S)


def streamed(ring: Ring, dim: int, replay: bool) -> dict[str, Any]:
    """A stream until its ring has wrapped twice."""
    blocks = ring.sink_blocks + 2 * ring.window_blocks + 1
    stream = Stream(run_of(dim), ring, blocks, 2, dim, SEED, device())
    worst = max(stream.errors(replayed(stream) if replay else stream.launch))
    return {"largest_error": worst, "ok": worst < 0.06}


def torch_op() -> dict[str, Any]:
    """torch.ops.aapt in FP8 against the launches."""
    from aapt_deploy.ops.block_causal_attention import cuda_op

    case = Case("plain", 130, 500, 2, model.DIM, SEED, "cuda")
    s, own = case.scales, slice(case.cached, None)
    length = torch.tensor([case.cached], dtype=torch.int32, device="cuda")
    block = [x[None].contiguous() for x in (case.q, case.k[own], case.v[own])]
    out, *images = cuda_op.attend(*block, *case.cache, length, s.q, s.k, s.v, s.k_mean)
    same = torch.equal(out[0], case.attend(on_gpu(model.DIM)))
    return {"ok": same and all(torch.equal(*pair) for pair in zip(images, case.block, strict=True))}


RUNNABLE: dict[str, Callable[[Parts], None]] = {
    "machine": machine, "smoke": smoke, "products": products, "speed": speed, "correct": correct,
    "few": few, "sanitizer": sanitizer,
}  # fmt: skip


if __name__ == "__main__":
    gpu.main(RUNNABLE, Path(__file__).name)
