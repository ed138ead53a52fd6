"""Run the autoregressive loop block by block: NumPy in, frames out."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from aapt_deploy.models.family import family_of
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.engine import Engines


class Steering(NamedTuple):
    """The controls and the prompt of one block."""

    controls: Any  # the family's; for AAPT the camera velocity
    text: np.ndarray | None  # prompt ids or embeddings; None if the generator takes no text


Steer = Callable[[int], Steering]  # block -> its steering


class Rollout:
    """One stream: its engines, noise, prompt, and the family's state from block to block.

        stream = Rollout(engines, profile, image, seed)
        stream.start()                          # uint8 [1, H, W, 3]: the start image as it decodes
        stream.step(Steering(controls, text))   # uint8 [T, H, W, 3]: the next block's frames

    A step is `latent`, then `decode`. If the decoder has its own stream, they may run in two
    threads. One generates the next latent while the other decodes this one.
    """

    def __init__(self, engines: Engines, profile: Profile, image: np.ndarray, seed: int) -> None:
        """Encode `image`, uint8 [H, W, 3]. Equal arguments and steering produce equal frames."""
        self.engines, self.profile, self.family = engines, profile, family_of(profile)
        self.block = 0
        self.text: np.ndarray | None = None  # in the cache
        engines.generator.reset()
        engines["decoder"].reset()
        self.feed = self.family.feed(profile)
        self.first = engines["encoder"].run(image=image)["latent"].copy()  # [1, C, h, w]
        self.feed.start(self.first)
        temperature, ahead = profile.sampler.temperature, not self.family.draws
        self.noise = Noise(seed, self.first.shape, temperature, ahead)

    def start(self) -> np.ndarray:
        """Decode the start image, uint8 [1, H, W, 3]. Call it once, before the first step."""
        return self.decode(self.first)[-1:]

    def step(self, steering: Steering) -> np.ndarray:
        """Generate and decode the next block: uint8 [T, H, W, 3]."""
        return self.decode(self.latent(steering))

    def latent(self, steering: Steering) -> np.ndarray:
        """Generate the next block: float32 [1, C, h, w]."""
        generator, block = self.engines.generator, self.block
        self._read(steering.text)
        fixed = self.feed.inputs(block, steering.controls)
        x = self.noise.next()

        def clean(noisy: np.ndarray, t: float) -> np.ndarray:
            time = np.array([t], np.float32)
            return generator.run(noisy=noisy, time=time, block=block, **fixed)["clean"]

        made: np.ndarray = self.family.sample(clean, x, self.profile, self.noise.rng)
        if self.family.write_time is not None:  # fill the cache by a pass over the clean latent
            made = made.copy()
            clean(made, self.family.write_time)
        generator.commit(block)
        self.feed.keep(made)
        self.block += 1
        return made

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """Decode one latent frame to uint8 [T, H, W, 3]. Decode latents in order."""
        return self.engines["decoder"].run(latent=latent)["frames"].copy()

    def _read(self, text: np.ndarray | None) -> None:
        """Replace the text in the cache if it has changed, and keep the past blocks."""
        if text is not None and (self.text is None or not np.array_equal(text, self.text)):
            self.text = text
            self.engines.generator.reset(**self.engines["prompt"].run(text=text))

    def state(self) -> dict[str, Any]:
        """Return all state that a fork needs to continue bit for bit, the engines' included.

        Raises MachineError if the engines cannot read theirs.
        """
        text = None if self.text is None else self.text.copy()
        feed = {name: array.copy() for name, array in self.feed.state().items()}
        state = {"block": self.block, "noise": self.noise.state(), "text": text}
        return state | {"feed": feed, "engines": self.engines.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from `state`. The engines must have its bundle, precision and threads."""
        self.block, self.text = state["block"], state["text"]
        self.noise.restore(state["noise"])
        self.feed.restore(state["feed"])
        self.engines.restore(state["engines"])


class Noise:
    """Gaussian noise, block by block. A thread draws the next block's while this one runs."""

    def __init__(self, seed: int, shape: tuple[int, ...], scale: float, ahead: bool) -> None:
        """Draw float32 of `shape`. `ahead` must be False if others draw from `rng` in between."""
        self.rng, self.shape, self.scale = np.random.default_rng(seed), shape, np.float32(scale)
        self.ahead, self.thread = ahead, ThreadPoolExecutor(1, "noise")
        self.coming: Future[np.ndarray] | None = None

    def next(self) -> np.ndarray:
        """Return the next block's noise, with standard deviation `scale`."""
        made = self._draw() if self.coming is None else self.coming.result()
        self.before = self.rng.bit_generator.state
        self.coming = self.thread.submit(self._draw) if self.ahead else None
        return made

    def state(self) -> dict[str, Any]:
        """Return the random state that `next` continues from."""
        return dict(self.before if self.coming else self.rng.bit_generator.state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        if self.coming:
            self.coming.result()
        self.coming, self.rng.bit_generator.state = None, state

    def _draw(self) -> np.ndarray:
        return self.scale * self.rng.standard_normal(self.shape, np.float32)


def rollout(
    engines: Engines, profile: Profile, image: np.ndarray, steer: Steer, seed: int
) -> Iterator[np.ndarray]:
    """Yield uint8 frames [T, H, W, 3]: the decoded start image (T = 1), then each block's.

    image uint8 [H, W, 3]. `steer` is called once per block, just before the block is generated.
    With `engines.overlapped`, a thread generates the next block while this one is decoded, so
    `steer` is called that much earlier.
    """
    stream = Rollout(engines, profile, image, seed)
    yield stream.start()
    made = (stream.latent(steer(block)) for block in count())
    for latent in one_ahead(made) if engines.overlapped else made:
        yield stream.decode(latent)


def one_ahead(items: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the same items, and make each in a thread while its predecessor is in use."""
    with ThreadPoolExecutor(1, "generator") as thread:
        coming = thread.submit(next, items)
        while True:
            item = coming.result()
            coming = thread.submit(next, items)
            yield item
