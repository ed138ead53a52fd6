"""Attention that looks like a trained generator's, drawn from a seed.

Accuracy is measured on it, in tests and in bench/emulator_accuracy.py. Per head:

    32 topics, each with a direction in K and a mean in V; every token and every query belongs to
    one, at random
    key, query     topic direction + 1.5 x noise, scaled to unit RMS (as after QK-norm)
    value          a mean common to all tokens + its topic's mean + noise, all of unit variance
    plain          as above: with D = 128 a query spreads its weight over some 2500 of 37 332 keys,
                   most of them of its own topic
    sharp          queries x 2: over some 200
    outlier        4 channels of K moved by +-6, as the bias of a projection does
    sink           all queries share a direction (0.5 x); the first 16 tokens have a key along it
                   and values of a third of the usual size. Their scores lie about `sink_score`
                   higher

Lengths are those of a stream: text, one sink block, past blocks, and the own block of T = 1196.
Only some rows of queries are computed; rows do not depend on each other. The error is the relative
RMSE against float64 attention over the inputs *before* quantisation.
"""

from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aapt_deploy.ops.block_causal_attention import Ring, emulator, reference
from aapt_deploy.ops.block_causal_attention import hopper_fp8 as layout
from aapt_deploy.ops.block_causal_attention.emulator import KERNEL, Arithmetic
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import Floats

SHORT, LONG = (
    Ring(16, 1196, 1, 2),
    Ring(256, 1196, 1, 29),
)  # with the own block 4800 and 37 332 tokens
SEED = 0


class Drawn(NamedTuple):
    """q [R, H, D] for some of the block's queries; k, v [S, H, D] in cache order.

    The block's own tokens come last.
    """

    q: Floats
    k: Floats
    v: Floats


def draw(
    kind: str,
    tokens: int,
    sink_score: float = 0,
    rows: int = 8,
    heads: int = 2,
    head_dim: int = 128,
    seed: int = SEED,
) -> Drawn:
    """Draw data of a `kind` (top of this file) in which all numbers are bf16 values.

    A generator's K and V are such values.
    """
    assert kind in ("plain", "sharp", "outlier", "sink"), f"{kind=}"
    generator = np.random.default_rng([seed, tokens])
    normal = lambda *shape: generator.standard_normal((*shape, heads, head_dim), np.float32)
    directions, means = normal(32), normal(32) + normal(1)
    of_token, of_row = generator.integers(0, 32, tokens), generator.integers(0, 32, rows)
    k = unit_rms(directions[of_token] + 1.5 * normal(tokens))
    v = means[of_token] + normal(tokens)
    q = unit_rms(directions[of_row] + 1.5 * normal(rows))
    if kind == "sharp":
        q *= 2
    if kind == "outlier":
        k[:, :, generator.choice(head_dim, 4, replace=False)] += 6 * generator.choice([-1, 1], 4)
    if kind == "sink":
        common = unit_rms(normal(1))
        q += 0.5 * common
        k[:16] += sink_score * head_dim**0.5 / (0.5 * head_dim) * common
        v[:16] *= 0.3
    return Drawn(*(emulator.to_bf16(x) for x in (q, k, v)))


def unit_rms(x: Floats) -> Floats:
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True))


def truth(q: Floats, k: Floats, v: Floats) -> NDArray[np.float64]:
    """Attend with every row of q over all keys, in float64.

    Rows and keys need not match in number: for the sum it does not matter who is in the cache.
    """
    n = len(k) - len(q)
    out, _, _ = reference.block_causal_attention(
        q[None], k[None, n:], v[None, n:], k[None, :n], v[None, :n], np.array([n], np.int32)
    )
    return out[0]


def rmse(out: NDArray[Any], exact: NDArray[np.float64]) -> float:
    """Relative: the root of the summed squares of the error by that of the exact values."""
    return float(np.sqrt(np.square(out - exact).sum() / np.square(exact).sum()))


class Case:
    """One set of data, packed as a stream leaves it.

    Everything but the last `block_tokens` is in the cache.
    """

    def __init__(self, data: Drawn, block_tokens: int) -> None:
        self.q, self.tokens = data.q, block_tokens
        self.cache_len = n = len(data.k) - block_tokens
        self.scales = layout.calibrate(*data)
        self.block = layout.pack(data.k[n:], data.v[n:], self.scales)
        self.cache = layout.pack(data.k[:n], data.v[:n], self.scales)
        self.exact = truth(*data)
        self.made: dict[Arithmetic, Floats] = {}

    def dequantised(self) -> Drawn:
        """The data as it is after quantisation."""
        stored = [
            layout.unpack(*images, n, self.scales)
            for images, n in ((self.cache, self.cache_len), (self.block, self.tokens))
        ]
        q = layout.decode(self.scales.quantise_q(self.q)) * self.scales.q_scale[:, None]
        return Drawn(q, *(np.concatenate(parts) for parts in zip(*stored, strict=True)))

    @cached_property
    def stored(self) -> NDArray[np.float64]:
        """Return float64 attention over the data after quantisation.

        Measured against this, an error is that of the kernel's arithmetic alone.
        """
        return truth(*self.dequantised())

    def attend(self, arithmetic: Arithmetic = KERNEL) -> Floats:
        """[R, H, D]: what the kernel makes of it. Computed once; not to be written to."""
        if arithmetic not in self.made:
            self.made[arithmetic] = emulator.attend(
                self.q,
                *self.block,
                self.tokens,
                *self.cache,
                self.cache_len,
                self.scales,
                arithmetic,
            )
        return self.made[arithmetic]

    def error(self, arithmetic: Arithmetic = KERNEL) -> float:
        """Of the kernel with this arithmetic, quantisation included."""
        return rmse(self.attend(arithmetic), self.exact)

    def arithmetic_error(self, arithmetic: Arithmetic = KERNEL) -> float:
        """Of the arithmetic alone."""
        return rmse(self.attend(arithmetic), self.stored)

    def input_error(self) -> float:
        """Of quantisation alone."""
        return rmse(self.stored, self.exact)


@lru_cache
def case(
    kind: str,
    ring: Ring,
    sink_score: float = 0,
    heads: int = 2,
    head_dim: int = 128,
    seed: int = SEED,
) -> Case:
    """Draw data of a `kind` in a full `ring`.

    Few keys need a weaker sink for the same share of the weight: 2 less in the short ring.
    """
    tokens = ring.tokens + ring.block_tokens
    score = sink_score - 2 * (kind == "sink" and ring == SHORT)
    return Case(
        draw(kind, tokens, score, heads=heads, head_dim=head_dim, seed=seed), ring.block_tokens
    )
