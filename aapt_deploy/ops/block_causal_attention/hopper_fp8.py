"""The cache layout `hopper_fp8`: e4m3 tiles in the form that Hopper's tensor cores read.

A head's cache is a run of tiles of 64 keys. A tile is one contiguous run of 64 * D bytes. A bulk
copy brings it into shared memory, where `wgmma` reads it without a transpose, padding or tensor
map. Token s of the flat cache `[ text | sink | ring ]` is key s % 64 of tile s // 64. D is 128 or
64.

    k_cache, v_cache   uint8 [H, ceil(S / 64), 64 * D]   one layer; zeros when new, and never a
                                                         NaN byte (0x7f, 0xff) afterwards
    k_block, v_block   uint8 [H, ceil(T / 64), 64 * D]   block image: a block's own tokens, token 0
                                                         at tile 0, zeros behind the last one

    K tile    [64 keys][D bytes]    swizzled 128 B (D = 128) or 64 B (D = 64)
    V tile    [D rows][64 bytes]    V transposed, swizzled 64 B; key j is in byte column
                                    (j & 32) | pos(j & 31)

plugins/block_causal_attention/README.md draws this and gives the reasons. This file does in NumPy
what the kernels do with it: quantise (`encode`, `calibrate`), `pack`, `commit` and `unpack`.
Attention over these bytes is in emulator.py.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Index = NDArray[np.intp]

NAME = "hopper_fp8"
TILE_KEYS = 64  # keys of a tile
MMA_K = 32  # e4m3 values along K of one wgmma
HEAD_DIMS = (64, 128)
E4M3_MAX = 448.0


# --- e4m3 (the "fn" kind: no infinities, one NaN per sign) ---


def _decode_table() -> Floats:
    """Compute all 256 values: sign | 4 exponent bits, bias 7 | 3 mantissa bits."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    normal = np.ldexp(8.0 + mantissa, exponent - 10)
    subnormal = np.ldexp(mantissa.astype(np.float64), -9)
    magnitude = np.where(exponent == 0, subnormal, normal)
    magnitude[code & 127 == 127] = np.nan
    return np.where(code & 128, -magnitude, magnitude).astype(np.float32)


DECODE = _decode_table()


def decode(codes: Bytes) -> Floats:
    """Return the values of e4m3 bytes."""
    return DECODE[codes]


def encode(x: NDArray[Any]) -> Bytes:
    """Convert float32 to e4m3 bytes: to nearest, ties to even, saturating at +-448.

    NaN becomes NaN, as in `cvt.rn.satfinite.e4m3x2.f32`.
    """
    values = np.asarray(x, np.float32)
    magnitude = np.minimum(np.abs(values), np.float32(E4M3_MAX))
    bits = magnitude.view(np.uint32)
    # Normal numbers: keep 3 of 23 mantissa bits, where a carry into the exponent is right. Then
    # replace the bias of 127 by that of 7.
    normal = (bits + 0x7FFFF + (bits >> 20 & 1) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9. Adding 2^14 rounds to these, and leaves the multiple
    # in the low mantissa bits.
    subnormal = (magnitude + np.float32(2**14)).view(np.uint32) & 127
    sign = values.view(np.uint32) >> 24 & 128
    code = np.where(magnitude < 2**-6, subnormal, normal) | sign
    return np.where(np.isnan(values), 0x7F, code).astype(np.uint8)


# --- tiles ---


def pos(key: Any) -> Any:
    """Return the byte column of key 0..31 inside its half of a V tile.

    It is the A operand's, if P moves from D to A registers without a shuffle.
    """
    return key & 16 | (key & 6) << 1 | (key & 8) >> 2 | key & 1


def kappa(column: Any) -> Any:
    """Return the key 0..31 of a byte column: the inverse of `pos`."""
    return column & 16 | (column & 12) >> 1 | (column & 2) << 2 | column & 1


@dataclass(frozen=True)
class Swizzle:
    """A K-major swizzle of shared memory.

    Rows have `span` bytes; 16-byte pieces are exchanged inside groups of 8 rows.
    """

    span: int  # bytes of a row
    code: int  # layout type in a descriptor

    @property
    def group_bytes(self) -> int:
        """Return the bytes of 8 rows: stride byte offset of a descriptor, alignment of a tile."""
        return 8 * self.span

    def apply(self, address: Any) -> Any:
        """XOR bits 4.. of a byte address, or of an offset in an aligned tile, by bits 7.. of it.

        Applied twice, it returns the address.
        """
        return address ^ (address >> 7 & self.span // 16 - 1) << 4


SWIZZLE_128B = Swizzle(span=128, code=1)
SWIZZLE_64B = Swizzle(span=64, code=2)


@dataclass(frozen=True)
class Geometry:
    """The tiles of one head dimension."""

    head_dim: int

    def __post_init__(self) -> None:
        problem = f"head_dim={self.head_dim} has no {NAME} layout; known: {HEAD_DIMS}"
        assert self.head_dim in HEAD_DIMS, problem

    @property
    def tile_bytes(self) -> int:
        """Count the bytes of one K tile, or of one V tile."""
        return TILE_KEYS * self.head_dim

    @property
    def k_swizzle(self) -> Swizzle:
        return SWIZZLE_128B if self.head_dim == 128 else SWIZZLE_64B

    @property
    def v_swizzle(self) -> Swizzle:
        return SWIZZLE_64B

    def k_offset(self, key: Any, byte: Any) -> Any:
        """Return the byte offset of channel `byte` of `key` 0..63 in a K tile."""
        return self.k_swizzle.apply(key * self.head_dim + byte)

    def v_offset(self, d: Any, key: Any) -> Any:
        """Return the byte offset of channel `d` of `key` 0..63 in a V tile."""
        return self.v_swizzle.apply(d * TILE_KEYS + (key & 32 | pos(key & 31)))

    @cached_property
    def k_offsets(self) -> Index:
        """Return `k_offset` of every key and channel, [64, D]."""
        keys = np.arange(TILE_KEYS)[:, None]
        return np.asarray(self.k_offset(keys, np.arange(self.head_dim)), np.intp)

    @cached_property
    def v_offsets(self) -> Index:
        """Return `v_offset` of every key and channel, [64, D]."""
        keys = np.arange(TILE_KEYS)[:, None]
        return np.asarray(self.v_offset(np.arange(self.head_dim), keys), np.intp)


@lru_cache
def geometry(head_dim: int) -> Geometry:
    """Return the shared Geometry of `head_dim`; its offsets are computed once."""
    return Geometry(head_dim)


def geometry_of(image: Bytes) -> Geometry:
    """Return the Geometry of a cache or block image [H, tiles, 64 * D]."""
    assert image.dtype == np.uint8 and image.ndim == 3, f"{image.shape=} {image.dtype=}"
    return geometry(image.shape[2] // TILE_KEYS)


def tiles(tokens: int) -> int:
    """Count the tiles of `tokens`."""
    return -(-tokens // TILE_KEYS)


def image_shape(heads: int, tokens: int, head_dim: int) -> tuple[int, int, int]:
    """Return the shape of an image of `tokens`: [H, tiles, bytes of a tile]."""
    return heads, tiles(tokens), geometry(head_dim).tile_bytes


# --- quantisation ---


@dataclass(frozen=True)
class Scales:
    """Scales of one layer, calibrated once and then fixed for the life of a cache.

    A stored value is e4m3((x - mean) / scale), computed in float32. `k_mean` is the same vector for
    every token. It moves all scores of a query alike, which a softmax cancels, so nothing adds it
    back.
    """

    q_scale: Floats  # [H]
    k_scale: Floats  # [H]
    k_mean: Floats  # [H, D]; zeros: K is not centred
    v_scale: Floats  # [H, D]

    def __post_init__(self) -> None:
        heads = self.q_scale.shape
        k_mean, v_scale, per_head = self.k_mean.shape, self.v_scale.shape, self.k_scale.shape
        assert len(heads) == 1 and per_head == heads, f"q_scale {heads}, k_scale {per_head}"
        assert k_mean == v_scale and v_scale[:1] == heads, f"{k_mean=} {v_scale=} {heads=}"
        scales = self.q_scale, self.k_scale, self.v_scale
        assert all((scale > 0).all() for scale in scales), "a scale is not positive"

    def quantise_q(self, q: NDArray[Any]) -> Bytes:
        """Quantise queries [.., H, D] to e4m3 bytes."""
        return _quantise(q.astype(np.float32), self.q_scale[:, None])

    def quantise_k(self, k: NDArray[Any]) -> Bytes:
        """Quantise keys [.., H, D] to e4m3 bytes, without their mean."""
        return _quantise(k.astype(np.float32) - self.k_mean, self.k_scale[:, None])

    def quantise_v(self, v: NDArray[Any]) -> Bytes:
        """Quantise values [.., H, D] to e4m3 bytes."""
        return _quantise(v.astype(np.float32), self.v_scale)


def _quantise(x: Floats, scale: Floats) -> Bytes:
    with np.errstate(over="ignore"):  # an infinite quotient saturates like any large one
        return encode(x / scale)


def calibrate(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], smooth_k: bool = False) -> Scales:
    """Return scales that map the largest magnitudes in the samples [n, H, D] to 448.

    They are per head for q and k, per channel for v. `smooth_k` subtracts the mean of K over the
    samples first. Values beyond the samples' range saturate.
    """
    shapes = f"{q.shape=} {k.shape=} {v.shape=}"
    assert q.shape[1:] == k.shape[1:] == v.shape[1:] and q.ndim == 3, shapes
    k_mean = np.zeros(k.shape[1:], np.float32)
    if smooth_k:
        k_mean = k.astype(np.float64).mean(0).astype(np.float32)
    k_scale = _scale(k.astype(np.float32) - k_mean, (0, 2))
    return Scales(_scale(q, (0, 2)), k_scale, k_mean, _scale(v, (0,)))


def _scale(x: NDArray[Any], axes: tuple[int, ...]) -> Floats:
    amax = np.abs(x).max(axes).astype(np.float32)
    return np.where(amax > 0, amax / np.float32(E4M3_MAX), np.float32(1))


# --- images ---


def pack(k: NDArray[Any], v: NDArray[Any], scales: Scales) -> tuple[Bytes, Bytes]:
    """Pack finite k, v [T, H, D] into block images [H, ceil(T / 64), 64 * D]."""
    assert k.shape == v.shape and k.ndim == 3, f"{k.shape=} {v.shape=}"
    tokens, heads, head_dim = k.shape
    shape, shapes = geometry(head_dim), image_shape(heads, tokens, head_dim)
    keys, values = scales.quantise_k(k), scales.quantise_v(v)
    images = []
    for codes, offsets in ((keys, shape.k_offsets), (values, shape.v_offsets)):
        image = np.zeros(shapes, np.uint8)
        image.reshape(heads, -1)[:, _index(0, tokens, offsets)] = codes.swapaxes(0, 1)  # [H, T, D]
        images.append(image)
    return images[0], images[1]


def commit(
    k_block: Bytes, v_block: Bytes, tokens: int, slot: int, k_cache: Bytes, v_cache: Bytes
) -> None:
    """Move the `tokens` of a block image into the caches, in place, from token `slot` on.

    `slot` is any token of the caches. No other token changes.
    """
    shape, problem = geometry_of(k_cache), f"{slot=} {tokens=} {k_block.shape=} {k_cache.shape=}"
    image = len(k_cache), tiles(tokens), shape.tile_bytes
    assert k_cache.shape == v_cache.shape, f"{k_cache.shape=} {v_cache.shape=}"
    assert k_block.shape == v_block.shape == image, f"{problem} {v_block.shape=}"
    assert slot >= 0 and tiles(slot + tokens) <= k_cache.shape[1], problem
    pairs = (k_block, k_cache, shape.k_offsets), (v_block, v_cache, shape.v_offsets)
    for block, cache, offsets in pairs:
        source, target = _index(0, tokens, offsets), _index(slot, tokens, offsets)
        cache.reshape(len(cache), -1)[:, target] = block.reshape(len(block), -1)[:, source]


def unpack_codes(k_image: Bytes, v_image: Bytes, tokens: int) -> tuple[Bytes, Bytes]:
    """Return the e4m3 bytes of the first `tokens` of an image, in order: two of [n, H, D]."""
    shape, shapes = geometry_of(k_image), f"{k_image.shape=} {v_image.shape=} {tokens=}"
    assert k_image.shape == v_image.shape, shapes
    assert 0 <= tokens <= k_image.shape[1] * TILE_KEYS, shapes
    k, v = (
        image.reshape(len(image), -1)[:, _index(0, tokens, offsets)].swapaxes(0, 1)
        for image, offsets in ((k_image, shape.k_offsets), (v_image, shape.v_offsets))
    )
    return k, v


def unpack(k_image: Bytes, v_image: Bytes, tokens: int, scales: Scales) -> tuple[Floats, Floats]:
    """Return the first `tokens` of an image as k, v float32 [n, H, D], K with its mean."""
    k, v = unpack_codes(k_image, v_image, tokens)
    return decode(k) * scales.k_scale[:, None] + scales.k_mean, decode(v) * scales.v_scale


def _index(first: int, count: int, offsets: Index) -> Index:
    """Return the byte offsets of tokens `first`.. in one head, [count, D]."""
    token = np.arange(first, first + count)
    index: Index = (token // TILE_KEYS * offsets.size)[:, None] + offsets[token % TILE_KEYS]
    return index
