"""The CUDA kernels compiled for this CPU."""

import ctypes
import shutil
import subprocess
from pathlib import Path

from aapt_deploy.ops.block_causal_attention import kernels

COMPILER = shutil.which("g++") or shutil.which("clang++")
DEFAULT = kernels.Variant()
LATE, EARLY = 6, 7  # seeds: even ones do asynchronous work late, odd ones early


def build(source: Path, dim: int, out: Path, variant: kernels.Variant = DEFAULT) -> ctypes.CDLL:
    """Compile `source` with the harness into `out`, and load it."""
    assert COMPILER is not None
    harness = Path(__file__).parent / "kernels_on_cpu.cpp"
    flags = [
        "-std=c++17",
        "-O2",
        "-w",
        "-shared",
        "-fPIC",
        "-ffp-contract=off",
        f"-DAAPT_HEAD_DIM={dim}",
        f"-I{source.parent}",
    ]
    flags += [f"-D{define}" for define in variant.defines(dim)]
    subprocess.run([COMPILER, *flags, harness, "-o", out], check=True)
    loaded = ctypes.CDLL(str(out))
    loaded.ask_for_dynamic(variant.dynamic_bytes(dim))
    loaded.prefetched.restype = ctypes.c_long
    for function in (loaded.run_pack, loaded.run_attend, loaded.run_commit):
        function.restype = ctypes.c_char_p
    return loaded
