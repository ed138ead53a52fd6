"""What bench/headline.py holds its engine against: plain PyTorch, and itself with less."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from attention_rivals import Meter
from headline_model import predicted
from headline_shapes import device, passes, percentiles, precision, timed, uncaptured, wide_shape
from stages import HOW, Parts
from torch import Tensor

from aapt_deploy.backends.torch_cuda import engine as torch_cuda
from aapt_deploy.backends.torch_cuda.calibrate import noise_inputs
from aapt_deploy.backends.torch_cuda.kernels import Kernels, plain
from aapt_deploy.backends.torch_cuda.step import Step, Tokens, wide_layers
from aapt_deploy.profiles import Profile

FUSED = ("modulated", "gated", "heads", "activated", "quantised")


def kind() -> torch.dtype:
    return torch.float32 if HOW.small else torch.bfloat16


def by_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_len: Tensor,
) -> Tensor:
    """PyTorch's own attention over a full cache, [1, F, H, D].

    The block is written in place, into the room behind the cache: nothing else is copied.
    """
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache[:, cache.shape[1] - new.shape[1] :].copy_(new)
    heads_first = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2).contiguous()


def plain_step(profile: Profile) -> tuple[Step, Kernels]:
    """A generator in plain PyTorch with a KV cache."""
    generator, _ = torch_cuda.random_networks(profile, kind(), 0, device())
    torch_cuda.settle(generator, kind())
    kernels = dataclasses.replace(plain(), attend_tokens=by_sdpa)
    cache = Tokens(profile, kernels, kind(), device())
    return Step(generator, wide_layers(generator, kind()), cache, kernels, kind()), kernels


def clocked(call: Callable[[], object], count: int) -> dict[str, Any]:
    """Milliseconds of `count` calls, by percentile."""
    with torch.no_grad(), Meter() as meter:
        return {"ms": percentiles(timed(call, count)), "clocks": meter.summary()}


def rivals(parts: Parts) -> None:
    """One generator pass in plain PyTorch, the ring full; and all blocks anew without a cache."""
    profile = wide_shape()
    step, kernels = plain_step(profile)
    inputs, runs = noise_inputs(profile, 0, device()), 3 if HOW.small else 20
    parts.run("bf16, SDPA, KV cache", lambda: clocked(lambda: step(inputs), runs))
    again = lambda: recomputed(step, kernels, profile)
    parts.run("without a KV cache", lambda: clocked(again, 1 if HOW.small else 3))


def compiled(parts: Parts) -> None:
    """The same over one layer, and by torch.compile, which takes minutes for all of them."""
    profile = wide_shape()
    profile = profile.replace(model=dataclasses.replace(profile.model, depth=1))
    step, _ = plain_step(profile)
    inputs, runs = noise_inputs(profile, 0, device()), 3 if HOW.small else 20
    parts.run("one layer", lambda: clocked(lambda: step(inputs), runs))
    if not HOW.small:
        made = torch.compile(step.__call__, dynamic=False)
        parts.run("one layer, torch.compile", lambda: clocked(lambda: made(inputs), runs))


def recomputed(step: Step, kernels: Kernels, profile: Profile) -> None:
    """All blocks of sink, window and present through all layers, each attending to those before."""
    frames, eps = profile.window.sink_frames + profile.window.frames + 1, 1e-6
    x = torch.randn(frames * profile.frame_tokens, profile.model.dim, dtype=kind(), device=device())
    rope = torch.randn(2, len(x), profile.head_dim // 2, device=device())
    for tables, layer in zip(step.tables, step.layers, strict=True):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = tables
        y = layer.linears["qkv"](kernels.modulated(x, shift, scale, eps, None))
        q, k, v = kernels.heads(y, layer.norm_q, layer.norm_k, rope, eps)
        heads_first = (z.transpose(1, 2) for z in (q, k, v))
        seen = F.scaled_dot_product_attention(*heads_first, is_causal=True)
        out = layer.linears["out"](seen.transpose(1, 2).reshape(len(x), -1))
        x, y = kernels.gated(x, out, gate, shift_mlp, scale_mlp, eps, None)
        mlp = layer.linears["w2"](kernels.activated(layer.linears["w1"](y), None))
        x = x + (1 + gate_mlp).to(kind()) * mlp


def ablations(parts: Parts) -> None:
    """A generator pass with one choice undone at a time, beside what the model expects."""
    own = torch_cuda.Options.of(precision(), device()).kernels
    unfused = dataclasses.replace(own, **{name: getattr(plain(), name) for name in FUSED})
    wide = "fp32" if HOW.small else "bf16"
    variants: dict[str, tuple[str, bool, Kernels, bool]] = {
        "as it is": (precision(), True, own, False),
        "bf16": (wide, True, own, False),
        "small operations unfused": (precision(), True, unfused, False),
        "no captured graph": (precision(), True, own, True),
        "one FP8 scale for all rows": (precision(), False, own, False),
    }
    for name, how in variants.items():
        parts.run(name, functools.partial(ablated, name, *how))
        if not HOW.small:
            torch.cuda.empty_cache()


def ablated(name: str, kind: str, by_row: bool, kernels: Kernels, launched: bool) -> dict[str, Any]:
    profile, options = wide_shape(), torch_cuda.Options(kind, kernels, by_row)
    with uncaptured() if launched else contextlib.nullcontext():
        dtype = torch_cuda.PRECISIONS[kind]
        generator, vae = torch_cuda.random_networks(profile, dtype, 0, device())
        scales = torch_cuda.noise_scales(generator, options, 0) if kind == "fp8" else None
        engines = torch_cuda.GpuEngines(generator, vae, scales, options, decoder=False)
    seconds = passes(engines, profile, 3 if HOW.small else 40)[1:]
    engines.close()
    expected = predicted(profile, precision(), name)["generator"]
    return {"generator_ms": percentiles(seconds), "predicted_ms": expected}
