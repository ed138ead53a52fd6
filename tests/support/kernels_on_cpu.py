"""The CUDA kernels compiled for this CPU."""

import ctypes
import shutil
import subprocess
from pathlib import Path

COMPILER = shutil.which("g++") or shutil.which("clang++")


LATE, EARLY = 6, 7  # seeds: even ones do asynchronous work late, odd ones early


def build(source: Path, dim: int, out: Path) -> ctypes.CDLL:
    assert COMPILER is not None
    harness = Path(__file__).parent / "kernels_on_cpu.cpp"
    flags = ["-std=c++17", "-O2", "-w", "-shared", "-fPIC", "-ffp-contract=off", f"-DAAPT_HEAD_DIM={dim}", f"-I{source.parent}"]
    subprocess.run([COMPILER, *flags, harness, "-o", out], check=True)
    loaded = ctypes.CDLL(str(out))
    for function in (loaded.run_pack, loaded.run_attend, loaded.run_commit):
        function.restype = ctypes.c_char_p
    return loaded
