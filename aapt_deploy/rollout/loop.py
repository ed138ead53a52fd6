"""The autoregressive loop: one block after the other, for ever. NumPy in, frames out; it knows engines and a family."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from aapt_deploy.models.family import family_of
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.engine import Engines


class Steering(NamedTuple):
    """What holds during one block."""

    controls: Any  # what the family is steered by: AAPT's camera velocity
    text: np.ndarray | None  # prompt ids or embeddings; None if the generator takes no text


Steer = Callable[[int], Steering]  # block -> what holds during it


class Rollout:
    """One stream: engines of its own, noise, prompt, and what the family carries from block to block.

        stream = Rollout(engines, profile, image, seed)
        stream.start()                     # uint8 [1, H, W, 3]: the start image as it decodes
        stream.step(Steering(controls, text))   # uint8 [T, H, W, 3]: the next block's frames

    A step has two halves, `latent` and `decode`. They may run in two threads, if the decoder has
    a stream of its own: the next latent is then made while this one is decoded.
    """

    def __init__(self, engines: Engines, profile: Profile, image: np.ndarray, seed: int) -> None:
        """image uint8 [H, W, 3]. The same arguments and steering give the same frames."""
        self.engines, self.profile, self.family = engines, profile, family_of(profile)
        self.block = 0
        self.text: np.ndarray | None = None  # in the cache
        engines.generator.reset()
        engines["decoder"].reset()
        self.feed = self.family.feed(profile)
        self.first = engines["encoder"].run(image=image)["latent"].copy()  # [1, C, h, w]
        self.feed.start(self.first)
        self.noise = Noise(seed, self.first.shape, profile.sampler.temperature, ahead=not self.family.draws)

    def start(self) -> np.ndarray:
        """The start image as it decodes, uint8 [1, H, W, 3]. Call it once, before the first step."""
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
            return generator.run(noisy=noisy, time=np.array([t], np.float32), block=block, **fixed)["clean"]

        made: np.ndarray = self.family.sample(clean, x, self.profile, self.noise.rng)
        if self.family.write_time is not None:  # the cache holds what a pass over the clean latent leaves
            made = made.copy()
            clean(made, self.family.write_time)
        generator.commit(block)
        self.feed.keep(made)
        self.block += 1
        return made

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """One latent frame -> uint8 [T, H, W, 3]. Latents are decoded in order."""
        return self.engines["decoder"].run(latent=latent)["frames"].copy()

    def _read(self, text: np.ndarray | None) -> None:
        """Replace the text in the cache if it is another one; the past stays."""
        if text is not None and (self.text is None or not np.array_equal(text, self.text)):
            self.text = text
            self.engines.generator.reset(**self.engines["prompt"].run(text=text))

    def state(self) -> dict[str, Any]:
        """Everything a fork needs to continue to the bit: what is carried here, and the engines' own state.

        Raises MachineError if the engines cannot hand it out.
        """
        return {
            "block": self.block, "noise": self.noise.state(), "text": None if self.text is None else self.text.copy(),
            "feed": {name: array.copy() for name, array in self.feed.state().items()}, "engines": self.engines.state(),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, with engines of the same bundle, precision and threads."""
        self.block, self.text = state["block"], state["text"]
        self.noise.restore(state["noise"])
        self.feed.restore(state["feed"])
        self.engines.restore(state["engines"])


class Noise:
    """Gaussian noise, block by block. The next block's is drawn in a thread while this one runs."""

    def __init__(self, seed: int, shape: tuple[int, ...], scale: float, ahead: bool) -> None:
        """`ahead` must be False if somebody else draws from `rng` in between."""
        self.rng, self.shape, self.scale, self.ahead = np.random.default_rng(seed), shape, np.float32(scale), ahead
        self.thread = ThreadPoolExecutor(1, "noise")
        self.coming: Future[np.ndarray] | None = None

    def next(self) -> np.ndarray:
        """float32 of the given shape and standard deviation."""
        made = self._draw() if self.coming is None else self.coming.result()
        self.before = self.rng.bit_generator.state
        self.coming = self.thread.submit(self._draw) if self.ahead else None
        return made

    def state(self) -> dict[str, Any]:
        """The random state from which the noise is drawn that `next` will return."""
        return dict(self.before if self.coming else self.rng.bit_generator.state)

    def restore(self, state: Mapping[str, Any]) -> None:
        if self.coming:
            self.coming.result()
        self.coming, self.rng.bit_generator.state = None, state

    def _draw(self) -> np.ndarray:
        return self.scale * self.rng.standard_normal(self.shape, np.float32)


def rollout(engines: Engines, profile: Profile, image: np.ndarray, steer: Steer, seed: int) -> Iterator[np.ndarray]:
    """Yield uint8 frames [T, H, W, 3]: first the start image as it decodes (T = 1), then each block's, without end.

    image uint8 [H, W, 3]. `steer` is asked once per block, just before the block is generated.
    With `engines.overlapped` the next block is generated, in a thread, while this one is decoded;
    it is steered that much earlier.
    """
    stream = Rollout(engines, profile, image, seed)
    yield stream.start()
    made = (stream.latent(steer(block)) for block in count())
    for latent in one_ahead(made) if engines.overlapped else made:
        yield stream.decode(latent)


def one_ahead(items: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same items, each being made, in a thread, while its predecessor is in use."""
    with ThreadPoolExecutor(1, "generator") as thread:
        coming = thread.submit(next, items)
        while True:
            item = coming.result()
            coming = thread.submit(next, items)
            yield item
