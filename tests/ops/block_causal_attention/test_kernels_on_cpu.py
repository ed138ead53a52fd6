"""The kernels' own source, run on a CPU thread by thread: every index, every barrier and every register map, against the layout and the emulator.

tests/kernels_on_cpu.cpp gives the instructions that a CPU lacks their specified meaning, with asynchronous work done as late or as early as it may
be. It does not know a GPU's speed, its accumulator's width or the memory model's finer print.
"""

import ctypes
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

# T, cache capacity, cache_len, heads: one token; nothing cached; an own tile boundary; a ragged tail of both; a full cache; many tiles of both.
CASES = [(1, 64, 0, 2), (64, 64, 64, 2), (63, 70, 1, 1), (65, 200, 130, 1), (150, 320, 320, 1), (300, 640, 600, 1)]


@pytest.fixture(scope="module", params=layout.HEAD_DIMS, ids=lambda dim: f"D{dim}")
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, ctypes.CDLL]:
    return request.param, build(kernels.source_file(), request.param, tmp_path_factory.mktemp("cpu") / "kernels.so")


def bf16(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32).astype(ml_dtypes.bfloat16)


def run(library: ctypes.CDLL, kernel: str, inputs: list[np.ndarray], numbers: tuple[int, int, int] | tuple[int, int], outputs: list[np.ndarray],
        seed: int) -> None:  # fmt: skip
    """Launch as `kernels.Kernels` does."""
    shape = kernels.launch_shape(kernel, numbers[0], numbers[1])
    arrays = [np.ascontiguousarray(x) for x in inputs]
    assert all(x.flags.c_contiguous for x in outputs)
    where: Callable[[np.ndarray], Any] = lambda x: ctypes.c_void_p(x.ctypes.data)
    function = getattr(library, kernel.replace("aapt_", "run_"))
    problem = function(shape.x, shape.y, shape.threads, seed, *map(where, arrays), *numbers, *map(where, outputs))
    assert problem is None, problem.decode()


class Data:
    """Random inputs of one case, quantised by the layout's own code."""

    def __init__(self, dim: int, tokens: int, capacity: int, heads: int) -> None:
        rng = np.random.default_rng(tokens)
        self.q, self.k, self.v = (bf16(2 * rng.standard_normal((tokens, heads, dim))) for _ in range(3))
        self.past = [bf16(2 * rng.standard_normal((capacity, heads, dim))).astype(np.float32) for _ in range(2)]
        own = [x.astype(np.float32) for x in (self.q, self.k, self.v)]
        self.scales = layout.calibrate(own[0], np.concatenate([own[1], self.past[0]]), np.concatenate([own[2], self.past[1]]), smooth_k=True)
        self.block = layout.pack(own[1], own[2], self.scales)
        self.cache = layout.pack(*self.past, self.scales)


@pytest.mark.parametrize(("tokens", "capacity", "cached", "heads"), CASES)
def test_pack_writes_the_layouts_bytes(library: tuple[int, ctypes.CDLL], tokens: int, capacity: int, cached: int, heads: int) -> None:
    dim, code = library
    data = Data(dim, tokens, capacity, heads)
    images = [np.full_like(image, 0x7F) for image in data.block]
    s = data.scales
    run(code, "aapt_pack", [data.k, data.v, s.k_scale, s.k_mean, s.v_scale], (tokens, heads), images, LATE)
    np.testing.assert_array_equal(images[0], data.block[0])
    np.testing.assert_array_equal(images[1], data.block[1])


@pytest.mark.parametrize("seed", [LATE, EARLY], ids=["late", "early"])
@pytest.mark.parametrize(("tokens", "capacity", "cached", "heads"), CASES)
def test_attend_computes_what_the_emulator_does(
    library: tuple[int, ctypes.CDLL], tokens: int, capacity: int, cached: int, heads: int, seed: int
) -> None:
    """Both accumulate exactly here, so they differ by the roundings of P's last float32 bits alone."""
    dim, code = library
    data = Data(dim, tokens, capacity, heads)
    out = np.full(data.q.shape, np.nan, ml_dtypes.bfloat16)
    s = data.scales
    inputs = [data.q, *data.block, *data.cache, np.array([cached], np.int32), s.q_scale, s.k_scale, s.v_scale]
    run(code, "aapt_attend", inputs, (tokens, heads, data.cache[0].shape[1]), [out], seed)
    expected = emulator.attend(data.q.astype(np.float32), *data.block, tokens, *data.cache, cached, s, emulator.EXACT)
    error = np.sqrt(np.square(out.astype(np.float32) - expected).mean() / np.square(expected).mean())
    assert error < 1e-3
    assert (out.astype(np.float32) == expected).mean() > 0.97


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
        run(code, "aapt_commit", [*data.block, np.array([slot], np.int32)], (tokens, heads, tiles), found, LATE)
        np.testing.assert_array_equal(found[0], expected[0], err_msg=f"{slot=}")
        np.testing.assert_array_equal(found[1], expected[1], err_msg=f"{slot=}")


def test_quantisation_is_the_layouts_on_every_bf16_value(library: tuple[int, ctypes.CDLL]) -> None:
    values = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    values = np.concatenate([values[~np.isnan(values)], 100 * np.random.default_rng(0).standard_normal(100_000).astype(np.float32)])
    found = np.zeros(len(values), np.uint8)
    library[1].quantise(ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(found.ctypes.data), ctypes.c_long(len(values)))
    np.testing.assert_array_equal(found, layout.encode(values))


MISTAKES = {
    "a tile is given back before it was read": (
        "        multiply_wait<0>();\n        touch(t);\n        touch(p);\n        if (lane == 0) barrier_arrive(ring.v_empty(v.slot));",
        "        if (lane == 0) barrier_arrive(ring.v_empty(v.slot));\n        multiply_wait<0>();\n        touch(t);\n        touch(p);",
    ),
    "P is overwritten while it is read": (
        "        touch(s);\n        // The wait",
        "        touch(s);\n        to_operand(s, p);\n        // The wait",
    ),
    "V is not waited for": ("        barrier_wait(ring.v_full(v.slot), v.parity);\n        multiply(t, p,", "        multiply(t, p,"),
    "the cache's tail is not masked": ("if (visit == visits.block_tiles) mask(s, cache_tail, lane);", ""),
    "the accumulator is not rescaled": (
        "acc[i] = fmaf(acc[i], rescale[i >> 1 & 1], t[i]);\n        to_operand",
        "acc[i] += t[i];\n        to_operand",
    ),
    "a slot is never given back": ("        if (lane == 0) barrier_arrive(ring.v_empty(v.slot));\n        v.next();", "        v.next();"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_found(mistake: str, tmp_path: Path) -> None:
    """What would corrupt a result on a GPU now and then has to do so here every time."""
    before, after = MISTAKES[mistake]
    source = kernels.source_file().read_text()
    assert source.count(before) == 1, "the source has moved on; plant the mistake anew"
    (tmp_path / kernels.source_file().name).write_text(source.replace(before, after))
    code = build(tmp_path / kernels.source_file().name, 128, tmp_path / "wrong.so")
    data = Data(128, 300, 640, 1)
    s, found = data.scales, []
    for seed in (LATE, EARLY, LATE + 2, EARLY + 2):
        out = np.zeros(data.q.shape, ml_dtypes.bfloat16)
        inputs = [data.q, *data.block, *data.cache, np.array([600], np.int32), s.q_scale, s.k_scale, s.v_scale]
        try:
            run(code, "aapt_attend", inputs, (300, 1, data.cache[0].shape[1]), [out], seed)
        except AssertionError:
            found.append(True)
            continue
        expected = emulator.attend(data.q.astype(np.float32), *data.block, 300, *data.cache, 600, s, emulator.EXACT)
        error = np.sqrt(np.square(out.astype(np.float32) - expected).mean() / np.square(expected).mean())
        found.append(not error < 1e-3)
    assert any(found)
