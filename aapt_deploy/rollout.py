"""The autoregressive loop: one latent frame per block, for ever. NumPy in, frames out; it knows engines and nothing else."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise
from typing import Any, NamedTuple

import numpy as np

from aapt_deploy.camera import Pose, Velocity, condition_map
from aapt_deploy.engine import OVERLAPPED, Engines
from aapt_deploy.profiles import Profile
from aapt_deploy.rope import temporal_rope


class Steering(NamedTuple):
    """What holds during one block."""

    velocity: Velocity
    text: np.ndarray | None  # prompt ids or embeddings; None where the generator takes no text


Steer = Callable[[int], Steering]  # block -> what holds during it


def rollout(engines: Engines, profile: Profile, image: np.ndarray, steer: Steer, seed: int) -> Iterator[np.ndarray]:
    """Yield uint8 frames [T, H, W, 3]: first the start image as it decodes (T = 1), then T = 4 frames per block, without end.

    image uint8 [H, W, 3]. `steer` is asked once per block, just before the block is generated. The same arguments give the same frames. Where the
    decoder has a stream of its own, the next block is generated, in a thread, while this one is decoded; it is steered that much earlier.
    """
    decoder = engines["decoder"]
    engines["generator"].reset()
    decoder.reset()
    made = latents(engines, profile, image, steer, seed)
    yield decoder.run(latent=next(made))["frames"][-1:].copy()
    for latent in one_ahead(made) if engines.backend in OVERLAPPED else made:
        yield decoder.run(latent=latent)["frames"].copy()


def latents(engines: Engines, profile: Profile, image: np.ndarray, steer: Steer, seed: int) -> Iterator[np.ndarray]:
    """Yield float32 latents [1, C, h, w]: the start image's, then one per block, without end. The generator's state must be empty."""
    generator = engines["generator"]
    rng, pose, text = np.random.default_rng(seed), Pose(), None
    seconds = profile.video.temporal_stride / profile.video.fps
    previous = engines["encoder"].run(image=image)["latent"].copy()  # [1, C, h, w]
    shape, temperature = previous.shape, np.float32(profile.sampler.temperature)
    drawn = one_ahead(temperature * rng.standard_normal(shape, np.float32) for _ in count())
    yield previous
    for block in count():
        velocity, wanted = steer(block)
        if wanted is not None and (text is None or not np.array_equal(wanted, text)):
            text = wanted
            generator.reset(**engines["prompt"].run(text=text))  # replaces the text in the cache, keeps the past
        before, pose = pose, pose.moved(velocity, seconds)
        fixed = {"previous": previous, "condition": condition_map(profile, before, pose), "rope_time": temporal_rope(profile, block)[None]}
        x = next(drawn)  # that of the block behind is drawn while this one runs

        def clean(noisy: np.ndarray, t: float) -> np.ndarray:
            return generator.run(noisy=noisy, time=np.array([t], np.float32), block=block, **fixed)["clean"]  # noqa: B023

        previous = denoise(clean, x, profile.sampler.timesteps)
        generator.commit(block)
        yield previous


def one_ahead(items: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same items, each being made, in a thread, while its predecessor is in use."""
    with ThreadPoolExecutor(1, "one-ahead") as thread:
        coming = thread.submit(next, items)
        while True:
            item = coming.result()
            coming = thread.submit(next, items)
            yield item


def denoise(clean: Callable[[Any, float], Any], x: Any, timesteps: Sequence[float]) -> Any:
    """From noise x at timesteps[0] to time 0: two-step Adams-Bashforth along the flow, one call `clean(x, t)` per timestep.

    Arrays or tensors, any shape; `clean` is E[x at 0 | x at t] and may reuse its memory. With one timestep the result is `clean` itself (the
    one-step AAPT generator). Five timesteps here are as good as eleven Euler steps (docs/log.md).
    """
    last = None
    for t, t_next in pairwise((*timesteps, 0.0)):
        found = clean(x, t)
        velocity, step = (x - found) / t, t_next - t
        x = found + (x - found) * (t_next / t)  # straight on
        if last is not None:
            x = x + (velocity - last[0]) * (step * step / (2 * last[1]))  # and bent like the path so far
        last = velocity, step
    return x
