"""wgmma alone on a Hopper GPU: register maps, descriptors and swizzles, accumulators, rates.

The kernels of attention_probes.cu against exact products; what an accumulator keeps of a small
summand; TFLOP/s with float32 and with float16 accumulators. A stage of bench/attention.py.
"""

import ctypes
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attention_rivals import timed

from aapt_deploy.ops.block_causal_attention import kernels

PROBES = Path(__file__).parent / "attention_probes.cu"
DIM, SEED = 128, 0
SIZES = {"probe_scores_64": (64, 64), "probe_scores_128": (64, 128), "probe_values_128": (128, 64)}
RATES = ("probe_rate_f32", "probe_rate_f16")


@functools.cache
def probes() -> dict[str, Callable[..., None]]:
    """attention_probes.cu's kernels, called with grid, block size and tensors or int32."""
    from cuda.bindings import driver, nvrtc

    torch.zeros(1, device="cuda")
    source = kernels.source_file().read_bytes() + PROBES.read_bytes()
    cubin = kernels._compile(nvrtc, source, DIM, (), kernels._version(nvrtc)).cubin
    status, library = driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0)
    assert status == driver.CUresult.CUDA_SUCCESS, status

    def launcher(name: str) -> Callable[..., None]:
        kernel = driver.cuLibraryGetKernel(library, name.encode())[1]
        function = driver.cuKernelGetFunction(kernel)[1]

        def launch(grid: int, block: int, *arguments: torch.Tensor | int) -> None:
            values = [
                ctypes.c_int32(a) if isinstance(a, int) else ctypes.c_uint64(a.data_ptr())
                for a in arguments
            ]  # fmt: skip
            pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
            stream = torch.cuda.current_stream().cuda_stream
            at = ctypes.addressof(pointers)
            (status,) = driver.cuLaunchKernel(function, grid, 1, 1, block, 1, 1, 0, stream, at, 0)
            assert status == driver.CUresult.CUDA_SUCCESS, status

        return launch

    return {name: launcher(name) for name in (*SIZES, *RATES)}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def multiply(probe: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [64, K] . b [N, K] by one `multiply` of the kernels, float32."""
    if not torch.cuda.is_available():
        return a.float() @ b.float().T  # `--small`
    c = torch.full((64, len(b)), float("nan"), device="cuda")
    codes = [x.to(torch.float8_e4m3fn).view(torch.uint8).contiguous() for x in (a, b)]
    probes()[probe](1, 128, *codes, c)
    return c


def accumulator() -> dict[str, Any]:
    """What is kept of a small summand beside 2^16.

    Row r of A adds 2^(8 - r), times `factor`, to 256 x 256.
    """
    kept: dict[str, Any] = {}
    exponents = [8 - r for r in range(15)]  # 2^8 .. 2^-6, all normal e4m3 numbers
    for step, column in (("same step of 32", 1), ("the step after", 32)):
        for factor in (1.0, 1.75, -1.0, -1.75):
            a, b = torch.zeros(2, 64, 64, device=device())
            a[:, 0], b[:, 0], b[:, column] = 256, 256, 1
            for row, exponent in enumerate(exponents):
                a[row, column] = factor * 2.0**exponent
            gained = (multiply("probe_scores_64", a, b)[:15, 0] - 65536).tolist()
            shares = {e: g / (factor * 2.0**e) for e, g in zip(exponents, gained, strict=True)}
            kept[f"{step}, {factor} x 2^e"] = shares
    a, b = torch.zeros(2, 64, 64, device=device())
    a[:, 0], b[:, 0], b[:, 1:32] = 256, 256, 1
    for row, exponent in enumerate(exponents):
        a[row, 1:32] = 2.0**exponent
    gained = (multiply("probe_scores_64", a, b)[:15, 0] - 65536).tolist()
    alike = {e: g / (31 * 2.0**e) for e, g in zip(exponents, gained, strict=True)}
    kept["31 alike in the same step"] = alike
    whole = [e for e, share in kept["same step of 32, 1.0 x 2^e"].items() if share == 1.0]
    return {
        "bits_behind_the_largest_summand": 16 - min(whole) if whole else 0,
        "share_kept_beside_2^16": kept,
    }


def rate(name: str) -> float:
    """TFLOP/s of m64n128k32 alone."""
    if not torch.cuda.is_available():
        return 0.0
    data = torch.randint(256, (16384,), dtype=torch.uint8, device="cuda")
    data = (data & 0x8F) | 0x30  # +-0.5 .. 1.9
    out = torch.zeros(256, dtype=torch.int32, device="cuda")
    blocks, turns = 2 * torch.cuda.get_device_properties(0).multi_processor_count, 10_000
    run = lambda: probes()[name](blocks, 256, data, turns, out)
    seconds = statistics.median(timed(run, 1.0))
    return blocks * 2 * turns * 4 * (2 * 64 * 128 * 32) / seconds / 1e12


def exact_product(probe: str) -> dict[str, Any]:
    """Whether a probe gives exact sums of small integers, and where it does not."""
    (n, k), generator = SIZES[probe], torch.Generator(device()).manual_seed(SEED)
    draw = lambda rows: torch.randint(-3, 4, (rows, k), generator=generator, device=device())
    a, b = draw(64).float(), draw(n).float()
    wrong = multiply(probe, a, b) != a @ b.T
    found: dict[str, Any] = {"exact": not bool(wrong.any())}
    if not found["exact"]:
        found["wrong_rows"] = wrong.any(1).nonzero().view(-1).tolist()
        found["wrong_columns"] = wrong.any(0).nonzero().view(-1).tolist()
    return found
