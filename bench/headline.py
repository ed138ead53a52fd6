"""An 8B generator on one Hopper GPU in PyTorch, as one command. Writes docs/measurements/headline-<gpu>-<date>.json in less than ten minutes.

    parity       the shipped checkpoint in bf16 on the GPU against float32 on the CPU; a captured pass against the same one launched
    wide         736x416, window of 30 latent frames, fp8: end to end with the decoder beside the next step over 2000 steps, and one after the other
    hd15, hd30   1280x720 on one GPU, windows of 15 and 30
    rivals       the same model at 736x416 in plain PyTorch: bf16, SDPA and a KV cache; the same compiled; and without a cache
    ablations    at 736x416: one FP8 scale for all rows, bf16, no captured graph, small operations unfused
    kernels      the twenty kernels that take longest in a pass

Every stage is a process with a time limit; the record is written after each of them. Weights are random: speed does not depend on them. Predicted
times (`headline_model.py`) stand beside the measured ones. Needs torch for CUDA, triton, and cuda-bindings with NVRTC. Changes no GPU setting.
Exit code 0: all goals hold; 3: not so, the record and stderr say which; 5: no GPU that this can run on. `--small` tries all of it on a CPU, with
plain kernels and postage stamps: figures without meaning.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from attention_rivals import Meter  # noqa: E402
from headline_model import goals, predicted, share_of_floor  # noqa: E402

from aapt_deploy import assets  # noqa: E402
from aapt_deploy.backends.torch_cuda import engine  # noqa: E402
from aapt_deploy.backends.torch_cuda import lane as torch_lane  # noqa: E402
from aapt_deploy.backends.torch_cuda.calibrate import noise_inputs  # noqa: E402
from aapt_deploy.backends.torch_cuda.kernels import Kernels, plain  # noqa: E402
from aapt_deploy.backends.torch_cuda.step import Step, Tokens, wide_layers  # noqa: E402
from aapt_deploy.backends.torch_eager import EagerEngines  # noqa: E402
from aapt_deploy.measure.machine import machine  # noqa: E402
from aapt_deploy.models import checkpoint  # noqa: E402
from aapt_deploy.models.aapt.camera import CRUISE  # noqa: E402
from aapt_deploy.models.cost import cost_of  # noqa: E402
from aapt_deploy.profiles import Profile, load  # noqa: E402
from aapt_deploy.rollout.loop import Steering, rollout  # noqa: E402

STAGES = {"parity": 60, "wide": 230, "hd15": 60, "hd30": 80, "rivals": 90, "ablations": 110, "kernels": 40}  # seconds at most
BUDGET_S = 560
SMALL = False  # set by --small


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def device() -> torch.device:
    return torch.device("cpu" if SMALL else "cuda")


def shape(name: str, window: int) -> Profile:
    """A preset with another window; with --small, three layers of postage stamps."""
    profile = load("tiny-cpu" if SMALL else name)
    if SMALL:
        profile = profile.replace(model=dataclasses.replace(profile.model, dim=128, depth=3))  # heads of 64
    return profile.replace(
        window=dataclasses.replace(profile.window, frames=3 if SMALL else window), sampler=dataclasses.replace(profile.sampler, timesteps=(1.0,))
    )


def wide_shape() -> Profile:
    return shape("aapt-8b-736x416-h100", 30)


def synchronise() -> None:
    if not SMALL:
        torch.cuda.synchronize()


def allocated() -> int:
    return 0 if SMALL else torch.cuda.memory_allocated()


def percentiles(seconds: list[float]) -> dict[str, float]:
    ms = 1000 * np.array(seconds)
    return {name: round(float(np.percentile(ms, q)), 3) for name, q in (("p50", 50), ("p95", 95), ("p99", 99), ("max", 100))}


def timed(call: Callable[[], object], runs: int) -> list[float]:
    """Seconds of each run, after two that do not count."""
    found = []
    for run in range(runs + 2):
        synchronise()
        before = time.perf_counter()
        call()
        synchronise()
        found += [time.perf_counter() - before] if run >= 2 else []
    return found


# --- streams ---


def stream(engines: Any, profile: Profile) -> Iterator[np.ndarray]:
    """Frames of an endless stream, the decoder beside the next step."""
    image = np.random.default_rng(0).integers(0, 256, (profile.video.height, profile.video.width, 3), np.uint8)
    text = engine.random_text(profile, 0)
    return rollout(engines, profile, image, lambda block: Steering(CRUISE, text), 0)


def overlapped(engines: Any, profile: Profile, steps: int, limit_s: float) -> dict[str, Any]:
    """End to end as `aapt stream` runs it, the ring full; fewer steps where they would take longer than `limit_s`."""
    frames, seconds = stream(engines, profile), []
    for _ in range(1 + profile.window.sink_frames + profile.window.frames):
        next(frames)
    held = allocated()
    with Meter() as meter:
        for step in range(steps):
            before = time.perf_counter()
            next(frames)
            seconds.append(time.perf_counter() - before)
            if sum(seconds) > limit_s and step >= 9:
                break
            if step % 200 == 199:
                say(f"{profile.name}: {step + 1} of {steps} steps, {1000 * np.mean(seconds[-200:]):.2f} ms")
    frames.close()  # type: ignore[attr-defined]
    parts = [float(np.median(part)) for part in np.array_split(np.array(seconds), min(10, len(seconds)))]
    return {
        "steps": len(seconds), "asked": steps, "ms": percentiles(seconds), "clocks": meter.summary(),
        "fps": round(profile.video.temporal_stride * len(seconds) / sum(seconds), 1),
        "allocated_bytes_more": allocated() - held, "median_ms_by_tenth": [round(1000 * p, 3) for p in parts],
        "last_tenth_over_first": round(parts[-1] / parts[0], 4),
    }  # fmt: skip


def one_by_one(engines: Any, profile: Profile, steps: int) -> dict[str, Any]:
    """The stages of a step, each waited for. The engines' stream has filled the ring."""
    generator, decoder, block = engines["generator"], engines["decoder"], profile.window.sink_frames + 2 * profile.window.frames
    numbers = [{name: x.numpy() for name, x in noise_inputs(profile, i, torch.device("cpu")).items()} for i in range(4)]
    spent: dict[str, list[float]] = {"generator": [], "commit": [], "decoder": [], "hand-off": [], "serial step": []}
    for step in range(steps):
        inputs = {name: x for name, x in numbers[step % 4].items() if name not in ("cache_len", "slot")}
        marks = [time.perf_counter()]
        latent = generator.run(**inputs, block=block + step)["clean"]
        marks.append(time.perf_counter())
        generator.commit(block + step)
        marks.append(time.perf_counter())
        frames = decoder.run(latent=latent)["frames"]
        marks.append(time.perf_counter())
        frames.copy()
        marks.append(time.perf_counter())
        for name, seconds in zip(spent, np.diff(marks), strict=False):
            spent[name].append(float(seconds))
        spent["serial step"].append(marks[-1] - marks[0])
    return {name: percentiles(seconds) for name, seconds in spent.items()}


def streamed(profile: Profile, precision: str, steps: int, limit_s: float, serial: int) -> dict[str, Any]:
    before = time.perf_counter()
    engines = engine.random_engines(profile, precision, 0, device())
    synchronise()
    found: dict[str, Any] = {
        "profile": profile.name,
        "window": profile.window.frames,
        "precision": precision,
        "opened_s": round(time.perf_counter() - before, 1),
    }
    found["overlapped"], found["stages"] = overlapped(engines, profile, steps, limit_s), one_by_one(engines, profile, serial)
    if not SMALL:
        found["memory_gb"] = {"allocated": round(allocated() / 1e9, 2), "most_reserved": round(torch.cuda.max_memory_reserved() / 1e9, 2)}
    found["predicted_ms"] = predicted(profile, precision)
    found["attained"] = share_of_floor(cost_of(profile), {name: found["stages"][name]["p50"] for name in ("generator", "decoder")})
    return found


def wide() -> dict[str, Any]:
    return streamed(wide_shape(), "fp8", 8 if SMALL else 2000, 150, 4 if SMALL else 100)


def hd(window: int) -> dict[str, Any]:
    return streamed(shape("aapt-8b-1280x720-h100", window), "fp8", 4 if SMALL else 100, 30, 2 if SMALL else 20)


# --- parity ---


def parity() -> dict[str, Any]:
    """The demo checkpoint streamed from the same noise on both; bf16 on the GPU."""
    held = checkpoint.load(assets.CHECKPOINT, assets.checkpoint_sha256())
    profile, blocks = held.profile, 2 if SMALL else 30
    precision = "fp32" if SMALL else "bf16"
    networks = copy.deepcopy(held.generator).to(device()), copy.deepcopy(held.vae).to(device())
    pair = engine.GpuEngines(*networks, None, engine.Options.of(precision, device())), EagerEngines(held, torch.get_num_threads(), "fp32")
    image = next(iter(held.start_frames.values())).image.numpy()
    text = np.zeros((1, profile.text.tokens), np.int64)
    streams = [rollout(engines, profile, image, lambda block: Steering(CRUISE, text), 0) for engines in pair]
    psnr = []
    for _ in range(1 + blocks):
        mine, true = (next(s).astype(np.float64) for s in streams)
        psnr.append(round(float(10 * np.log10(255**2 / max(np.square(mine - true).mean(), 1e-3))), 2))
    return {"psnr_db_by_block": psnr, "captured": captured_is_launched()}


def captured_is_launched() -> bool:
    """Whether a pass says the same to the bit when its graph is replayed as when its kernels are launched."""
    said = []
    for launched in (False, True):
        with uncaptured() if launched else contextlib.nullcontext():
            engines = engine.random_engines(wide_shape().replace(model=dataclasses.replace(wide_shape().model, depth=3)), "fp8", 0, device())
        profile = engines["generator"].profile  # type: ignore[union-attr]
        engines["generator"].reset(**engines["prompt"].run(text=engine.random_text(profile, 0)))  # type: ignore[arg-type]
        outputs = []
        for block in range(6):
            inputs = {n: x.numpy() for n, x in noise_inputs(profile, block, torch.device("cpu")).items() if n not in ("cache_len", "slot")}
            outputs.append(engines["generator"].run(**inputs, block=block)["clean"].copy())
            engines["generator"].commit(block)
        said.append(np.stack(outputs))
    return bool(np.array_equal(*said))


# --- rivals and ablations ---


@contextlib.contextmanager
def uncaptured() -> Iterator[None]:
    """Lanes launch what they would have captured."""
    true = torch_lane.Lane.prepare

    def prepare(lane: torch_lane.Lane, call: Callable[[], object]) -> Callable[[], object]:
        lane.settle()
        with lane.mine():
            for _ in range(torch_lane.WARM_UPS):
                call()
        return call

    torch_lane.Lane.prepare = prepare  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch_lane.Lane.prepare = true  # type: ignore[method-assign]


def by_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, cache_len: torch.Tensor) -> torch.Tensor:
    """PyTorch's own attention over a full cache, [1, F, H, D]."""
    keys, values = (torch.cat([cache[:, : cache.shape[1] - k.shape[1]], new], dim=1).transpose(1, 2) for cache, new in ((k_cache, k), (v_cache, v)))
    return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values).transpose(1, 2).contiguous()


def rivals() -> dict[str, Any]:
    """Milliseconds of one generator pass in plain PyTorch, the ring full."""
    profile, kind = wide_shape(), torch.float32 if SMALL else torch.bfloat16
    generator, _ = engine.random_networks(profile, kind, 0, device())
    engine.settle(generator, kind)
    kernels = dataclasses.replace(plain(), attend_tokens=by_sdpa)
    step = Step(generator, wide_layers(generator, kind), Tokens(profile, kernels, kind, device()), kernels, kind)
    inputs, runs = noise_inputs(profile, 0, device()), 3 if SMALL else 20
    found: dict[str, Any] = {}

    def note(name: str, call: Callable[[], object], count: int) -> None:
        try:
            with torch.no_grad(), Meter() as meter:
                found[name] = {"ms": percentiles(timed(call, count)), "clocks": meter.summary()}
        except Exception as error:
            found[name] = {"not_run": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        say(f"rivals: {name}: {found[name]}")

    note("bf16, SDPA, KV cache", lambda: step(inputs), runs)
    note("without a KV cache", lambda: recomputed(step, kernels, profile, kind), 1 if SMALL else 3)
    if not SMALL:
        compiled = torch.compile(step.__call__, dynamic=False)
        note("the same, torch.compile", lambda: compiled(inputs), runs)
    return found


def recomputed(step: Step, kernels: Kernels, profile: Profile, kind: torch.dtype) -> None:
    """Every block of sink, window and present goes through all layers again, each attending to all before it."""
    frames = profile.window.sink_frames + profile.window.frames + 1
    x = torch.randn(frames * profile.frame_tokens, profile.model.dim, dtype=kind, device=device())
    rope = torch.randn(2, len(x), profile.head_dim // 2, device=device())
    for tables, layer in zip(step.tables, step.layers, strict=True):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = tables
        q, k, v = kernels.heads(layer.linears["qkv"](kernels.modulated(x, shift, scale, 1e-6, None)), layer.norm_q, layer.norm_k, rope, 1e-6)
        seen = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True).transpose(1, 2).reshape(len(x), -1)
        x, y = kernels.gated(x, layer.linears["out"](seen), gate, shift_mlp, scale_mlp, 1e-6, None)
        x = x + (1 + gate_mlp).to(kind) * layer.linears["w2"](kernels.activated(layer.linears["w1"](y), None))


def ablations() -> dict[str, Any]:
    profile, found, runs = wide_shape(), {}, 3 if SMALL else 40
    own = engine.Options.of("fp8", device()).kernels
    plain_ones = {name: getattr(plain(), name) for name in ("modulated", "gated", "heads", "activated", "quantised")}
    variants: dict[str, tuple[str, bool, Kernels, bool]] = {
        "as it is": ("fp8", True, own, False),
        "one FP8 scale for all rows": ("fp8", False, own, False),
        "small operations unfused": ("fp8", True, dataclasses.replace(own, **plain_ones), False),
        "no captured graph": ("fp8", True, own, True),
        "bf16": ("fp32" if SMALL else "bf16", True, own, False),
    }
    for name, (precision, by_row, kernels, launched) in variants.items():
        options = engine.Options(precision, kernels, by_row)
        with uncaptured() if launched else contextlib.nullcontext():
            generator, vae = engine.random_networks(profile, engine.PRECISIONS[precision], 0, device())
            scales = engine.noise_scales(generator, options, 0) if precision == "fp8" else None
            engines = engine.GpuEngines(generator, vae, scales, options)
        found[name] = one_by_one(engines, profile, runs)["generator"]
        say(f"ablations: {name}: {found[name]}")
        engines.close()
        del generator, vae, engines
        if not SMALL:
            torch.cuda.empty_cache()
    return {"generator_ms": found, "predicted_ms": {name: predicted(profile, "fp8", name)["generator"] for name in variants}}


def longest_kernels() -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    shape_ = wide_shape()
    engines = engine.random_engines(shape_, "fp8", 0, device())
    one_by_one(engines, shape_, 3)
    with profile(activities=[ProfilerActivity.CPU if SMALL else ProfilerActivity.CUDA]) as seen:
        one_by_one(engines, shape_, 3)
    taken = lambda event: event.self_cpu_time_total if SMALL else event.self_device_time_total
    events = sorted(seen.key_averages(), key=taken, reverse=True)
    whole = sum(map(taken, events))
    row = lambda e: {"name": e.key[:120], "ms_a_step": round(taken(e) / 3000, 4), "calls_a_step": e.count / 3, "share": round(taken(e) / whole, 4)}
    return {"kernels": [row(event) for event in events[:20]]}


# --- the record ---


def staged(stage: str, seconds: float) -> dict[str, Any]:
    """The result of one stage in a process of its own; what it said last where it failed."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--stage", stage, *(["--small"] if SMALL else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            printed, told = process.communicate(timeout=seconds)
            result: dict[str, Any] = json.loads(printed.strip().splitlines()[-1]) if not process.returncode else {"error": told[-1500:]}
        except subprocess.TimeoutExpired:
            process.kill()
            result = {"error": f"took longer than {seconds:.0f} s: {process.communicate()[1][-500:]}"}
    return {**result, "exit_code": process.returncode, "seconds": round(time.perf_counter() - start, 1)}


RUNNABLE: dict[str, Callable[[], dict[str, Any]]] = {
    "parity": parity, "wide": wide, "hd15": lambda: hd(15), "hd30": lambda: hd(30), "rivals": rivals, "ablations": ablations,
    "kernels": longest_kernels,
}  # fmt: skip


def gpu() -> str:
    """Its name. Ends the program where there is none that fits."""
    if SMALL:
        return "small"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        say("error: PyTorch finds no Hopper GPU\nhint: run bench/headline.py where an H100 or H200 is; --small tries its code on a CPU")
        raise SystemExit(5)
    return torch.cuda.get_device_properties(0).name


def main() -> None:
    global SMALL
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--stage", choices=RUNNABLE, help="run one stage here and print its result")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="stages to run")
    parser.add_argument("--small", action="store_true", help="postage stamps on a CPU: only whether it runs")
    parser.add_argument("--out", type=Path, default=None, help="record to write")
    options = parser.parse_args()
    SMALL = options.small
    name = gpu()
    if options.stage:
        print(json.dumps(RUNNABLE[options.stage]()))
        return
    begin, today = time.perf_counter(), datetime.date.today().isoformat()
    out = options.out or ROOT / "docs" / "measurements" / f"headline-{name.replace('NVIDIA ', '').replace(' ', '-').lower()}-{today}.json"
    record: dict[str, Any] = {
        "what": "8B block-causal generator in PyTorch on one GPU, random weights", "date": today, "gpu": name, "machine": machine(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda}, "seed": 0,
    }  # fmt: skip
    for stage in options.only:
        left = BUDGET_S - (time.perf_counter() - begin)
        record[stage] = staged(stage, min(STAGES[stage], left)) if left > 15 else {"error": "no time left"}
        say(f"{stage}: {record[stage].get('error') or 'done'} ({record[stage].get('seconds')} s)")
        record["goals"] = goals(record)
        out.write_text(json.dumps(record, indent=1) + "\n")
    for goal, held in record["goals"].items():
        say(f"{'yes' if held else 'NO '}  {goal}")
    say(f"record: {out}")
    failed = [stage for stage in options.only if "error" in record[stage]]
    print(json.dumps({"gpu": name, "goals": record["goals"], "failed": failed, "record": str(out)}))
    raise SystemExit(0 if record["goals"] and all(record["goals"].values()) and not failed else 3)


if __name__ == "__main__":
    main()
