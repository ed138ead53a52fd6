"""The Triton kernel without a GPU.

Triton's interpreter runs its arithmetic, and it compiles for Hopper and for Ampere.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

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
for sm in (90, 80):
    for dim in (128, 64):
        pointers = {name: "*bf16" for name in ("q", "k", "v", "k_cache", "v_cache", "out")}
        signature = pointers | {"cache_len": "*i32", "T": "i32", "scale": "fp32"}
        signature |= dict.fromkeys(("H", "D", "ROWS", "KEYS"), "constexpr")
        ordered = {name: signature[name] for name in _attend.arg_names}
        source = ASTSource(_attend, ordered, {"H": 24, "D": dim, "ROWS": ROWS, "KEYS": KEYS})
        made = compile(source, target=GPUTarget("cuda", sm, 32))
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
