"""The Triton kernel without a GPU.

Triton's interpreter runs its arithmetic, and it compiles for Hopper and for Ampere.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aapt_deploy.ops.block_causal_attention import triton_op
from tests.support import ROOT

Launch = tuple[tuple[int, ...], tuple[object, ...], dict[str, object]]

INTERPRETED = """
import numpy as np, torch
from aapt_deploy.ops.block_causal_attention import reference
from aapt_deploy.ops.block_causal_attention import triton_op
rng = np.random.default_rng(0)
worst = {}
for dtype in (torch.float32, torch.float16):
    for tokens, capacity, cached, heads, dim in [
        (1, 64, 0, 1, 16), (64, 128, 128, 2, 16), (70, 100, 1, 1, 32), (65, 200, 130, 2, 64)
    ]:
        draw = lambda *shape: torch.from_numpy(rng.standard_normal(shape)).to(dtype)
        q, k, v = (draw(1, tokens, heads, dim) for _ in range(3))
        k_cache, v_cache = (draw(1, capacity, heads, dim) for _ in range(2))
        # What is not valid must not be read.
        k_cache[:, cached:], v_cache[:, cached:] = 30.0, float("nan")
        length = torch.tensor([cached], dtype=torch.int32)
        out, k_block, v_block = triton_op.attend(q, k, v, k_cache, v_cache, length)
        assert torch.equal(k_block, k) and k_block.data_ptr() != k.data_ptr()
        assert torch.equal(v_block, v)
        doubles = (x.double().numpy() for x in (q, k, v, k_cache, v_cache))
        expected, *_ = reference.block_causal_attention(*doubles, length.numpy())
        error = np.abs(out.double().numpy() - expected).max()
        worst[str(dtype)] = max(worst.get(str(dtype), 0.0), float(error))
assert worst["torch.float32"] < 1e-5, worst
assert 1e-5 < worst["torch.float16"] < 3e-3, worst
print("done")
"""

COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from aapt_deploy.ops.block_causal_attention.triton_op import KEYS
from aapt_deploy.ops.block_causal_attention.triton_op import ROWS
from aapt_deploy.ops.block_causal_attention.triton_op import _attend
from tests.support.triton_code import check_accesses, check_products
def made_for(sm, dim, kind, tile=(ROWS, KEYS)):
    pointers = {name: kind for name in ("q", "k", "v", "k_cache", "v_cache", "out")}
    signature = pointers | {"cache_len": "*i32", "T": "i32", "scale": "fp32"}
    signature |= dict.fromkeys(("H", "D", "ROWS", "KEYS"), "constexpr")
    ordered = {name: signature[name] for name in _attend.arg_names}
    sizes = {"H": 24, "D": dim, "ROWS": tile[0], "KEYS": tile[1]}
    source = ASTSource(_attend, ordered, sizes)
    made = compile(source, target=GPUTarget("cuda", sm, 32))
    # queries, length; keys and values of the block and of the cache
    check_accesses(made.asm["ttir"], 1 + 1 + 2 * 2, 1)
    check_products(made.asm["ttir"], 2 * 2)
    return made
made_for(80, 16, "*fp32", (16, 16))
for sm in (90, 80):
    for dim in (128, 64):
        made = made_for(sm, dim, "*bf16")
        assert made.metadata.shared <= 100 * 1024, made.metadata.shared
        assert ("wgmma" if sm == 90 else "mma.sync") in made.asm["ptx"]
print("done")
"""


@pytest.mark.parametrize(
    ("code", "variables"),
    [(INTERPRETED, {"TRITON_INTERPRET": "1"}), (COMPILED, {})],
    ids=["interpreted", "compiled"],
)
def test_in_a_process_of_its_own(code: str, variables: dict[str, str], tmp_path: Path) -> None:
    """Triton chooses its interpreter by a variable that it reads when it is imported.

    The interpreter does not know bf16, so fp16 stands for half precision.
    """
    environment = (
        os.environ
        | variables
        | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


class Launched:
    """In the place of the kernel: keeps its grid and what it is given."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *given, **named: self.launches.append((grid, given, named))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    made = Launched()
    monkeypatch.setattr(triton_op, "_attend", made)
    return made


@pytest.mark.parametrize(("tokens", "tiles"), [(1, 1), (64, 1), (65, 2)])
def test_one_program_takes_a_tile_of_rows_of_one_head(
    launched: Launched, tokens: int, tiles: int
) -> None:
    strided = draw(1, 3, tokens, 16).transpose(1, 2)
    k, v, k_cache, v_cache = (draw(1, n, 3, 16) for n in (tokens, tokens, 90, 90))
    length = torch.tensor([7], dtype=torch.int32)
    out = triton_op.attended(strided, k, v, k_cache, v_cache, length)
    ((grid, given, named),) = launched.launches
    assert grid == (tiles, 3) and named == {"H": 3, "D": 16, "ROWS": 64, "KEYS": 64}
    q, *others, count, scale = given
    assert isinstance(q, torch.Tensor) and q.is_contiguous() and torch.equal(q, strided)
    wanted = (k, v, k_cache, v_cache, length, out)
    assert all(found is tensor for found, tensor in zip(others, wanted, strict=True))
    assert out.is_contiguous() and (out.shape, out.dtype) == (q.shape, q.dtype)
    assert count == tokens and scale == pytest.approx(0.25 * math.log2(math.e))


def test_tensors_that_do_not_fit_are_refused_before_a_launch(launched: Launched) -> None:
    x, length = draw(1, 5, 3, 16), torch.tensor([2], dtype=torch.int32)
    gaps = draw(1, 3, 9, 16).transpose(1, 2)
    cache, odd = draw(1, 9, 3, 16), draw(1, 5, 3, 12)
    two = draw(2, 5, 3, 16)
    for given, words in (
        ((two, two, two, cache, cache), r"q\.shape=torch\.Size\(\[2, 5, 3, 16\]\)"),
        ((x, x, x, cache.half(), cache), r"k_cache\.dtype=torch\.float16"),
        ((x, x, x, cache, cache.half()), r"q\.dtype=torch\.float32"),
        ((x.half(), x, x, cache, cache), r"q\.dtype=torch\.float16"),
        ((odd, odd, odd, odd, odd), "dim=12"),
        ((x, x, x, gaps, cache), None),
        ((x, x, x, cache, gaps), None),
    ):
        with pytest.raises(AssertionError, match=words):
            triton_op.attended(*given, length)
    assert launched.launches == []
