"""Turn the sink's keys along with the window, for engines with float32 caches in host memory.

A generator that was trained on short videos never saw a sink hundreds of frames behind. With
window.sink_follows, the sink keeps its distance to the window (LongLive's "infinity" variant): K is
cached after RoPE, so only the temporal pairs of the sink's keys need another rotation.
"""

import numpy as np

from aapt_deploy.bundle.signature import layer_names
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.profiles import Profile


class Sink:
    """The sink's keys as they were committed, and their places in the caches."""

    def __init__(self, profile: Profile, caches: dict[str, np.ndarray]) -> None:
        """Take the caches [1, S, H, D] by name. Does nothing unless window.sink_follows is set."""
        self.ring, self.tokens = Ring.of(profile), profile.block_tokens
        self.keys: dict[str, np.ndarray] = {}  # as committed, part of a stream's state
        self.places = [caches[name] for name in layer_names("k_cache", profile)]
        first, blocks = self.ring.text_tokens, self.ring.sink_blocks
        self.sink = slice(first, first + blocks * self.tokens)
        if profile.window.sink_follows:
            names = layer_names("k_sink", profile)
            parts = (cache[:, self.sink] for cache in self.places)
            self.keys = {n: np.zeros_like(part) for n, part in zip(names, parts, strict=True)}

    def keep(self, block: int) -> None:
        """Copy the keys of a sink block that was just committed."""
        if not self.keys or block >= self.ring.sink_blocks:
            return
        slot = self.ring.place(block).slot
        for kept, cache in zip(self.keys.values(), self.places, strict=True):
            at = slot - self.ring.text_tokens
            kept[:, at : at + self.tokens] = cache[:, slot : slot + self.tokens]

    def turn(self, rope: np.ndarray) -> None:
        """Rotate the committed keys' first P pairs by rope [2, P], into the caches."""
        (cos, sin), pairs = rope, rope.shape[1]
        for kept, cache in zip(self.keys.values(), self.places, strict=True):
            half = kept.shape[-1] // 2
            a, b = kept[..., :pairs], kept[..., half : half + pairs]
            cache[:, self.sink, :, :pairs] = a * cos - b * sin
            cache[:, self.sink, :, half : half + pairs] = a * sin + b * cos
