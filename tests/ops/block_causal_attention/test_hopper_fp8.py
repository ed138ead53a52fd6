"""The cache layout of the Hopper kernels.

Every byte has one place, the tensor core finds it there, and a stream kept in it loses nothing.

What the hardware does with an operand (descriptor, swizzle, registers) is written here a second
time, from its description and bit by bit. So a mistake in the module cannot hide behind itself.
"""

import itertools
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.ops.block_causal_attention import hopper_fp8 as layout
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import (
    SWIZZLE_64B,
    SWIZZLE_128B,
    TILE_KEYS,
    Bytes,
    Floats,
    Scales,
    Swizzle,
)
from tests.support import wgmma

DIMS = pytest.mark.parametrize("head_dim", layout.HEAD_DIMS)
HEADS = 2
NAN_CODES = (0x7F, 0xFF)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def finite_codes(shape: tuple[int, ...], generator: np.random.Generator) -> Bytes:
    """Random e4m3 bytes without NaN."""
    codes = generator.integers(0, 256, shape, np.uint8)
    codes[codes & 127 == 127] = 0
    return codes


def tokens_of(count: int, head_dim: int, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """k, v [count, H, D] whose channels and heads have different sizes."""
    sizes = np.exp(generator.standard_normal((2, HEADS, head_dim)))
    k, v = generator.standard_normal((2, count, HEADS, head_dim)) * sizes[:, None]
    return k.astype(np.float32), v.astype(np.float32)


# --- e4m3 ---


def exact_codes(x: Floats) -> Bytes:
    """e4m3 by ml_dtypes, which does not saturate by itself."""
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def test_the_decode_table_is_e4m3() -> None:
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(
        layout.decode(codes), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    )
    assert [int(code) for code in codes[np.isnan(layout.DECODE)]] == list(NAN_CODES)


def test_encode_inverts_decode() -> None:
    codes = np.array([code for code in range(256) if code not in NAN_CODES], np.uint8)
    np.testing.assert_array_equal(layout.encode(layout.decode(codes)), codes)


def test_encode_rounds_to_nearest_even_and_saturates() -> None:
    every_bf16 = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    some_fp32 = rng(1).integers(0, 1 << 32, 1 << 18, np.uint32).view(np.float32)
    values = np.sort(layout.DECODE[:127])
    ties = (values[1:] + values[:-1]) / 2
    near = np.concatenate(
        [values, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9))]
    )
    x = np.concatenate([every_bf16, some_fp32, near, -near])
    x = x[~np.isnan(x)]
    assert np.isinf(x).any() and len(x) > 300_000
    np.testing.assert_array_equal(layout.encode(x), exact_codes(x))
    np.testing.assert_array_equal(
        layout.encode(np.array([np.inf, -np.inf, 1e30, np.nan])), [0x7E, 0xFE, 0x7E, 0x7F]
    )


# --- tiles ---


def test_keys_of_a_v_tile_lie_in_the_order_of_the_a_operand() -> None:
    half = [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]
    keys = np.arange(32)
    assert layout.pos(keys).tolist() == half + [16 + column for column in half]
    np.testing.assert_array_equal(layout.kappa(layout.pos(keys)), keys)
    np.testing.assert_array_equal(layout.pos(layout.kappa(keys)), keys)


@DIMS
def test_every_byte_of_a_tile_is_used_once(head_dim: int) -> None:
    shape = layout.geometry(head_dim)
    for offsets in (shape.k_offsets, shape.v_offsets):
        assert offsets.shape == (TILE_KEYS, head_dim)
        np.testing.assert_array_equal(np.sort(offsets.ravel()), np.arange(shape.tile_bytes))


@pytest.mark.parametrize(
    ("head_dim", "k_offset", "v_offset"),
    [  # Key 13, channel 50. K: row 13, piece 50 // 16 = 3. V: row 50, column pos(13) = 11.
        # Pieces are exchanged by row bits.
        (128, 13 * 128 + (3 ^ 5) * 16 + 2, 50 * 64 + (0 ^ 1) * 16 + 11),
        (64, 13 * 64 + (3 ^ 2) * 16 + 2, 50 * 64 + (0 ^ 1) * 16 + 11),
    ],
)
def test_one_byte_by_hand(head_dim: int, k_offset: int, v_offset: int) -> None:
    shape = layout.geometry(head_dim)
    assert (shape.k_offset(13, 50), shape.v_offset(50, 13)) == (k_offset, v_offset)
    assert shape.k_offsets[13, 50] == k_offset and shape.v_offsets[13, 50] == v_offset


def test_shapes_and_limits() -> None:
    assert [layout.tiles(tokens) for tokens in (0, 1, 63, 64, 65, 37_332)] == [0, 1, 1, 1, 2, 584]
    assert layout.image_shape(24, 1196, 128) == (24, 19, 8192)
    assert layout.image_shape(12, 64, 64) == (12, 1, 4096)
    with pytest.raises(AssertionError, match="head_dim=96 has no hopper_fp8 layout"):
        layout.geometry(96)


# --- the tensor core reads ---


def swizzled(address: int, code: int) -> int:
    """Find where the hardware looks for the byte at `address`.

    128 B (code 1): bits 7, 8, 9 flip bits 4, 5, 6; 64 B (code 2): 7, 8 flip 4, 5.
    """
    for bit in range({1: 3, 2: 2}[code]):
        if address & 1 << 7 + bit:
            address ^= 1 << 4 + bit
    return address


def operand(memory: Bytes, descriptor: int, rows: int) -> Bytes:
    """Return the K-major operand [rows, 32 bytes] that a wgmma gets through `descriptor`.

    The bytes lie in shared `memory`.
    """
    start, stride, code = (
        (descriptor & 0x3FFF) << 4,
        (descriptor >> 32 & 0x3FFF) << 4,
        descriptor >> 62,
    )
    assert descriptor >> 49 & 7 == 0, "base offset"
    pitch = {1: 128, 2: 64}[code]
    at = [
        [swizzled(start + row // 8 * stride + row % 8 * pitch + byte, code) for byte in range(32)]
        for row in range(rows)
    ]
    return memory[np.array(at)]


def walk(tile: Bytes, base: int, swizzle: Swizzle, rows: int, columns: int) -> Bytes:
    """[rows, columns]: all of `tile`, read by a chain of wgmma from shared memory at `base`."""
    memory = np.zeros(base + tile.size, np.uint8)
    memory[base:] = tile
    first = wgmma.descriptor(base, swizzle)
    return np.concatenate(
        [operand(memory, first + 2 * step, rows) for step in range(columns // 32)], axis=1
    )


class Tile(NamedTuple):
    """One packed tile and what is in it."""

    k: Bytes  # [64, D]
    v: Bytes  # [64, D]
    k_tile: Bytes  # [64 * D]
    v_tile: Bytes  # [64 * D]


def one_tile(head_dim: int) -> Tile:
    ones = np.ones((1, head_dim), np.float32)
    unit = Scales(ones[:, 0], ones[:, 0], 0 * ones, ones)
    k, v = finite_codes((2, TILE_KEYS, 1, head_dim), rng(2, head_dim))
    k_block, v_block = layout.pack(layout.decode(k), layout.decode(v), unit)
    return Tile(k[:, 0], v[:, 0], k_block[0, 0], v_block[0, 0])


@DIMS
@pytest.mark.parametrize("base", [0, 1024, 37 * 1024])
def test_wgmma_finds_keys_and_values(head_dim: int, base: int) -> None:
    tile, shape = one_tile(head_dim), layout.geometry(head_dim)
    np.testing.assert_array_equal(
        walk(tile.k_tile, base, shape.k_swizzle, TILE_KEYS, head_dim), tile.k
    )
    in_order_of_columns = tile.v[
        [half + layout.kappa(column) for half in (0, 32) for column in range(32)]
    ]
    np.testing.assert_array_equal(
        walk(tile.v_tile, base, shape.v_swizzle, head_dim, TILE_KEYS), in_order_of_columns.T
    )


def test_a_tile_off_its_alignment_is_read_wrongly() -> None:
    tile = one_tile(128)
    assert (walk(tile.k_tile, 512, SWIZZLE_128B, TILE_KEYS, 128) != tile.k).any()
    assert (
        walk(tile.v_tile, 256, SWIZZLE_64B, 128, TILE_KEYS)
        != walk(tile.v_tile, 512, SWIZZLE_64B, 128, TILE_KEYS)
    ).any()


def test_descriptor_bits() -> None:
    assert (
        wgmma.descriptor(0x12340, SWIZZLE_128B) == 0x1234 | 1 << 16 | (1024 // 16) << 32 | 1 << 62
    )
    assert wgmma.descriptor(512, SWIZZLE_64B) == 0x20 | 1 << 16 | (512 // 16) << 32 | 2 << 62
    for address in (8, -16, 1 << 18):
        with pytest.raises(AssertionError, match="cannot be written"):
            wgmma.descriptor(address, SWIZZLE_64B)


@DIMS
def test_no_bank_conflicts(head_dim: int) -> None:
    """The 8 rows of 16 bytes that are read together touch each of the 32 banks once.

    They do so wherever they begin in a tile.
    """
    shape = layout.geometry(head_dim)
    for swizzle, rows, pitch in (
        (shape.k_swizzle, TILE_KEYS, head_dim),
        (shape.v_swizzle, head_dim, TILE_KEYS),
    ):
        for row, piece in itertools.product(range(0, rows, 8), range(0, pitch, 16)):
            banks = [
                (swizzled((row + i) * pitch + piece, swizzle.code) + byte) // 4 % 32
                for i in range(8)
                for byte in range(0, 16, 4)
            ]
            assert sorted(banks) == list(range(32)), f"{swizzle=} {row=} {piece=}"


# --- registers ---


def test_fragments_cover_their_matrices() -> None:
    threads = np.arange(128)
    columns = 64
    row, column = wgmma.d_fragment(threads[:, None], np.arange(columns // 2))
    np.testing.assert_array_equal(
        np.sort((row * columns + column).ravel()), np.arange(64 * columns)
    )
    row, column = wgmma.a_fragment(threads[:, None, None], np.arange(4)[:, None], np.arange(4))
    np.testing.assert_array_equal(np.sort((row * 32 + column).ravel()), np.arange(64 * 32))
    # Two corners, read off the drawings of the instruction set: thread 37 is lane 5 of warp 1.
    assert wgmma.d_fragment(37, 6) == (16 + 1 + 8, 8 + 2) and wgmma.a_fragment(37, 3, 2) == (
        16 + 1 + 8,
        16 + 4 + 2,
    )


def test_scores_become_the_a_operand_in_their_own_thread() -> None:
    thread, half, register, byte = (
        np.arange(n).reshape(shape)
        for n, shape in ((128, (-1, 1, 1, 1)), (2, (-1, 1, 1)), (4, (-1, 1)), (4, (-1,)))
    )
    source = wgmma.a_source(half, register, byte)
    np.testing.assert_array_equal(np.sort(source.ravel()), np.arange(32), "each score is used once")
    d_row, key = wgmma.d_fragment(thread, source)
    a_row, column = wgmma.a_fragment(thread, register, byte)
    np.testing.assert_array_equal(d_row, np.broadcast_to(a_row, d_row.shape))
    np.testing.assert_array_equal(key, 32 * half + layout.kappa(column))


@DIMS
def test_pv_through_registers_and_descriptors_is_exact(head_dim: int) -> None:
    """P from the score registers, V from the tile, no shuffle: the product is P.V."""
    tile, shape = one_tile(head_dim), layout.geometry(head_dim)
    p = layout.decode(finite_codes((64, TILE_KEYS), rng(3, head_dim))).astype(np.float64)
    thread = np.arange(128)[:, None, None]
    register, byte = np.arange(4)[:, None], np.arange(4)
    values = layout.decode(walk(tile.v_tile, 2048, shape.v_swizzle, head_dim, TILE_KEYS)).astype(
        np.float64
    )  # [D, 64]
    product = np.zeros((64, head_dim))
    for half in range(2):
        a = np.zeros((64, 32))
        a[wgmma.a_fragment(thread, register, byte)] = p[
            wgmma.d_fragment(thread, wgmma.a_source(half, register, byte))
        ]
        product += a @ values[:, 32 * half : 32 * half + 32].T
    np.testing.assert_array_equal(product, p @ layout.decode(tile.v).astype(np.float64))


# --- quantisation ---


def test_scales_use_the_whole_range() -> None:
    q, (k, v) = tokens_of(50, 64, rng(4))[0], tokens_of(70, 64, rng(5))
    v[:, 1, 3] = 0
    scales = layout.calibrate(q, k, v)
    for codes, axes in (
        (scales.quantise_q(q), (0, 2)),
        (scales.quantise_k(k), (0, 2)),
        (np.delete(scales.quantise_v(v), 3, 2), 0),
    ):
        np.testing.assert_array_equal(np.abs(layout.decode(codes)).max(axes), 448)
    assert (scales.k_mean == 0).all()
    assert scales.v_scale[1, 3] == 1, "an empty channel needs no scale, and no division by zero"
    assert layout.decode(scales.quantise_v(1000 * v)).max() == 448, (
        "beyond the samples values saturate"
    )
    with pytest.raises(AssertionError, match="not positive"):
        Scales(scales.q_scale, 0 * scales.k_scale, scales.k_mean, scales.v_scale)


def test_a_fixed_mean_makes_room_and_moves_no_weight() -> None:
    q, (k, v) = tokens_of(20, 64, rng(6))[0], tokens_of(300, 64, rng(7))
    k[:, :, 5] += 300
    plain, smooth = (layout.calibrate(q, k, v, smooth_k) for smooth_k in (False, True))
    assert (smooth.k_scale < 0.5 * plain.k_scale).all()
    np.testing.assert_allclose(smooth.k_mean, k.mean(0), rtol=1e-4, atol=1e-4)
    restored = [
        layout.unpack(*layout.pack(k, v, scales), len(k), scales)[0] for scales in (plain, smooth)
    ]
    mean_error = [np.abs(copy - k).mean() for copy in restored]
    assert mean_error[1] < 0.8 * mean_error[0], "K comes back with its mean, and better"
    # The kernel never adds the mean back: all scores of a query move alike.
    scores = [
        np.einsum("qhd,khd->hqk", q, keys) for keys in (restored[1], restored[1] - smooth.k_mean)
    ]
    assert np.ptp(scores[0] - scores[1], axis=-1).max() < 1e-3 * np.ptp(scores[0])


# --- pack, commit, unpack ---


@DIMS
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 127, 128, 200])
def test_pack_and_unpack(tokens: int, head_dim: int) -> None:
    k, v = tokens_of(tokens, head_dim, rng(8, tokens))
    scales = layout.calibrate(k, k, v)
    k_block, v_block = layout.pack(k, v, scales)
    assert k_block.shape == v_block.shape == layout.image_shape(HEADS, tokens, head_dim)
    k_codes, v_codes = layout.unpack_codes(k_block, v_block, tokens)
    np.testing.assert_array_equal(k_codes, exact_codes(k / scales.k_scale[:, None]))
    np.testing.assert_array_equal(v_codes, exact_codes(v / scales.v_scale))
    for back, x, scale in zip(
        layout.unpack(k_block, v_block, tokens, scales),
        (k, v),
        (scales.k_scale[:, None], scales.v_scale),
        strict=True,
    ):
        assert (np.abs(back - x) <= np.maximum(2**-4 * np.abs(x), 2**-10 * scale) * 1.0001).all(), (
            "half a step of e4m3"
        )
    for image in (k_block, v_block):
        padded = layout.unpack_codes(image, image, layout.tiles(tokens) * TILE_KEYS)
        tail = padded[0 if image is k_block else 1][tokens:]
        assert (tail == 0).all() and tail.size == (-tokens % TILE_KEYS) * HEADS * head_dim


def test_no_finite_value_is_stored_as_nan() -> None:
    k, v = tokens_of(70, 64, rng(9))
    scales = layout.calibrate(k, k, v)
    k[3], v[5], v[6, 0] = 3e38, -3e38, 1e-40
    assert not np.isin(layout.pack(k, v, scales), NAN_CODES).any()


@DIMS
def test_commit_moves_the_block_and_nothing_else(head_dim: int) -> None:
    generator = rng(10, head_dim)
    capacity = 5 * TILE_KEYS
    for _ in range(60):
        tokens = int(generator.integers(1, 150))
        slot = int(generator.integers(0, capacity - tokens + 1))
        caches = finite_codes((2, *layout.image_shape(HEADS, capacity, head_dim)), generator)
        expected = np.array(layout.unpack_codes(caches[0], caches[1], capacity))
        block = layout.pack(*tokens_of(tokens, head_dim, generator), scales=UNIT[head_dim])
        assert block[0].any() and block[1].any()
        expected[:, slot : slot + tokens] = layout.unpack_codes(*block, tokens)
        layout.commit(*block, tokens, slot, caches[0], caches[1])
        np.testing.assert_array_equal(
            layout.unpack_codes(caches[0], caches[1], capacity), expected, f"{tokens=} {slot=}"
        )


UNIT = {
    dim: Scales(
        np.ones(HEADS, "f"),
        np.ones(HEADS, "f"),
        np.zeros((HEADS, dim), "f"),
        np.ones((HEADS, dim), "f"),
    )
    for dim in layout.HEAD_DIMS
}


@pytest.mark.parametrize(("tokens", "slot"), [(100, 93), (100, -1), (64, 0)])
def test_commit_refuses_what_does_not_fit(tokens: int, slot: int) -> None:
    caches = np.zeros((2, *layout.image_shape(HEADS, 192, 64)), np.uint8)
    block = layout.pack(*tokens_of(100, 64, rng(11)), scales=UNIT[64])
    with pytest.raises(AssertionError, match="slot=" if tokens == 100 else "tokens=64"):
        layout.commit(*block, tokens, slot, caches[0], caches[1])
    assert not caches.any()


STREAMS = [Ring(*counts) for counts in itertools.product((0, 3, 70), (5, 64, 100), (0, 1), (1, 3))]


@pytest.mark.parametrize(
    "ring",
    STREAMS,
    ids=lambda r: (
        f"text{r.text_tokens}-block{r.block_tokens}-sink{r.sink_blocks}-window{r.window_blocks}"
    ),
)
def test_a_stream_keeps_the_tokens_of_a_plain_cache(ring: Ring) -> None:
    """Text, sink, filling and two turns of the ring.

    A token-major cache of the same codes runs beside it.
    """
    head_dim = 64
    generator = rng(12, ring.text_tokens, ring.block_tokens)
    caches = np.zeros((2, *layout.image_shape(HEADS, ring.tokens, head_dim)), np.uint8)
    plain = np.zeros((2, ring.tokens, HEADS, head_dim), np.uint8)
    k, v = tokens_of(ring.text_tokens, head_dim, generator)
    layout.commit(*layout.pack(k, v, UNIT[head_dim]), ring.text_tokens, 0, caches[0], caches[1])
    plain[:, : ring.text_tokens] = exact_codes(k), exact_codes(v)
    for block in range(3 * ring.window_blocks + 2):
        place = ring.place(block)
        np.testing.assert_array_equal(
            layout.unpack_codes(caches[0], caches[1], place.cache_len), plain[:, : place.cache_len]
        )
        k, v = tokens_of(ring.block_tokens, head_dim, generator)
        layout.commit(
            *layout.pack(k, v, UNIT[head_dim]), ring.block_tokens, place.slot, caches[0], caches[1]
        )
        plain[:, place.slot : place.slot + ring.block_tokens] = exact_codes(k), exact_codes(v)
    np.testing.assert_array_equal(layout.unpack_codes(caches[0], caches[1], ring.tokens), plain)
    behind = layout.unpack_codes(caches[0], caches[1], caches.shape[2] * TILE_KEYS)[0][
        ring.tokens :
    ]
    assert (behind == 0).all(), "the last tile's tail is never written"
