"""The attend kernel's arithmetic in NumPy, on the kernel's own bytes and in its order.

It gives the kernel's accuracy without a GPU. Emulated, step by step:

    e4m3 queries, and scores from K tiles
    the order of the tiles: the block's own from the last to the first, then the cache's from the
        last valid one down to tile 0, so that sink and text come last
    the masked tail of each of the two
    the running maximum and sum in float32, and P as e4m3 with an offset
    P.V from the bytes of V tiles, in the order of P's columns
    the tensor core's accumulator: 13 bits behind its largest summand, the rest cut off
    the two levels of accumulation that make up for it

Not emulated:

    the last bits of `ex2.approx` and of its argument
    fused multiply-adds
    the order of float32 additions inside a row sum

So the kernel is compared by its error against float64, never bit by bit.

The 13-bit accumulator is a model. Published measurements of Hopper found about 13 bits. Alignment
to the largest exponent of the 32 products and the accumulator, and truncation towards zero, are the
pessimistic reading. Rows are independent, so any subset of a block's queries may be run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aapt_deploy.ops.block_causal_attention import softmax_scale
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import (
    MMA_K,
    TILE_KEYS,
    Bytes,
    Floats,
    Scales,
    decode,
    encode,
    geometry_of,
    kappa,
    tiles,
)

HOPPER_BITS = 13
# Byte column -> key of a V tile.
_HALVES = range(0, TILE_KEYS, MMA_K)
COLUMN_KEYS = np.concatenate([half + kappa(np.arange(MMA_K)) for half in _HALVES])


@dataclass(frozen=True)
class Arithmetic:
    """The kernel's arithmetic by default; other values show what each choice is worth."""

    # Bits that the accumulator keeps behind its largest summand; None: exact.
    accumulator_bits: int | None = HOPPER_BITS
    # Keys of P.V that share one tensor-core accumulator; None: all of them (single level).
    flush_keys: int | None = TILE_KEYS
    p_offset: int = 8  # P is stored as 2^p_offset * exp(score - maximum)
    sink_last: bool = True  # from the last tile to the first; False: the other way round

    def __post_init__(self) -> None:
        keys = self.flush_keys
        assert keys is None or (keys > 0 and keys % TILE_KEYS == 0), f"flush_keys={keys}"


KERNEL = Arithmetic()
EXACT = Arithmetic(accumulator_bits=None)


def attend(
    q: NDArray[Any], k_block: Bytes, v_block: Bytes, block_tokens: int,
    k_cache: Bytes, v_cache: Bytes, cache_len: int,
    scales: Scales, arithmetic: Arithmetic = KERNEL,
) -> Floats:  # fmt: skip
    """Return what `aapt_attend` writes: [R, H, D], float32 values of bf16.

    q [R, H, D]: any rows of the block's queries. k_block, v_block: its image of `block_tokens`.
    k_cache, v_cache: read up to token `cache_len` (0 .. capacity); behind it they may have any
    bytes but NaN.
    """
    shape = geometry_of(k_block)
    rows, heads, head_dim = q.shape
    image = heads, tiles(block_tokens), shape.tile_bytes
    assert head_dim == shape.head_dim, f"{q.shape=} {k_block.shape=}"
    assert k_block.shape == v_block.shape == image, f"{k_block.shape=}"
    shapes = f"{k_cache.shape=} {k_block.shape=}"
    assert k_cache.shape == v_cache.shape and k_cache.shape[0::2] == k_block.shape[0::2], shapes
    lengths = f"{block_tokens=} {cache_len=} {k_cache.shape=}"
    assert block_tokens > 0 and 0 <= cache_len <= k_cache.shape[1] * TILE_KEYS, lengths

    bits, flush = arithmetic.accumulator_bits, arithmetic.flush_keys
    queries = decode(scales.quantise_q(q)).swapaxes(0, 1)  # [H, R, D]
    # Scores leave the tensor core as q8 . k8; this turns them into exponents of 2.
    log2_e = np.float32(softmax_scale(head_dim) * np.log2(np.e))
    to_exponent = (scales.q_scale * scales.k_scale * log2_e)[:, None, None]

    maximum = np.full((heads, rows, 1), -np.inf, np.float32)
    total = np.zeros((heads, rows, 1), np.float32)
    accumulated = np.zeros((heads, rows, head_dim), np.float32)  # second level, float32 registers
    partial = np.zeros_like(accumulated)  # first level, the tensor core's
    unflushed = 0

    segments = [(k_block, v_block, block_tokens), (k_cache, v_cache, cache_len)]
    for k_tile, v_tile, valid in visits(segments, arithmetic.sink_last):
        keys = decode(k_tile[:, shape.k_offsets])  # [H, 64, D]
        values = decode(v_tile[:, shape.v_offsets[COLUMN_KEYS]])  # [H, 64, D], as byte columns are
        zeros = np.zeros((heads, rows, TILE_KEYS), np.float32)
        scores = matmul(queries, keys.swapaxes(1, 2), zeros, bits)  # [H, R, 64]
        scores[:, :, valid:] = -np.inf
        higher = np.maximum(maximum, scores.max(-1, keepdims=True))
        rescale = np.exp2((maximum - higher) * to_exponent)  # 0 at the first tile
        p = np.exp2((scores - higher) * to_exponent + np.float32(arithmetic.p_offset))
        maximum, total = higher, total * rescale + p.sum(-1, keepdims=True)
        accumulated, partial = accumulated * rescale, partial * rescale
        partial = matmul(decode(encode(p))[:, :, COLUMN_KEYS], values, partial, bits)
        unflushed += TILE_KEYS
        if unflushed == flush:
            accumulated, partial, unflushed = accumulated + partial, np.zeros_like(partial), 0
    out = (accumulated + partial) * scales.v_scale[:, None] / total  # [H, R, D]
    return to_bf16(out).swapaxes(0, 1)


def visits(
    segments: list[tuple[Bytes, Bytes, int]], sink_last: bool
) -> Iterator[tuple[Bytes, Bytes, int]]:
    """Yield K tile [H, bytes], V tile [H, bytes] and their count of valid keys, in order."""
    visits = [
        (k_image[:, tile], v_image[:, tile], min(TILE_KEYS, tokens - tile * TILE_KEYS))
        for k_image, v_image, tokens in segments
        for tile in reversed(range(tiles(tokens)))
    ]
    yield from visits if sink_last else reversed(visits)


def matmul(a: Floats, b: Floats, c: Floats, bits: int | None) -> Floats:
    """Return a [H, R, K] . b [H, K, N] + c [H, R, N] as a chain of wgmma, 32 along K each.

    `bits` is the accumulator's width; None: exact, rounded once.
    """
    if bits is None:
        exact: Floats = (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float32)
        return exact
    for k in range(0, a.shape[2], MMA_K):
        part = slice(k, k + MMA_K)
        # [H, R, 32, N], exact: 4 x 4 significant bits.
        products = a[:, :, part, None] * b[:, None, part]
        largest = np.maximum(np.abs(products).max(2), np.abs(c))
        # [H, R, N]: weight of the last bit that survives alignment.
        unit = np.ldexp(np.float32(1), np.frexp(largest)[1] - 1 - bits)
        products /= unit[:, :, None]
        np.trunc(products, out=products)
        units = products.sum(2) + np.trunc(c / unit)  # a sum of small integers: exact
        c = truncate(units * unit, bits)
    return c


def truncate(x: Floats, bits: int) -> Floats:
    """Keep `bits` bits of x behind the leading one; cut the rest, towards zero."""
    mask = np.uint32(0xFFFFFFFF << 23 - bits & 0xFFFFFFFF)
    kept: Floats = (x.view(np.uint32) & mask).view(np.float32)
    return kept


def to_bf16(x: Floats) -> Floats:
    """Round finite x to bf16, to nearest, ties to even; return it as float32."""
    bits = x.view(np.uint32)
    rounded: Floats = (bits + 0x7FFF + (bits >> 16 & 1) & np.uint32(0xFFFF0000)).view(np.float32)
    return rounded
