"""The FP8 attention kernels on a Hopper GPU, as one command. Writes docs/measurements/attention-<gpu>-<date>.json in less than nine minutes.

    products   wgmma alone: register maps, descriptors and swizzles against exact products; the accumulator's width and rounding; the rate with
               float32 and with float16 accumulators; whether 90 KB of static shared memory launches without being asked for
    correct    every kernel against its bytes and against float64 attention, T in {1, 63, 64, 65, 1196, 3600}, caches from empty to 112 000 tokens;
               twice the same to the bit; every ring case as a stream, launched and replayed from one captured graph
    sanitizer  NVIDIA's memcheck and racecheck over small shapes, where compute-sanitizer is installed and knows the GPU
    speed      two shapes with random data, each kernel for two seconds and more, twice in turn; clocks and power are logged. Beside it whatever else
               runs here: PyTorch's flash and cuDNN attention and this project's Triton kernel in bf16; FlashAttention-3, SageAttention and cuDNN in
               FP8 where they are installed

Every stage is a process with a time limit, because a wrong kernel may hang or take the CUDA context with it; the record is written after each of
them. Needs torch for CUDA, triton, and cuda-bindings with NVRTC (`pip install 'aapt_deploy[cuda]'`). Changes none of the GPU's settings.
Exit code 0: everything that ran was right, and the speed goals are met; 3: not so, the record says what.
"""

import argparse
import datetime
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from attention_rivals import Meter, rivals, timed  # noqa: E402

from aapt_deploy.machine import machine  # noqa: E402
from aapt_deploy.ops.block_causal_attention import Ring, kernels  # noqa: E402
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import tiles  # noqa: E402
from tests.support.attention_checks import RINGS, Case, Run, Stream, on_gpu, replayed  # noqa: E402

STAGES = {"products": 80, "correct": 170, "sanitizer": 110, "speed": 200}  # seconds at most
BUDGET_S = 530
BIG_RING = ("AAPT_RING_K=6", "AAPT_RING_V=5")  # 90 KB of static shared memory at D = 128
SHAPES = {"736x416, 30 frames": (1196, 37_332 - 1196), "1280x720, 15 frames": (3600, 57_856 - 3600)}  # T, tokens in the cache
HEADS, DIM = 24, 128
SECONDS = 2.0
GOAL_TFLOPS, GOAL_RATIO = 650, 1.5
SEED = 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- products ---


@functools.cache
def probes() -> dict[str, Callable[..., None]]:
    """The kernels of attention_probes.cu, each called with a grid, a block size and its arguments (tensors and int32)."""
    import ctypes

    from cuda.bindings import driver, nvrtc

    torch.zeros(1, device="cuda")
    source = kernels.source_file().read_bytes() + (ROOT / "bench" / "attention_probes.cu").read_bytes()
    cubin = kernels._compile(nvrtc, source, DIM, (), kernels._version(nvrtc)).cubin
    status, library = driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0)
    assert status == driver.CUresult.CUDA_SUCCESS, status

    def launcher(name: str) -> Callable[..., None]:
        function = driver.cuKernelGetFunction(driver.cuLibraryGetKernel(library, name.encode())[1])[1]

        def launch(grid: int, block: int, *arguments: torch.Tensor | int) -> None:
            values = [ctypes.c_int32(a) if isinstance(a, int) else ctypes.c_uint64(a.data_ptr()) for a in arguments]
            pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
            stream = torch.cuda.current_stream().cuda_stream
            (status,) = driver.cuLaunchKernel(function, grid, 1, 1, block, 1, 1, 0, stream, ctypes.addressof(pointers), 0)
            assert status == driver.CUresult.CUDA_SUCCESS, status

        return launch

    return {name: launcher(name) for name in ("probe_scores_64", "probe_scores_128", "probe_values_128", "probe_rate_f32", "probe_rate_f16")}


def multiply(probe: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [64, K] . b [N, K] by one `multiply` of the kernels, float32."""
    c = torch.full((64, len(b)), float("nan"), device="cuda")
    probes()[probe](1, 128, *(x.to(torch.float8_e4m3fn).view(torch.uint8).contiguous() for x in (a, b)), c)
    return c


def accumulator() -> dict[str, Any]:
    """What is kept of a small summand beside 2^16: row r of A adds 2^(8 - r), times `factor`, to 256 x 256."""
    kept: dict[str, Any] = {}
    exponents = [8 - r for r in range(15)]  # 2^8 .. 2^-6, all normal e4m3 numbers
    for step, column in (("same step of 32", 1), ("the step after", 32)):
        for factor in (1.0, 1.75, -1.0, -1.75):
            a, b = torch.zeros(64, 64, device="cuda"), torch.zeros(64, 64, device="cuda")
            a[:, 0], b[:, 0], b[:, column] = 256, 256, 1
            for row, exponent in enumerate(exponents):
                a[row, column] = factor * 2.0**exponent
            gained = (multiply("probe_scores_64", a, b)[:15, 0] - 65536).tolist()
            kept[f"{step}, {factor} x 2^e"] = {e: g / (factor * 2.0**e) for e, g in zip(exponents, gained, strict=True)}
    a, b = torch.zeros(64, 64, device="cuda"), torch.zeros(64, 64, device="cuda")
    a[:, 0], b[:, 0], b[:, 1:32] = 256, 256, 1
    for row, exponent in enumerate(exponents):
        a[row, 1:32] = 2.0**exponent
    kept["31 alike in the same step"] = {
        e: g / (31 * 2.0**e) for e, g in zip(exponents, (multiply("probe_scores_64", a, b)[:15, 0] - 65536).tolist(), strict=True)
    }
    whole = [e for e, share in kept["same step of 32, 1.0 x 2^e"].items() if share == 1.0]
    return {"bits_behind_the_largest_summand": 16 - min(whole) if whole else 0, "share_kept_beside_2^16": kept}


def rate(name: str) -> float:
    """TFLOP/s of m64n128k32 alone."""
    data = (torch.randint(256, (16384,), dtype=torch.uint8, device="cuda") & 0x8F) | 0x30  # +-0.5 .. 1.9
    out = torch.zeros(256, dtype=torch.int32, device="cuda")
    blocks, turns = 2 * torch.cuda.get_device_properties(0).multi_processor_count, 10_000
    run = lambda: probes()[name](blocks, 256, data, turns, out)
    seconds = statistics.median(timed(run, 1.0))
    return blocks * 2 * turns * 4 * (2 * 64 * 128 * 32) / seconds / 1e12


def products() -> dict[str, Any]:
    found: dict[str, Any] = {}
    generator = torch.Generator("cuda").manual_seed(SEED)
    for probe, (n, k) in {"probe_scores_64": (64, 64), "probe_scores_128": (64, 128), "probe_values_128": (128, 64)}.items():
        a, b = (torch.randint(-3, 4, (rows, k), generator=generator, device="cuda").float() for rows in (64, n))  # small integers: sums are exact
        found[probe] = {"exact": torch.equal(multiply(probe, a, b), a @ b.T)}
        say(f"products: {probe} {found[probe]}")
    found["accumulator"] = accumulator()
    found["tflops"] = {name: round(rate(name), 1) for name in ("probe_rate_f32", "probe_rate_f16")}
    say(f"products: accumulator keeps {found['accumulator']['bits_behind_the_largest_summand']} bits; {found['tflops']}")
    small = Case("plain", 200, 1000, 2, DIM, SEED, "cuda")
    plain = small.attend(on_gpu(DIM))
    try:
        big = small.attend(on_gpu(DIM, BIG_RING))
        found["static_shared_90_kb"] = {"launches": True, "same_result": torch.equal(plain, big)}
    except Exception as error:
        found["static_shared_90_kb"] = {"launches": False, "why": str(error)}
    say(f"products: 90 KB static: {found['static_shared_90_kb']}")
    found["ok"] = all(part["exact"] for name, part in found.items() if name.startswith("probe_"))
    return found


# --- correct ---


def launches(run: Run, dim: int, tokens: int, cached: int, kind: str) -> dict[str, Any]:
    case = Case(kind, tokens, cached, 2, dim, SEED + tokens + cached, "cuda")
    result: dict[str, Any] = {"T": tokens, "cached": cached, "D": dim, "data": kind, **case.check(run)}
    result["pack"] = all(torch.equal(a, b) for a, b in zip(case.pack(run), case.block, strict=True))
    capacity = case.cache[0].shape[1] * 64
    result["commit"] = all(case.commit(run, slot) for slot in {0, 1, capacity - tokens, max(0, capacity - tokens) // 2, capacity - tokens + 1, -1})
    result["ok"] = bool(result["ok"] and result["pack"] and result["commit"])
    return result


def correct(short: bool = False) -> dict[str, Any]:
    """`short`: a few shapes, for the sanitizer."""
    found: dict[str, Any] = {"launches": [], "streams": [], "ok": True}
    cases = [(t, s, "plain") for t in (1, 63, 64, 65, 1196, 3600) for s in (0, 1, 100, 4801)]
    cases += [(t, s, kind) for kind in ("sharp", "outlier", "sink") for t, s in ((65, 4801), (1196, 36_136))]
    cases += [(1, 112_001, "plain"), (1196, 36_136, "plain"), (3600, 54_256, "plain"), (3600, 108_256, "sink")]
    for dim in (128, 64):
        run = on_gpu(dim)
        for tokens, cached, kind in [(65, 130, "plain")] if short else cases:
            result = launches(run, dim, tokens, cached, kind)
            found["launches"].append(result)
            found["ok"] &= result["ok"]
            say(f"correct: {result}")
        for ring in RINGS[1:2] if short else (*RINGS, Ring(256, 1196, 1, 5)):
            blocks = ring.sink_frames + 2 * ring.window_frames + 1
            for captured in (False,) if short else (False, True):
                stream = Stream(run, ring, blocks, 2, dim, SEED, "cuda")
                errors = stream.errors(replayed(stream) if captured else stream.launch)
                ok = max(errors) < 0.06
                found["streams"].append({"ring": str(ring), "D": dim, "captured": captured, "largest_error": max(errors), "ok": ok})
                found["ok"] &= ok
        say(f"correct: {found['streams'][-1]}")
    if not short:
        found["torch_op"] = torch_op()
        found["ok"] &= found["torch_op"]["ok"]
    torch.cuda.synchronize()
    return found


def torch_op() -> dict[str, Any]:
    """torch.ops.aapt, FP8 and bf16, against the same case."""
    from aapt_deploy.ops.block_causal_attention import cuda_op, torch_op, triton_op  # noqa: F401  (registers the bf16 form)

    case = Case("plain", 130, 500, 2, DIM, SEED, "cuda")
    s, own = case.scales, slice(case.cached, None)
    length = torch.tensor([case.cached], dtype=torch.int32, device="cuda")
    block = [x[None].contiguous() for x in (case.q, case.k[own], case.v[own])]
    out, *images = cuda_op.attend(*block, *case.cache, length, s.q, s.k, s.v, s.k_mean)
    same = torch.equal(out[0], case.attend(on_gpu(DIM))) and all(torch.equal(a, b) for a, b in zip(images, case.block, strict=True))
    past = [torch.cat([x[: case.cached], x[:70]])[None].contiguous() for x in (case.k, case.v)]  # 70 tokens more than are valid
    wide, _, _ = torch_op.operator(*block, *past, length)
    error = float((wide[0][case.rows].double() - case.exact).square().mean().sqrt() / case.exact.square().mean().sqrt())
    return {"fp8_same_as_launch": same, "triton_bf16_error": error, "ok": same and error < 0.01}


# --- sanitizer ---


def sanitizer() -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not tool:
        return {"ran": False, "why": "compute-sanitizer is not installed"}
    found: dict[str, Any] = {"ran": True, "ok": True}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "77", "--kernel-regex", "kns=aapt_", sys.executable, __file__, "--stage", "small"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=50, check=False, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            )
            text, code = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired:
            text, code = "took longer than 50 s", -1
        known = "not supported" not in text and "Unable to" not in text
        told = [line for line in text.splitlines() if line.startswith("=========")]
        found[check] = {"exit_code": code, "device_known": known, "said": told[:40] or text[-800:]}
        if code == 77 and known:
            found["ok"] = False
        say(f"sanitizer: {check} {code} {told[-1:] or text[-200:]}")
    return found


# --- speed ---


def ours(case: Case) -> dict[str, Callable[[], Callable[[], object]]]:
    """This project's kernels; the big ring where the machine launches it."""

    def attend(defines: tuple[str, ...]) -> Callable[[], object]:
        run, out = on_gpu(DIM, defines), torch.empty_like(case.q)
        s, length = case.scales, torch.tensor([case.cached], dtype=torch.int32, device="cuda")
        inputs = [case.q, *case.block, *case.cache, length, s.q, s.k, s.v]
        numbers = (case.tokens, case.heads, case.cache[0].shape[1])
        return lambda: run("aapt_attend", inputs, numbers, [out])

    return {"ours FP8": lambda: attend(()), "ours FP8, 90 KB ring": lambda: attend(BIG_RING)}


def beside(case: Case) -> dict[str, float]:
    """Microseconds of the two small kernels."""
    run, made = on_gpu(DIM), [x.clone() for x in case.block]
    own = [x[case.cached :].contiguous() for x in (case.k, case.v)]
    where, s = torch.tensor([37], dtype=torch.int32, device="cuda"), case.scales
    pack = lambda: run("aapt_pack", [*own, s.k, s.k_mean, s.v], (case.tokens, case.heads), made)
    commit = lambda: run("aapt_commit", [*case.block, where], (case.tokens, case.heads, case.cache[0].shape[1]), case.cache)
    return {name: round(1e6 * statistics.median(timed(call, 0.2)), 1) for name, call in (("pack", pack), ("commit", commit))}


def speed() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for title, (tokens, cached) in SHAPES.items():
        case = Case("plain", tokens, cached, HEADS, DIM, SEED, "cuda")
        flops = 4 * tokens * (tokens + cached) * HEADS * DIM
        entries: dict[str, Any] = {}
        calls: dict[str, Callable[[], object]] = {}
        for name, make in {**ours(case), **rivals(case.q, case.k, case.v, cached)}.items():
            try:
                calls[name] = make()
                calls[name]()
                torch.cuda.synchronize()
                entries[name] = {"ms": [], "meter": []}
            except Exception as error:
                calls.pop(name, None)
                entries[name] = {"not_run": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
                say(f"speed: {name}: {entries[name]}")
        for _ in range(2):
            for name, call in calls.items():
                with Meter() as meter:
                    samples = timed(call, SECONDS)
                entries[name]["ms"] += [round(1000 * s, 4) for s in samples]
                entries[name]["meter"].append(meter.summary())
        for name in calls:
            entry = entries[name]
            entry["median_ms"] = statistics.median(entry["ms"])
            entry["tflops"] = round(flops / entry["median_ms"] / 1e9, 1)
            say(f"speed: {title}: {name}: {entry['median_ms']:.3f} ms, {entry['tflops']} TFLOP/s, {entry['meter'][-1]}")
        best = max((entries[name]["tflops"] for name in calls if "bf16" in name), default=0.0)
        mine = max((entries[name]["tflops"] for name in calls if name.startswith("ours")), default=0.0)
        found[title] = {
            "T": tokens, "cached": cached, "heads": HEADS, "D": DIM, "flop": flops, "entries": entries, "us_beside": beside(case),
            "ours_tflops": mine, "ratio_to_best_bf16": round(mine / best, 3) if best else None,
            "goal_met": mine >= GOAL_TFLOPS and best > 0 and mine >= GOAL_RATIO * best,
        }  # fmt: skip
        assert tiles(tokens) == case.block[0].shape[1]
    found["ok"] = all(shape["goal_met"] for shape in found.values())
    return found


# --- the record ---


def versions() -> dict[str, Any]:
    """Of everything that takes part; in a process of its own, like each stage."""
    from importlib import metadata

    properties = torch.cuda.get_device_properties(0)
    names = ("torch", "triton", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cudnn-cu13", "nvidia-cudnn-frontend", "flash-attn-3", "sageattention")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    start = time.perf_counter()
    code = {dim: kernels.compiled(dim) for dim in (128, 64)}
    return {
        "gpu": properties.name, "multiprocessors": properties.multi_processor_count, "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda_of_torch": torch.version.cuda, "packages": found, "compile_s": round(time.perf_counter() - start, 2),
        "nvrtc": code[128].nvrtc, "driver": driver(),
        "assembler": {dim: [line for line in c.report.splitlines() if "Used" in line] for dim, c in code.items()},
        "source_sha256": kernels.source_hash(), "ok": True,
    }  # fmt: skip


def driver() -> str:
    done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def revision() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stdout.strip() or "unknown"


def staged(stage: str, seconds: float) -> dict[str, Any]:
    """The result of one stage in a process of its own."""
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, __file__, "--stage", stage], stdout=subprocess.PIPE, text=True) as process:
        try:
            printed, _ = process.communicate(timeout=seconds)
            result: dict[str, Any] = json.loads(printed.strip().splitlines()[-1]) if not process.returncode else {"error": "ended with an error"}
        except subprocess.TimeoutExpired:
            process.kill()
            result = {"error": f"took longer than {seconds:.0f} s"}
    return {**result, "exit_code": process.returncode, "seconds": round(time.perf_counter() - start, 1)}


RUNNABLE: dict[str, Callable[[], dict[str, Any]]] = {
    "versions": versions, "products": products, "correct": correct, "small": functools.partial(correct, True), "sanitizer": sanitizer, "speed": speed,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--stage", choices=RUNNABLE, help="run one stage here and print its result")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="stages to run")
    parser.add_argument("--out", type=Path, default=None, help="record to write")
    options = parser.parse_args()
    if options.stage:
        print(json.dumps(RUNNABLE[options.stage]()))
        return
    begin, today = time.perf_counter(), datetime.date.today().isoformat()
    record: dict[str, Any] = {
        "what": "FP8 block-causal attention kernels on a Hopper GPU", "date": today, "git": revision(), "seed": SEED, "machine": machine(),
        "gpu": staged("versions", 60),
    }  # fmt: skip
    if "error" in record["gpu"]:
        raise SystemExit("error: no GPU that this can run on; see above\nhint: python bench/attention.py needs a Hopper GPU (H100, H200)")
    name = record["gpu"]["gpu"].replace("NVIDIA ", "").replace(" ", "-").lower()
    out = options.out or ROOT / "docs" / "measurements" / f"attention-{name}-{today}.json"
    for stage in options.only:
        left = BUDGET_S - (time.perf_counter() - begin)
        record[stage] = staged(stage, min(STAGES[stage], left)) if left > 15 else {"error": "no time left"}
        out.write_text(json.dumps(record, indent=1) + "\n")
        say(f"{stage}: {'ok' if record[stage].get('ok') else record[stage].get('error') or record[stage].get('why') or 'NOT ok'}")
    say(f"record: {out}")
    raise SystemExit(0 if all(record[stage].get("ok") or record[stage].get("ran") is False for stage in options.only) else 3)


if __name__ == "__main__":
    main()
