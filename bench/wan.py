"""One pass of the Wan family on a CPU: our engines, the plain formula, and FlashDreams, in one run.

    python bench/wan.py FOLDER OUT.json [--depth 2] [--runs 3] [--threads 2]

Layers of the real width (1536, 12 heads), 832x480, three latent frames a block, six in the cache.
All get the same random weights and inputs, and their velocities are compared. FOLDER gets weights,
graphs, and FlashDreams in an environment of its own; pip fetches it if it is not there. The record
is OUT.json. Read ratios: one run has one machine and one load.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aapt_deploy import __version__, profiles
from aapt_deploy.backends.ort.engine import OrtGenerator, Threads, open_session
from aapt_deploy.backends.ort.lower import lower_in_place
from aapt_deploy.bundle.graph_file import load_model, save_model
from aapt_deploy.export import export
from aapt_deploy.measure.machine import machine
from aapt_deploy.models import checkpoint
from aapt_deploy.models.family import family_of
from aapt_deploy.models.wan import generator as wan_generator
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.profiles import Profile

RIVAL = (
    "flashdreams==0.1.0", "einops", "loguru", "tyro", "docstring-parser", "typeguard", "ftfy",
    "wcwidth", "boto3", "botocore", "jmespath", "s3transfer",
)  # fmt: skip
BLOCKS = 3  # two are cached, the third is measured
T = 937.5


def profile_of(depth: int) -> Profile:
    base = profiles.load("self-forcing-832x480-h100")
    target = profiles.Target("cpu", "any CPU")
    window = dataclasses.replace(base.window, frames=(BLOCKS - 1) * base.video.block_frames)
    model = dataclasses.replace(base.model, depth=depth)
    precision = profiles.Precision("fp32", "fp32", "fp32")
    return base.replace(model=model, window=window, target=target, precision=precision)


def write_inputs(folder: Path, profile: Profile) -> dict[str, Tensor]:
    """Write random weights under their published names, and inputs."""
    rng, video = torch.Generator().manual_seed(0), profile.video
    networks = family_of(profile).networks()
    generator, _ = networks.build(profile)
    part, weights = networks.parts(profile)[0], dict[str, Tensor]()
    for ours, source in part.sources.items():
        for name in source.theirs:
            shape = source.shape(tuple(generator.state_dict()[ours].shape))
            scale = 0.1 if len(shape) < 2 else 1 / math.sqrt(math.prod(shape[1:]))
            norm = "norm" in name and name.endswith("weight")
            drawn = torch.randn(shape, generator=rng) * scale
            weights[name] = (1 + drawn if norm else drawn).bfloat16().float()
    save_file(weights, folder / "weights.safetensors")
    size = video.latent_channels, profile.latent_height, profile.latent_width
    given = {
        "noisy": torch.randn(BLOCKS, video.block_frames, *size, generator=rng),
        "text": torch.randn(1, profile.text.tokens, profile.text.dim, generator=rng),
    }
    save_file(given, folder / "inputs.safetensors")
    shape = {
        "depth": profile.model.depth, "block_frames": video.block_frames, "t": T,
        "window": BLOCKS * video.block_frames, "height": size[1], "width": size[2],
    }  # fmt: skip
    (folder / "shape.json").write_text(json.dumps(shape))
    made = (s.make(*(weights[n] for n in s.theirs)) for s in part.sources.values())
    generator.load_state_dict(dict(zip(part.sources, made, strict=True)))
    checkpoint.save(
        folder / "c.safetensors", profile, generator, networks.build(profile)[1], {}, {}
    )
    return given


def timed(run: Callable[[], Any], runs: int) -> tuple[list[float], Any]:
    """Return the seconds of `runs` calls after a first one, and the last result."""
    times, result = [], run()
    for _ in range(runs):
        start = time.perf_counter()
        result = run()
        times.append(round(time.perf_counter() - start, 3))
    return times, result


def attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_len: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator as anybody would write it: concatenate, and PyTorch's own attention."""
    n = int(cache_len)
    pairs = (q, torch.cat([k_cache[:, :n], k], 1), torch.cat([v_cache[:, :n], v], 1))
    heads = (x.transpose(1, 2) for x in pairs)
    attended: Tensor = torch.nn.functional.scaled_dot_product_attention(*heads)
    return attended.transpose(1, 2), k, v


def plain(
    folder: Path, profile: Profile, given: dict[str, Tensor], dtype: torch.dtype, runs: int
) -> tuple[list[float], Tensor]:
    """The family's formula in eager PyTorch, all of it in `dtype`."""
    generator = checkpoint.load(folder / "c.safetensors").generator.to(dtype)
    family, ring = family_of(profile), Ring.of(profile)
    feed = family.feed(profile)
    shape = (1, ring.tokens, profile.model.heads, profile.head_dim)
    caches = [
        (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in generator.blocks
    ]
    with torch.inference_mode(), patch.object(wan_generator, "block_causal_attention", attention):
        text = list(zip(*generator.prompt(given["text"].to(dtype)), strict=True))
        times, flow = list[float](), torch.empty(0)
        for block, noisy in enumerate(given["noisy"]):
            place = ring.place(block)
            inputs = [
                noisy.to(dtype),
                torch.from_numpy(family.times(T / 1000)["time_features"]).to(dtype),
                torch.from_numpy(feed.inputs(block, None)["rope_time"]).to(dtype),
                torch.tensor([place.cache_len], dtype=torch.int32),
            ]
            run = lambda inputs=inputs: generator.velocity(*inputs, caches, text)
            times, (flow, keys, values) = timed(run, runs if block == BLOCKS - 1 else 0)
            at = slice(place.slot, place.slot + profile.block_tokens)
            if block < BLOCKS - 1:
                for (k, v), key, value in zip(caches, keys, values, strict=True):
                    k[:, at], v[:, at] = key, value
    return times, flow.float()


def ours(
    folder: Path, profile: Profile, given: dict[str, Tensor], runs: int, threads: int
) -> tuple[list[float], Tensor]:
    """ONNX Runtime in place, fp32, through export and lowering."""
    stored, family = checkpoint.stored(folder / "c.safetensors"), family_of(profile)
    graphs = {}
    for name in ("prompt", "generator"):
        module, path = export.hollow_graphs(profile, None)[name], folder / f"{name}.onnx"
        model = export.to_onnx(module, family.signatures(profile)[name], profile)
        export._write(model, path, module, export.Weights(stored, None))
        graphs[name] = path
    lowered = lower_in_place(load_model(graphs["generator"]), Ring.of(profile, in_place=True))
    save_model(lowered, folder / "lowered.onnx")
    prompt = open_session(graphs["prompt"], Threads(threads, False))
    names = [output.name for output in prompt.get_outputs()]
    text = dict(zip(names, prompt.run(None, {"text": given["text"].numpy()}), strict=True))
    generator = OrtGenerator(
        open_session(folder / "lowered.onnx", Threads(threads, False)), profile
    )
    generator.reset(**text)
    feed, times, flow = family.feed(profile), list[float](), np.empty(0)
    for block, noisy in enumerate(given["noisy"].numpy()):
        inputs = family.times(T / 1000) | feed.inputs(block, None)
        run = lambda noisy=noisy, block=block, inputs=inputs: generator.run(
            noisy=noisy, block=block, **inputs
        )
        times, result = timed(run, runs if block == BLOCKS - 1 else 0)
        generator.commit(block)
        flow = (noisy - result["clean"]) / (T / 1000)
    return times, torch.from_numpy(flow)


def rival(folder: Path, dtype: str, runs: int, threads: int) -> tuple[list[float], Tensor]:
    """FlashDreams in a process with packages of its own."""
    place = folder / "rival"
    if not (place / "flashdreams").is_dir():
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place]
        subprocess.run([*install, *RIVAL], check=True)
    script = Path(__file__).with_name("wan_rival.py")
    command = [sys.executable, script, folder, dtype, str(runs), str(threads)]
    environment = os.environ | {"PYTHONPATH": str(place)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["times_s"], load_file(folder / f"rival-{dtype}.safetensors")["flow"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    o = parser.parse_args()
    o.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(o.threads)
    profile = profile_of(o.depth)
    given = write_inputs(o.folder, profile)
    runs = {
        "plain PyTorch, fp32": lambda: plain(o.folder, profile, given, torch.float32, o.runs),
        "plain PyTorch, bf16": lambda: plain(o.folder, profile, given, torch.bfloat16, o.runs),
        "FlashDreams, fp32": lambda: rival(o.folder, "float32", o.runs, o.threads),
        "FlashDreams, bf16": lambda: rival(o.folder, "bfloat16", o.runs, o.threads),
        "ours, ONNX Runtime fp32": lambda: ours(o.folder, profile, given, o.runs, o.threads),
    }
    rows, reference = [], None
    for name, run in runs.items():
        times, flow = run()
        reference = flow if reference is None else reference
        error = float(((flow - reference).square().mean() / reference.square().mean()).sqrt())
        rows.append({"what": name, "best_s": min(times), "times_s": times, "error": error})
        assert error < (1e-4 if "fp32" in name else 2e-2), f"{name} differs by {error:.1e}"
        print(f"{name:26s} {min(times):8.2f} s a pass, {error:.1e} from the first", flush=True)
    record = {
        "what": (__doc__ or "").splitlines()[0], "version": __version__, "depth": o.depth,
        "tokens": profile.block_tokens, "cached": profile.cache_tokens, "rows": rows,
        "replaced": "on a CPU, FlashDreams' cuDNN attention and Triton rotation by PyTorch's",
        "machine": machine(),
    }  # fmt: skip
    o.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
