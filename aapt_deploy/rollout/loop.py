"""Run the autoregressive loop block by block: NumPy in, frames out."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from aapt_deploy.errors import MachineError
from aapt_deploy.models.family import family_of
from aapt_deploy.models.sampler import WRITE_TIME, sample
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.engine import Engines, Turning


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

    If the family caches the start latent as block 0, nothing precedes the first step. It returns
    the start image, or a generated block whose first latent frame decodes to one frame.
    """

    def __init__(
        self, engines: Engines, profile: Profile, image: np.ndarray | None, seed: int
    ) -> None:
        """Encode `image`, uint8 [H, W, 3]. Equal arguments and steering produce equal frames."""
        self.engines, self.profile, self.family = engines, profile, family_of(profile)
        self.block = self.decoded = 0  # the next block; latent frames that were decoded
        self.place = 0  # the next block's index in the cache: `block`, but after a replay
        self.past = list[np.ndarray]()  # latents of the blocks in the cache, if they are replayed
        self.text: np.ndarray | None = None  # in the cache
        engines.generator.reset()
        engines["decoder"].reset()
        self.feed = self.family.feed(profile)
        self.first: np.ndarray | None = None  # [1, C, h, w]
        if image is not None:
            self.first = engines["encoder"].run(image=image)["latent"].copy()
            self.feed.start(self.first)
        video, sampler = profile.video, profile.sampler
        size = profile.latent_height, profile.latent_width
        shape = (video.block_frames, video.latent_channels, *size)
        self.noise = Noise(seed, shape, sampler.temperature, ahead=not sampler.draws)

    def start(self) -> np.ndarray:
        """Decode the start image, uint8 [1, H, W, 3]. Call it once, before the first step."""
        assert self.first is not None, "the family needs a start image"
        return self.decode(self.first)

    def step(self, steering: Steering) -> np.ndarray:
        """Generate and decode the next block: uint8 [T, H, W, 3]."""
        return self.decode(self.latent(steering))

    def latent(self, steering: Steering) -> np.ndarray:
        """Generate the next block: float32 [n, C, h, w], n latent frames."""
        generator, block, sampler = self.engines.generator, self.block, self.profile.sampler
        self._read(steering)
        fixed, place = self.feed.inputs(block, steering.controls), self.place
        self._turn_sink(block)

        def clean(noisy: np.ndarray, t: float) -> np.ndarray:
            return generator.run(noisy=noisy, block=place, **self.family.times(t), **fixed)["clean"]

        given = self.first if self.family.start_is_block else None
        if given is not None and not block:
            made = given
        else:
            first = block == (0 if given is None else 1)
            made = sample(clean, self.noise.next(), sampler, first, self.noise.rng)
        if sampler.write:  # fill the cache by a pass over the clean latent
            made = made.copy()
            clean(made, WRITE_TIME)
        generator.commit(place)
        self.feed.keep(made)
        self.block, self.place = block + 1, place + 1
        self._remember(made)
        return made

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Decode latent frames [n, C, h, w] to uint8 [T, H, W, 3]. Decode them in order.

        Each has T = 4 frames, except the first of a stream, whose last frame is the first one.
        """
        run, frames = self.engines["decoder"].run, []
        for latent in latents[:, None]:
            shown = run(latent=latent)["frames"]
            frames.append((shown if self.decoded else shown[-1:]).copy())
            self.decoded += 1
        return frames[0] if len(frames) == 1 else np.concatenate(frames)

    def _turn_sink(self, block: int) -> None:
        """Move the sink along by the latent frames that have left the window before `block`."""
        window, n = self.profile.window, self.profile.video.block_frames
        moved = block * n - window.frames - window.sink_frames
        if not window.sink_follows or moved <= 0:
            return
        generator = self.engines.generator
        if not isinstance(generator, Turning):
            wrong = f"backend {self.engines.backend} does not support window.sink_follows"
            raise MachineError(wrong, "set it to false in the profile, or use onnxruntime")
        generator.turn(self.family.temporal_turn(self.profile, moved))

    def _read(self, steering: Steering) -> None:
        """Replace the text in the cache if it has changed, and keep the past blocks.

        With text.replay, the blocks in sight pass through the generator once more, in their order.
        """
        text, generator = steering.text, self.engines.generator
        if text is None or (self.text is not None and np.array_equal(text, self.text)):
            return
        self.text = text
        if self.past:
            generator.reset()
        generator.reset(**self.engines["prompt"].run(text=text))
        if self.past:
            seen = Ring.of(self.profile).visible(self.block)[:-1]
            for place, (block, latent) in enumerate(zip(seen, self.past, strict=True)):
                inputs = self.feed.inputs(block, steering.controls) | self.family.times(WRITE_TIME)
                generator.run(noisy=latent, block=place, **inputs)
                generator.commit(place)
            self.place = len(seen)

    def _remember(self, latent: np.ndarray) -> None:
        """Keep the latents of the blocks that the next block sees."""
        if self.profile.text.replay:
            sink, ring = Ring.of(self.profile).sink_blocks, Ring.of(self.profile).window_blocks
            past = [*self.past, latent.copy()]
            self.past = past if len(past) <= sink + ring else past[:sink] + past[sink + 1 :]

    def state(self) -> dict[str, Any]:
        """Return all state that a fork needs to continue bit for bit, the engines' included.

        Raises MachineError if the engines cannot read theirs.
        """
        text = None if self.text is None else self.text.copy()
        feed = {name: array.copy() for name, array in self.feed.state().items()}
        state: dict[str, Any] = {"block": self.block, "decoded": self.decoded, "text": text}
        state |= {"noise": self.noise.state(), "first": self.first}
        state |= {"place": self.place, "past": list(self.past)}
        return state | {"feed": feed, "engines": self.engines.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from `state`. The engines must have its bundle, precision and threads."""
        self.block, self.decoded = state["block"], state["decoded"]
        self.text, self.first = state["text"], state["first"]
        self.place, self.past = state["place"], list(state["past"])
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
    engines: Engines, profile: Profile, image: np.ndarray | None, steer: Steer, seed: int
) -> Iterator[np.ndarray]:
    """Yield uint8 frames [T, H, W, 3]: the start, then each block's.

    image uint8 [H, W, 3], or None for families that start from noise. The start is the decoded
    image (T = 1); from noise it is the first block, with the one frame of a first latent frame in
    front. `steer` is called once per block, just before the block is generated. With
    `engines.overlapped`, a thread generates the next block while this one is decoded, so `steer` is
    called that much earlier.
    """
    stream = Rollout(engines, profile, image, seed)
    yield stream.step(steer(0)) if stream.family.start_is_block else stream.start()
    made = (stream.latent(steer(block)) for block in count(stream.block))
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
