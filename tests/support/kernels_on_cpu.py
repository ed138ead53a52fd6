"""The CUDA kernels compiled for this CPU."""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from aapt_deploy.ops.block_causal_attention import kernels
from tests.support.attention_checks import Run

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


def launches(library: ctypes.CDLL) -> Run:
    """Return launches of the kernels in `library` with tensors of this CPU."""

    def launch(
        kernel: str, inputs: Sequence[Tensor], numbers: Sequence[int], outputs: Sequence[Tensor]
    ) -> None:
        assert all(x.is_contiguous() for x in (*inputs, *outputs))
        addresses = [[x.data_ptr() for x in tensors] for tensors in (inputs, outputs)]
        launch_at(library, kernel, addresses[0], numbers, addresses[1])

    return launch


def launch_at(
    library: ctypes.CDLL,
    kernel: str,
    inputs: Sequence[int],
    numbers: Sequence[int],
    outputs: Sequence[int],
) -> None:
    """Launch a kernel in `library` with addresses, as `kernels.Kernels` does on a GPU."""
    shape = kernels.launch_shape(kernel, numbers[0], numbers[1])
    pointers = [[ctypes.c_void_p(at) for at in addresses] for addresses in (inputs, outputs)]
    problem = getattr(library, kernel.replace("aapt_", "run_"))(
        shape.x, shape.y, shape.threads, LATE, *pointers[0], *numbers, *pointers[1]
    )
    assert problem is None, problem.decode()
