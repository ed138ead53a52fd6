"""An 8B generator on one Hopper GPU in PyTorch, stage by stage; a record in the folder of `--out`.

    wide         736x416, window of 30 latent frames: end to end with the decoder beside the next
                 step over 1000 steps, and one after the other
    kernels      the twenty kernels that take longest in a pass
    rivals       the same model at 736x416 in plain PyTorch: bf16, SDPA, a KV cache; and without
    hd15, hd30   1280x720 on one GPU, windows of 15 and 30
    parity       the shipped checkpoint in bf16 on the GPU against float32 on the CPU; a captured
                 pass against the same one launched
    ablations    at 736x416: one FP8 scale for all rows, bf16, no captured graph, small operations
                 unfused
    compile      torch.compile over one layer of the rival, against the same layer without

A smoke run (bench/attention.py) decides whether the generator runs in FP8 or, if that cannot be
relied on, in bf16. Each stage is a process whose parts come home one by one (stages.py). Weights
are random: speed does not depend on them. Predicted times (headline_model.py) stand beside the
measured ones. Needs torch for CUDA, triton, and cuda-bindings with NVRTC. Changes no GPU setting.
Exit code 0: all goals hold; 3: not so, the record says which; 5: no GPU that this can run on.
`--small` tries all of it on a CPU, with plain kernels and postage stamps: figures without meaning.
"""

import contextlib
import copy
import dataclasses
import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import gpu
import headline_rivals
import headline_shapes as shapes
from attention_rivals import Meter
from headline_model import predicted, share_of_floor
from stages import HOW, Parts, say

from aapt_deploy import assets
from aapt_deploy.backends.torch_cuda import engine as torch_cuda
from aapt_deploy.backends.torch_cuda.calibrate import noise_inputs
from aapt_deploy.backends.torch_eager import EagerEngines
from aapt_deploy.models import checkpoint
from aapt_deploy.models.aapt.camera import CRUISE
from aapt_deploy.models.cost import cost_of
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.loop import Steering, rollout

RESERVE_S = 15  # kept for the stages one by one when a stream is cut short


# --- streams ---


def stream(engines: Any, profile: Profile) -> Iterator[np.ndarray]:
    """Frames of an endless stream, the decoder beside the next step."""
    size = (profile.video.height, profile.video.width, 3)
    image = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    text = torch_cuda.random_text(profile, 0)
    return rollout(engines, profile, image, lambda block: Steering(CRUISE, text), 0)


def overlapped(engines: Any, profile: Profile, steps: int, left: float) -> dict[str, Any]:
    """End to end as `aapt stream` runs it, the ring full; for `left` seconds at most."""
    begin, seconds = time.perf_counter(), []
    frames = stream(engines, profile)
    for _ in range(1 + profile.window.sink_frames + profile.window.frames):
        next(frames)
    held = shapes.allocated()
    with Meter() as meter:
        for step in range(steps):
            before = time.perf_counter()
            next(frames)
            seconds.append(time.perf_counter() - before)
            if time.perf_counter() - begin > left and step >= 9:
                break
            if step % 200 == 199:
                mean = 1000 * np.mean(seconds[-200:])
                say(f"{profile.name}: {step + 1} of {steps} steps, {mean:.2f} ms")
    frames.close()  # type: ignore[attr-defined]
    tenths = np.array_split(np.array(seconds), min(10, len(seconds)))
    parts = [float(np.median(part)) for part in tenths]
    return {
        "steps": len(seconds), "asked": steps, "ms": shapes.percentiles(seconds),
        "clocks": meter.summary(),
        "fps": round(profile.video.temporal_stride * len(seconds) / sum(seconds), 1),
        "allocated_bytes_more": shapes.allocated() - held,
        "median_ms_by_tenth": [round(1000 * p, 3) for p in parts],
        "last_tenth_over_first": round(parts[-1] / parts[0], 4),
    }  # fmt: skip


def one_by_one(engines: Any, profile: Profile, steps: int) -> dict[str, Any]:
    """The stages of a step, each waited for."""
    generator, decoder = engines["generator"], engines["decoder"]
    block = profile.window.sink_frames + 2 * profile.window.frames
    numbers = [noise(profile, i) for i in range(4)]
    names = ("generator", "commit", "decoder", "hand-off", "serial step")
    spent: dict[str, list[float]] = {name: [] for name in names}
    for step in range(steps):
        marks = [time.perf_counter()]
        latent = generator.run(**numbers[step % 4], block=block + step)["clean"]
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
    return {name: shapes.percentiles(seconds) for name, seconds in spent.items()}


def noise(profile: Profile, seed: int) -> dict[str, np.ndarray]:
    """What a generator is given beside its block."""
    made = noise_inputs(profile, seed, torch.device("cpu"))
    return {name: x.numpy() for name, x in made.items() if name not in ("cache_len", "slot")}


def streamed(parts: Parts, profile: Profile, steps: int, serial: int) -> None:
    before = time.perf_counter()
    engines = torch_cuda.random_engines(profile, shapes.precision(), 0, shapes.device())
    shapes.synchronise()
    opened = {
        "profile": profile.name, "window": profile.window.frames, "precision": shapes.precision(),
        "opened_s": round(time.perf_counter() - before, 1),
        "predicted_ms": predicted(profile, shapes.precision()),
    }  # fmt: skip
    parts.note("opened", opened)
    left = parts.left() - RESERVE_S
    parts.run("overlapped", lambda: overlapped(engines, profile, steps, left))
    stages = parts.run("stages", lambda: one_by_one(engines, profile, serial))
    if stages:
        times = {name: stages[name]["p50"] for name in ("generator", "decoder")}
        parts.run("attained", lambda: share_of_floor(cost_of(profile), times))
    if not HOW.small:
        reserved = round(torch.cuda.max_memory_reserved() / 1e9, 2)
        now = round(shapes.allocated() / 1e9, 2)
        parts.note("memory_gb", {"allocated": now, "most_reserved": reserved})


def wide(parts: Parts) -> None:
    streamed(parts, shapes.wide_shape(), 8 if HOW.small else 1000, 4 if HOW.small else 100)


def hd(window: int, parts: Parts) -> None:
    profile = shapes.shape("aapt-8b-1280x720-h100", window)
    streamed(parts, profile, 4 if HOW.small else 100, 2 if HOW.small else 20)


# --- parity ---


def parity(parts: Parts) -> None:
    parts.run("captured", captured_is_launched)
    parts.run("psnr_db_by_block", psnr_by_block)


def psnr_by_block() -> list[float]:
    """The demo checkpoint streamed from the same noise on both; bf16 on the GPU."""
    held = checkpoint.load(assets.CHECKPOINT, assets.checkpoint_sha256())
    profile, blocks = held.profile, 2 if HOW.small else 30
    kind = "fp32" if HOW.small else "bf16"
    networks = [copy.deepcopy(part).to(shapes.device()) for part in (held.generator, held.vae)]
    options = torch_cuda.Options.of(kind, shapes.device())
    ours = torch_cuda.GpuEngines(*networks, None, options)
    pair = ours, EagerEngines(held, torch.get_num_threads(), "fp32")
    image = next(iter(held.start_frames.values())).image.numpy()
    text = np.zeros((1, profile.text.tokens), np.int64)
    steer = lambda block: Steering(CRUISE, text)
    streams = [rollout(engines, profile, image, steer, 0) for engines in pair]
    psnr = []
    for _ in range(1 + blocks):
        mine, true = (next(s).astype(np.float64) for s in streams)
        psnr.append(
            round(float(10 * np.log10(255**2 / max(np.square(mine - true).mean(), 1e-3))), 2)
        )
    return psnr


def captured_is_launched() -> bool:
    """Whether a replayed pass says to the bit what its kernels say when they are launched."""
    said = []
    profile = shapes.wide_shape()
    profile = profile.replace(model=dataclasses.replace(profile.model, depth=3))
    for launched in (False, True):
        with shapes.uncaptured() if launched else contextlib.nullcontext():
            engines: Any = torch_cuda.random_engines(
                profile, shapes.precision(), 0, shapes.device(), decoder=False
            )  # fmt: skip
        generator, text = engines["generator"], torch_cuda.random_text(profile, 0)
        generator.reset(**engines["prompt"].run(text=text))
        outputs = []
        for block in range(6):
            outputs.append(generator.run(**noise(profile, block), block=block)["clean"].copy())
            generator.commit(block)
        said.append(np.stack(outputs))
    return bool(np.array_equal(*said))


# --- kernels ---


def kernels(parts: Parts) -> None:
    parts.run("kernels", longest_kernels)


def longest_kernels() -> list[dict[str, Any]]:
    from torch.profiler import ProfilerActivity, profile

    profile_ = shapes.wide_shape()
    how = (shapes.precision(), 0, shapes.device())
    engines = torch_cuda.random_engines(profile_, *how, decoder=False)
    shapes.passes(engines, profile_, 3)
    activity = ProfilerActivity.CPU if HOW.small else ProfilerActivity.CUDA
    with profile(activities=[activity]) as seen:
        shapes.passes(engines, profile_, 3)
    taken = lambda e: e.self_cpu_time_total if HOW.small else e.self_device_time_total
    events = sorted(seen.key_averages(), key=taken, reverse=True)
    whole = sum(map(taken, events))
    return [
        {
            "name": event.key[:120],
            "ms_a_pass": round(taken(event) / 3000, 4),
            "calls_a_pass": event.count / 3,
            "share": round(taken(event) / whole, 4),
        }
        for event in events[:20]
    ]


RUNNABLE = {
    "wide": wide, "kernels": kernels, "hd15": functools.partial(hd, 15),
    "hd30": functools.partial(hd, 30), "parity": parity, "rivals": headline_rivals.rivals,
    "ablations": headline_rivals.ablations, "compile": headline_rivals.compiled,
}  # fmt: skip


if __name__ == "__main__":
    gpu.main(RUNNABLE, Path(__file__).name)
