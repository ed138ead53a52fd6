"""The kernels' own source on a CPU, thread by thread, against the layout and the emulator.

tests/support/kernels_on_cpu.cpp gives the instructions that a CPU lacks their specified meaning,
with asynchronous work done as late or as early as it may be. It does not know a GPU's speed, its
accumulator's width or the memory model's finer print.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from aapt_deploy.ops.block_causal_attention import emulator, kernels
from aapt_deploy.ops.block_causal_attention import hopper_fp8 as layout
from tests.support.kernels_on_cpu import COMPILER, EARLY, LATE, build

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")
PLAINEST = kernels.VARIANTS["as first written"]
Plainest = Callable[[int, tuple[int, ...]], np.ndarray]

# T, cache capacity, cache_len, heads: one token; nothing cached; an own tile boundary; a ragged
# tail of both; a full cache; many tiles of both.
CASES = [
    (1, 64, 0, 2),
    (64, 64, 64, 2),
    (63, 70, 1, 1),
    (65, 200, 130, 1),
    (150, 320, 320, 1),
    (300, 640, 600, 1),
]


@pytest.fixture(scope="module", params=layout.HEAD_DIMS, ids=lambda dim: f"D{dim}")
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, ctypes.CDLL]:
    return request.param, build(
        kernels.source_file(), request.param, tmp_path_factory.mktemp("cpu") / "kernels.so"
    )


def bf16(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32).astype(ml_dtypes.bfloat16)


def run(
    library: ctypes.CDLL,
    kernel: str,
    inputs: list[np.ndarray],
    numbers: tuple[int, int, int] | tuple[int, int],
    outputs: list[np.ndarray],
    seed: int,
) -> None:
    """Launch as `kernels.Kernels` does."""
    shape = kernels.launch_shape(kernel, numbers[0], numbers[1])
    arrays = [np.ascontiguousarray(x) for x in inputs]
    assert all(x.flags.c_contiguous for x in outputs)
    where: Callable[[np.ndarray], Any] = lambda x: ctypes.c_void_p(x.ctypes.data)
    function = getattr(library, kernel.replace("aapt_", "run_"))
    problem = function(
        shape.x, shape.y, shape.threads, seed, *map(where, arrays), *numbers, *map(where, outputs)
    )
    assert problem is None, problem.decode()


class Data:
    """Random inputs of one case, quantised by the layout's own code."""

    def __init__(self, dim: int, tokens: int, capacity: int, heads: int) -> None:
        rng = np.random.default_rng(tokens)
        self.q, self.k, self.v = (
            bf16(2 * rng.standard_normal((tokens, heads, dim))) for _ in range(3)
        )
        self.past = [
            bf16(2 * rng.standard_normal((capacity, heads, dim))).astype(np.float32)
            for _ in range(2)
        ]
        own = [x.astype(np.float32) for x in (self.q, self.k, self.v)]
        self.scales = layout.calibrate(
            own[0],
            np.concatenate([own[1], self.past[0]]),
            np.concatenate([own[2], self.past[1]]),
            smooth_k=True,
        )
        self.block = layout.pack(own[1], own[2], self.scales)
        self.cache = layout.pack(*self.past, self.scales)


@pytest.mark.parametrize(("tokens", "capacity", "cached", "heads"), CASES)
def test_pack_writes_the_layouts_bytes(
    library: tuple[int, ctypes.CDLL], tokens: int, capacity: int, cached: int, heads: int
) -> None:
    dim, code = library
    data = Data(dim, tokens, capacity, heads)
    images = [np.full_like(image, 0x7F) for image in data.block]
    s = data.scales
    run(
        code,
        "aapt_pack",
        [data.k, data.v, s.k_scale, s.k_mean, s.v_scale],
        (tokens, heads),
        images,
        LATE,
    )
    np.testing.assert_array_equal(images[0], data.block[0])
    np.testing.assert_array_equal(images[1], data.block[1])


@pytest.mark.parametrize("seed", [LATE, EARLY], ids=["late", "early"])
@pytest.mark.parametrize(("tokens", "capacity", "cached", "heads"), CASES)
def test_attend_computes_what_the_emulator_does(
    library: tuple[int, ctypes.CDLL], tokens: int, capacity: int, cached: int, heads: int, seed: int
) -> None:
    """Both accumulate exactly here.

    So they differ by the roundings of P's last float32 bits alone.
    """
    dim, code = library
    out, expected = attended(code, Data(dim, tokens, capacity, heads), cached, seed)
    error = np.sqrt(
        np.square(out.astype(np.float32) - expected).mean() / np.square(expected).mean()
    )
    assert error < 1e-3
    assert (out.astype(np.float32) == expected).mean() > 0.97


def attended(
    library: ctypes.CDLL,
    data: Data,
    cached: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """What aapt_attend makes of `data`, and what the emulator does."""
    (tokens, heads, _), s = data.q.shape, data.scales
    out = np.full(data.q.shape, np.nan, ml_dtypes.bfloat16)
    length = np.array([cached], np.int32)
    inputs = [data.q, *data.block, *data.cache, length, s.q_scale, s.k_scale, s.v_scale]
    run(library, "aapt_attend", inputs, (tokens, heads, data.cache[0].shape[1]), [out], seed)
    q = data.q.astype(np.float32)
    return out, emulator.attend(q, *data.block, tokens, *data.cache, cached, s, emulator.EXACT)


@pytest.fixture(scope="module")
def plainest(tmp_path_factory: pytest.TempPathFactory) -> Plainest:
    """What the plainest variant makes of a case, which the emulator agrees with."""
    folder, built = tmp_path_factory.mktemp("plainest"), {}

    @functools.cache
    def made(dim: int, case: tuple[int, int, int, int]) -> np.ndarray:
        if dim not in built:
            built[dim] = build(kernels.source_file(), dim, folder / f"{dim}.so", PLAINEST)
        tokens, capacity, cached, heads = case
        out, emulated = attended(built[dim], Data(dim, tokens, capacity, heads), cached, LATE)
        error = np.square(out.astype(np.float32) - emulated).mean()
        assert error < 1e-6 * np.square(emulated).mean()
        return out

    return made


OTHERS = [(name, 128) for name in list(kernels.VARIANTS)[1:]] + [("K6V5, prefetch 8", 64)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dim"), OTHERS)
def test_every_variant_gives_the_same_bits(
    name: str,
    dim: int,
    plainest: Plainest,
    tmp_path: Path,
) -> None:
    """And prefetches each tile that lies far enough ahead once, by one of its head's blocks."""
    variant = kernels.VARIANTS[name]
    code = build(kernels.source_file(), dim, tmp_path / "variant.so", variant)
    for case, seeds in ((CASES[3], [LATE]), (CASES[5], [LATE, EARLY])):
        tokens, capacity, cached, heads = case
        data = Data(dim, tokens, capacity, heads)
        for seed in seeds:
            out, _ = attended(code, data, cached, seed)
            np.testing.assert_array_equal(out.view(np.uint16), plainest(dim, case).view(np.uint16))
            assert prefetched(code) == tiles_ahead(data, cached, variant.prefetch)


def prefetched(library: ctypes.CDLL) -> list[int]:
    """Addresses of all prefetches since the last look, sorted."""
    room = (ctypes.c_uint64 * 1000)()
    count = library.prefetched(room, ctypes.c_long(len(room)))
    assert count <= len(room)
    return sorted(room[:count])


def tiles_ahead(data: Data, cached: int, ahead: int) -> list[int]:
    """Addresses of the tiles that all thread blocks of a launch together prefetch, sorted."""
    found, valid = [], layout.tiles(cached)
    for images in zip(data.block, data.cache, strict=True):
        for head in range(images[0].shape[0]):
            visits: list[int] = []
            for image, used in zip(images, (images[0].shape[1], valid), strict=True):
                visits += [image[head, tile].ctypes.data for tile in reversed(range(used))]
            found += visits[ahead:] if ahead else []
    return sorted(found)


@pytest.mark.parametrize(("tokens", "capacity", "cached", "heads"), CASES)
def test_commit_moves_a_block_to_any_slot_and_nothing_else(
    library: tuple[int, ctypes.CDLL], tokens: int, capacity: int, cached: int, heads: int
) -> None:
    dim, code = library
    data = Data(dim, tokens, capacity, heads)
    tiles = data.cache[0].shape[1]
    last = tiles * layout.TILE_KEYS - tokens
    for slot in sorted({0, min(1, last), last // 2, last, last + 1, -1}):
        expected, found = ([image.copy() for image in data.cache] for _ in range(2))
        if 0 <= slot <= last:
            layout.commit(*data.block, tokens, slot, *expected)
        run(
            code,
            "aapt_commit",
            [*data.block, np.array([slot], np.int32)],
            (tokens, heads, tiles),
            found,
            LATE,
        )
        np.testing.assert_array_equal(found[0], expected[0], err_msg=f"{slot=}")
        np.testing.assert_array_equal(found[1], expected[1], err_msg=f"{slot=}")


def test_quantisation_is_the_layouts_on_every_bf16_value(library: tuple[int, ctypes.CDLL]) -> None:
    values = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    values = np.concatenate(
        [
            values[~np.isnan(values)],
            100 * np.random.default_rng(0).standard_normal(100_000).astype(np.float32),
        ]
    )
    found = np.zeros(len(values), np.uint8)
    library[1].quantise(
        ctypes.c_void_p(values.ctypes.data),
        ctypes.c_void_p(found.ctypes.data),
        ctypes.c_long(len(values)),
    )
    np.testing.assert_array_equal(found, layout.encode(values))


MISTAKES = {
    "a tile is given back before it was read": (
        "        multiply_wait<0>();\n        touch(t);\n        touch(p);\n"
        "        if (lane == 0) barrier_arrive(ring.v_empty(v.slot));",
        "        if (lane == 0) barrier_arrive(ring.v_empty(v.slot));\n"
        "        multiply_wait<0>();\n        touch(t);\n        touch(p);",
    ),
    "P is overwritten while it is read": (
        "        touch(s);\n        // The wait",
        "        touch(s);\n        to_operand(s, p);\n        // The wait",
    ),
    "V is not waited for": (
        "        barrier_wait(ring.v_full(v.slot), v.parity);\n        multiply(t, p,",
        "        multiply(t, p,",
    ),
    "the cache's tail is not masked": (
        "if (visit == visits.block_tiles) mask(s, cache_tail, lane);",
        "",
    ),
    "the accumulator is not rescaled": (
        "acc[i] = fmaf(acc[i], rescale[i >> 1 & 1], t[i]);\n        to_operand",
        "acc[i] += t[i];\n        to_operand",
    ),
    "a slot is never given back": (
        "        if (lane == 0) barrier_arrive(ring.v_empty(v.slot));\n        v.next();",
        "        v.next();",
    ),
    "a consumer without rows is waited for": (
        "blockIdx.x * QUERY_ROWS + 64 < T ? CONSUMER_WARPS : CONSUMER_WARPS / 2",
        "CONSUMER_WARPS",
    ),
    "a consumer with one row leaves": ("if (first >= T) return;", "if (first + 1 >= T) return;"),
}
DEEP_MISTAKES = {
    "the ring is not aligned": ("(place + SWIZZLE_ATOM - 1) & ~(SWIZZLE_ATOM - 1u)", "place"),
    "the ring is larger than asked for": (
        "return base + (RING_K + RING_V) * TILE_BYTES + 8 * index;",
        "return base + (RING_K + RING_V) * TILE_BYTES + 1024 + 8 * index;",
    ),
    "every block prefetches every tile": (" && ahead % (int)gridDim.x == (int)blockIdx.x", ""),
    "a prefetch goes past the last tile": ("if (PREFETCH && ahead < count", "if (PREFETCH"),
    "V is not prefetched": ("            prefetch_l2(visits.tile(ahead, v_block, v_cache)", "//"),
}
DEEP = "K6V5, prefetch 8"


def planted(before: str, after: str, variant: kernels.Variant, folder: Path) -> ctypes.CDLL:
    """The kernels with a mistake in their source."""
    source = kernels.source_file().read_text()
    assert source.count(before) == 1, "the source has moved on; plant the mistake anew"
    (folder / kernels.source_file().name).write_text(source.replace(before, after))
    return build(folder / kernels.source_file().name, 128, folder / "wrong.so", variant)


@pytest.mark.parametrize("name", ["as first written", DEEP])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_found(mistake: str, name: str, tmp_path: Path) -> None:
    """What would corrupt a result on a GPU now and then has to do so here every time."""
    code = planted(*MISTAKES[mistake], kernels.VARIANTS[name], tmp_path)
    assert any(noticed(code, tokens, 0) for tokens in (257, 300))


@pytest.mark.parametrize("mistake", DEEP_MISTAKES)
def test_mistakes_in_what_a_variant_adds_are_found(mistake: str, tmp_path: Path) -> None:
    code = planted(*DEEP_MISTAKES[mistake], kernels.VARIANTS[DEEP], tmp_path)
    assert noticed(code, 300, kernels.VARIANTS[DEEP].prefetch)


def test_without_a_mistake_nothing_is_noticed(tmp_path: Path) -> None:
    variant = kernels.VARIANTS[DEEP]
    code = build(kernels.source_file(), 128, tmp_path / "right.so", variant)
    assert not noticed(code, 257, variant.prefetch) and not noticed(code, 300, variant.prefetch)


def noticed(code: ctypes.CDLL, tokens: int, prefetch: int) -> bool:
    """Whether a launch is refused, is wrong, or does not prefetch what `prefetch` asks for."""
    data = Data(128, tokens, 640, 1)
    for seed in (LATE, EARLY, LATE + 2, EARLY + 2):
        try:
            out, expected = attended(code, data, 600, seed)
        except AssertionError:
            return True
        error = np.square(out.astype(np.float32) - expected).mean() / np.square(expected).mean()
        if not error < 1e-6 or (prefetch and prefetched(code) != tiles_ahead(data, 600, prefetch)):
            return True
    return False
