"""The kernel's arithmetic against float64.

It is right for every length, accurate enough at the lengths of real streams, and for the reasons we
think. tests/support/attention_data.py describes the data and the error.
bench/emulator_accuracy.py records the same numbers for more heads.
"""

import itertools

import ml_dtypes
import numpy as np
import pytest

from aapt_deploy.ops.block_causal_attention import Ring, emulator
from aapt_deploy.ops.block_causal_attention import hopper_fp8 as layout
from aapt_deploy.ops.block_causal_attention.emulator import EXACT, KERNEL, Arithmetic
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import TILE_KEYS, Bytes, Floats
from tests.support.attention_data import LONG, SHORT, Case, case, draw, rmse, truth

SINGLE_LEVEL = Arithmetic(flush_keys=None)


# --- accuracy at the lengths of real streams ---

# Relative RMSE that an earlier, independent model of this arithmetic gave on clustered data of its
# own: (kernel, the same with exact sums). It may be 1.5 times as much here. Of 4800 tokens that
# model had plain data only: a shorter stream, which averages less, costs 0.0064 / 0.0041 there.
MARGIN, SHORTER = 1.5, 0.0064 / 0.0041
KINDS = {
    ("plain", 0): (0.0041, 0.0041), ("sharp", 0): (0.0131, 0.0130),
    ("outlier", 0): (0.0059, 0.0059),
    ("sink", 6): (0.0075, 0.0075), ("sink", 9): (0.0178, 0.0178), ("sink", 12): (0.0555, 0.0555),
}  # fmt: skip
kinds = pytest.mark.parametrize(
    ("kind", "sink_score"), KINDS, ids=lambda value: str(value) if value else ""
)
rings = pytest.mark.parametrize("ring", [SHORT, LONG], ids=["4800", "37332"])


def real(kind: str, ring: Ring, sink_score: float = 0, head_dim: int = 128) -> Case:
    """With a sink the error is that of 16 keys in each head.

    One head may have half as much again as the next: two are averaged.
    """
    return case(kind, ring, sink_score, heads=2 if kind == "sink" else 1, head_dim=head_dim)


def assert_accurate(made: Case, kind: str, sink_score: float) -> None:
    assert made.cache_len + made.tokens in (4800, 37_332)
    for arithmetic, expected in zip((KERNEL, EXACT), KINDS[kind, sink_score], strict=True):
        error = made.error(arithmetic)
        print(
            f"{kind} {sink_score} {made.cache_len + made.tokens} "
            f"{arithmetic.accumulator_bits}: {error:.4f}"
        )
        assert error <= MARGIN * expected * (SHORTER if made.cache_len < 4800 else 1), (
            f"{arithmetic}"
        )


@kinds
@rings
def test_the_error_at_real_lengths(kind: str, sink_score: float, ring: Ring) -> None:
    assert_accurate(real(kind, ring, sink_score), kind, sink_score)


@pytest.mark.parametrize(
    ("kind", "sink_score", "ring"), [(*kind, SHORT) for kind in KINDS] + [("plain", 0, LONG)]
)
def test_the_error_at_real_lengths_with_64_channels(
    kind: str, sink_score: float, ring: Ring
) -> None:
    assert_accurate(real(kind, ring, sink_score, head_dim=64), kind, sink_score)


@kinds
@rings
def test_most_of_the_error_is_in_the_stored_numbers(
    kind: str, sink_score: float, ring: Ring
) -> None:
    """Two levels make up for the 13-bit accumulator.

    P as e4m3 adds less than K, V and Q as e4m3 cost to begin with.
    """
    made = real(kind, ring, sink_score)
    assert made.error(KERNEL) <= 1.1 * made.error(EXACT)
    assert made.error(KERNEL) <= 1.5 * made.input_error()
    assert made.error(KERNEL) >= 0.5 * made.input_error(), "else the quantised bytes were not used"


@rings
def test_a_single_level_of_accumulation_is_a_trap(ring: Ring) -> None:
    """A term far smaller than the sum falls off the end of 13 bits.

    The longer the stream, the more of it is lost.
    """
    made = real("plain", ring)
    single = made.error(SINGLE_LEVEL)
    print(f"single level {ring.tokens + ring.block_tokens}: {single:.4f}")
    assert single > (0.1 if ring == LONG else 0.03)
    assert single > (20 if ring == LONG else 5) * made.error(KERNEL)
    assert made.error(Arithmetic(flush_keys=4 * TILE_KEYS)) < 1.3 * made.error(KERNEL), (
        "four tiles may share an accumulator"
    )
    assert made.error(Arithmetic(flush_keys=None, accumulator_bits=None)) < 1.01 * made.error(
        EXACT
    ), "with exact sums levels do not matter"


def test_the_offset_of_p_is_needed() -> None:
    made = real("sharp", LONG)
    assert made.error(Arithmetic(p_offset=0)) > 2 * made.error(KERNEL)


@pytest.mark.parametrize("sink_score", [9, 12])
def test_the_sink_is_visited_last(sink_score: float) -> None:
    """A sink that comes first sets the running maximum for all.

    The P of every other key then fall into the lowest steps of e4m3.
    """
    made = real("sink", LONG, sink_score)
    last, first = (made.arithmetic_error(Arithmetic(sink_last=order)) for order in (True, False))
    print(
        f"sink {sink_score}: error of the arithmetic alone "
        f"{last:.4f} sink last, {first:.4f} sink first"
    )
    assert last < 0.75 * first
    assert made.error(KERNEL) < made.error(Arithmetic(sink_last=False))


# --- every length, ring case and byte ---


def small(tokens: int, cache_len: int, head_dim: int, seed: int = 1) -> Case:
    """Two heads whose scales differ widely."""
    data = draw("plain", tokens + cache_len, rows=min(tokens, 5), head_dim=head_dim, seed=seed)
    for x, size in zip(data, (0.5, 2, 8), strict=True):
        x[:, 1] *= size
    return Case(data, tokens)


def assert_near(out: Floats, made: Case) -> None:
    """Within what rounding can do.

    P is off by at most 1/16 of itself or half a subnormal step, bf16 and 13 bits by at most 1/64
    together.
    """
    q, k, v = made.dequantised()
    bound = truth(q, k, np.abs(v))
    slack = len(k) * 2.0**-18 * np.abs(v).max()
    assert (np.abs(out - made.stored) <= (1 / 16 + 1 / 64) * bound + slack).all()
    assert rmse(out, made.stored) < 0.04


@pytest.mark.parametrize("head_dim", layout.HEAD_DIMS)
def test_every_length(head_dim: int) -> None:
    ways = (KERNEL, EXACT, SINGLE_LEVEL, Arithmetic(sink_last=False), Arithmetic(flush_keys=128))
    for tokens, cache_len in itertools.product((1, 63, 64, 65, 130), (0, 1, 63, 64, 65, 128, 200)):
        made = small(tokens, cache_len, head_dim)
        for arithmetic in ways:
            assert_near(made.attend(arithmetic), made)


@pytest.mark.parametrize(
    "ring",
    [Ring(text, 70, sink, 2) for text in (0, 9) for sink in (0, 1)],
    ids=["ring", "sink", "text", "text-sink"],
)
def test_a_stream(ring: Ring) -> None:
    """Attention through caches that were committed to block by block, against the blocks in sight.

    It takes two turns of the ring.
    """
    blocks, head_dim = 3 * ring.window_blocks + 2, 64
    data = draw(
        "plain", ring.text_tokens + blocks * ring.block_tokens, rows=blocks * 3, head_dim=head_dim
    )
    scales = layout.calibrate(*data)
    caches = np.zeros((2, *layout.image_shape(data.k.shape[1], ring.tokens, head_dim)), np.uint8)
    text = np.arange(ring.text_tokens)
    layout.commit(
        *layout.pack(data.k[text], data.v[text], scales), ring.text_tokens, 0, caches[0], caches[1]
    )
    for block in range(blocks):
        place, q = ring.place(block), data.q[3 * block : 3 * block + 3]
        seen = np.concatenate(
            [
                text,
                *(
                    ring.text_tokens + ring.block_tokens * past + np.arange(ring.block_tokens)
                    for past in ring.visible(block)
                ),
            ]
        )
        own = seen[-ring.block_tokens :]
        images = layout.pack(data.k[own], data.v[own], scales)
        out = emulator.attend(
            q, *images, ring.block_tokens, caches[0], caches[1], place.cache_len, scales
        )
        assert rmse(out, truth(q, data.k[seen], data.v[seen])) < 0.03, f"{block=}"
        layout.commit(*images, ring.block_tokens, place.slot, caches[0], caches[1])


def among_garbage(images: tuple[Bytes, Bytes], tokens: int, more_tiles: int) -> tuple[Bytes, Bytes]:
    """Return `images` with random finite bytes around them.

    They are in every token from `tokens` on, and in `more_tiles` behind.
    """
    heads, tiles, tile_bytes = images[0].shape
    k, v = np.random.default_rng(tokens).integers(
        0, 0x7F, (2, heads, tiles + more_tiles, tile_bytes), np.uint8
    )
    layout.commit(*images, tokens, 0, k, v)
    return k, v


@pytest.mark.parametrize(("tokens", "cache_len"), [(70, 130), (64, 128), (1, 0), (65, 1)])
def test_what_lies_behind_the_valid_tokens_does_not_matter(tokens: int, cache_len: int) -> None:
    made = small(tokens, cache_len, 64)
    block, cache = among_garbage(made.block, tokens, 0), among_garbage(made.cache, cache_len, 2)
    assert (block[1] == made.block[1]).all() == (tokens % TILE_KEYS == 0)
    out = emulator.attend(made.q, *block, tokens, *cache, cache_len, made.scales)
    np.testing.assert_array_equal(out, made.attend())


def test_two_keys_by_hand() -> None:
    """P is rounded, its sum is not, the result is bf16.

    exp(-1) x 256 = 94.2 becomes 96, and (256 + 96) / (256 + 94.2) = 1.0052 becomes 1.0078.
    """
    ones, zeros = np.ones((1, 1, 64), np.float32), np.zeros((1, 1, 64), np.float32)
    unit = layout.Scales(np.ones(1, np.float32), np.ones(1, np.float32), zeros[0], ones[0])
    first = np.eye(1, 64, dtype=np.float32)[None]  # [1, 1, 64]: channel 0
    block, cache = (
        layout.pack(zeros, ones, unit),
        layout.pack(-8 * first, ones, unit),
    )  # scores 0 and -8 / sqrt(64)
    out = emulator.attend(first, *block, 1, *cache, 1, unit)
    np.testing.assert_array_equal(out, 1 + 2.0**-7)


def test_rows_do_not_depend_on_each_other() -> None:
    made = small(70, 150, 64)
    for row in range(len(made.q)):
        alone = emulator.attend(
            made.q[row : row + 1], *made.block, 70, *made.cache, 150, made.scales
        )
        np.testing.assert_array_equal(alone[0], made.attend()[row])


def test_a_fixed_mean_of_k_does_not_move_the_result() -> None:
    data = draw("outlier", 400, head_dim=64)
    exact = truth(*data)
    errors = []
    for smooth in (False, True):
        scales = layout.calibrate(*data, smooth_k=smooth)
        block, cache = (
            layout.pack(data.k[300:], data.v[300:], scales),
            layout.pack(data.k[:300], data.v[:300], scales),
        )
        errors.append(rmse(emulator.attend(data.q, *block, 100, *cache, 300, scales), exact))
    assert np.abs(scales.k_mean).max() > 5
    assert max(errors) < 0.03 and errors[1] < 1.2 * errors[0]


# --- the parts ---


def test_the_order_of_visits() -> None:
    block, cache = (
        np.arange(base, base + n, dtype=np.uint8).reshape(1, n, 1) for base, n in ((10, 2), (20, 4))
    )
    segments = [(block, block, 70), (cache, cache, 129)]
    seen = [
        (int(k[0, 0]), int(v[0, 0]), valid)
        for k, v, valid in emulator.visits(segments, sink_last=True)
    ]
    assert seen == [(11, 11, 6), (10, 10, 64), (22, 22, 1), (21, 21, 64), (20, 20, 64)], (
        "tile 3 of the cache holds nothing yet"
    )
    assert [
        (int(k[0, 0]), valid) for k, _, valid in emulator.visits(segments, sink_last=False)
    ] == [(k, valid) for k, _, valid in reversed(seen)]
    assert len(list(emulator.visits([(block, block, 64), (cache, cache, 0)], sink_last=True))) == 1


def test_the_accumulator_keeps_13_bits_behind_its_largest_summand() -> None:
    ones = np.ones((1, 1, 32), np.float32)
    column = lambda value: np.full((1, 32, 1), value, np.float32)
    start = lambda value: np.full((1, 1, 1), value, np.float32)
    add = lambda value, c, bits: float(
        emulator.matmul(ones, column(value), start(c), bits)[0, 0, 0]
    )
    assert add(2.0**-13, 1, 13) == 1 + 2.0**-8
    assert add(1.75 * 2.0**-13, 1, 13) == 1 + 2.0**-8, "each product is cut to a multiple of 2^-13"
    assert add(1.75 * 2.0**-14, 1, 13) == 1, "32 products below the last bit are all lost"
    assert add(1.75 * 2.0**-14, -1, 13) == -1 and add(-1.75 * 2.0**-14, 1, 13) == 1, (
        "towards zero, whatever the sign"
    )
    assert add(1.75 * 2.0**-14, 1, None) == 1 + 1.75 * 2.0**-9
    assert add(1.0, 2.0**-9, 13) == 32 and add(1.0, 2.0**-8, 13) == 32 + 2.0**-8, (
        "the sum itself is cut to 13 bits as well"
    )
    assert add(0.0, 0.0, 13) == 0


def test_matmul_is_a_matrix_product() -> None:
    generator = np.random.default_rng(3)
    a, b = (
        layout.decode(layout.encode(generator.standard_normal(shape)))
        for shape in ((2, 5, 128), (2, 128, 24))
    )
    c = generator.standard_normal((2, 5, 24)).astype(np.float32)
    exact = a.astype(np.float64) @ b + c
    np.testing.assert_allclose(emulator.matmul(a, b, c, None), exact, rtol=1e-7, atol=1e-6)
    np.testing.assert_allclose(emulator.matmul(a, b, c, 22), exact, atol=2e-5)
    error = np.abs(emulator.matmul(a, b, c, 13) - exact).max()
    assert 1e-4 < error < 0.1


def test_rounding_to_bf16() -> None:
    x = np.random.default_rng(4).integers(0, 1 << 32, 1 << 17, np.uint32).view(np.float32)
    x = np.concatenate([x[np.isfinite(x)], np.float32([0, -0.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8])])
    np.testing.assert_array_equal(
        emulator.to_bf16(x).view(np.uint32),
        x.astype(ml_dtypes.bfloat16).astype(np.float32).view(np.uint32),
    )


def test_shapes_are_checked() -> None:
    made = small(70, 100, 64)
    with pytest.raises(AssertionError, match="cache_len=129"):
        emulator.attend(made.q, *made.block, 70, *made.cache, 129, made.scales)
    with pytest.raises(AssertionError, match="k_block"):
        emulator.attend(made.q, *made.block, 64, *made.cache, 100, made.scales)
    with pytest.raises(AssertionError, match="flush_keys=96"):
        Arithmetic(flush_keys=96)
