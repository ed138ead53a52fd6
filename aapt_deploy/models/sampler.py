"""Turn noise into a clean latent, pass by pass, on NumPy arrays or tensors.

Two kinds. "bent" steps along the flow with two-step Adams-Bashforth. "renoise" jumps to the clean
latent and back to a smaller share of noise, with noise drawn anew (consistency sampling, as the
few-step students of Self-Forcing are trained).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from aapt_deploy.profiles import Sampler

WRITE_TIME = 0.0  # of the pass that fills the cache from a clean latent
Clean = Callable[[Any, float], Any]  # (noisy, time) -> the clean latent that the generator predicts


def sample(clean: Clean, x: Any, sampler: Sampler, first: bool, rng: np.random.Generator) -> Any:
    """Turn noise x into a clean latent. `first`: the first block that is generated."""
    timesteps = sampler.first_block if first and sampler.first_block else sampler.timesteps
    if sampler.kind == "renoise":
        return renoise(clean, x, timesteps, rng)
    return denoise(clean, x, timesteps)


def denoise(clean: Clean, x: Any, timesteps: Sequence[float]) -> Any:
    """Step from noise x at timesteps[0] to time 0, with one call `clean(x, t)` per timestep.

    Arrays or tensors, any shape. `clean` is E[x at 0 | x at t] and may reuse its memory. With one
    timestep the result is `clean` itself (the one-step AAPT generator). Five timesteps here are as
    good as eleven Euler steps (docs/log.md).
    """
    last = None
    for t, t_next in pairwise((*timesteps, 0.0)):
        found = clean(x, t)
        velocity, step = (x - found) / t, t_next - t
        x = found + (x - found) * (t_next / t)  # straight on
        if last is not None:  # and curved like the path so far
            x = x + (velocity - last[0]) * (step * step / (2 * last[1]))
        last = velocity, step
    return x


def renoise(clean: Clean, x: Any, timesteps: Sequence[float], rng: np.random.Generator) -> Any:
    """Return the last of the clean latents, with x = (1 - t) clean + t noise between passes.

    `rng` draws one float32 array of x's shape after each pass but the last.
    """
    for t, t_next in pairwise((*timesteps, 0.0)):
        found = clean(x, t)
        if not t_next:
            return found
        noise = rng.standard_normal(x.shape, np.float32)
        x = np.float32(1 - t_next) * found + np.float32(t_next) * noise
    raise AssertionError(f"{timesteps=} is empty")
