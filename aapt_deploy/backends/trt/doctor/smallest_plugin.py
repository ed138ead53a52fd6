"""The smallest ahead-of-time plugin there is, for `aapt doctor --tensorrt`: y = 2 x by way of the far end of a thread block's shared memory.

Does TensorRT take PTX into a plan at all, does it start a kernel whose static shared memory is above 48 KiB, and does it ask the driver for dynamic
shared memory above that? Our attention stays below; whoever makes a variant with more tiles in flight must know. Each question is one variant, and
one process: `tensorrt.plugin` takes a name only once.
"""

import tensorrt.plugin as trtp

from aapt_deploy.ops.block_causal_attention import PLUGIN_NAMESPACE, kernels

NAME = "Probe"
ID = f"{PLUGIN_NAMESPACE}::{NAME}"
THREADS = 64  # one each for an element of x
SMALL, LARGE = 1 << 10, 64 << 10  # bytes of shared memory

SOURCE = b"""
extern "C" __global__ void aapt_probe(const float* x, int n, float* y) {
#ifdef AAPT_DYNAMIC
    extern __shared__ float memory[];
#else
    __shared__ float memory[AAPT_BYTES / 4];
#endif
    float* end = memory + AAPT_BYTES / 4 - 1;  // if there is less memory than was asked for, this is outside of it
    if (threadIdx.x < n) end[-int(threadIdx.x)] = x[threadIdx.x];
    __syncthreads();
    if (threadIdx.x < n) y[threadIdx.x] = 2 * end[-int(threadIdx.x)];
}
"""


def define(shared_bytes: int, dynamic: bool) -> None:
    """Define the plugin in one variant. Raises MachineError without NVRTC."""
    defines = (f"AAPT_BYTES={shared_bytes}", *(("AAPT_DYNAMIC=1",) if dynamic else ()))
    ptx = kernels.compile_source(SOURCE, defines).ptx.decode()

    @trtp.register(ID)  # type: ignore[untyped-decorator]
    def describe(x: trtp.TensorDesc) -> trtp.TensorDesc:
        return x.like()

    @trtp.autotune(ID)  # type: ignore[untyped-decorator]
    def formats(
        x: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc]
    ) -> list[trtp.AutoTuneCombination]:
        return [trtp.AutoTuneCombination("FP32, FP32", "LINEAR")]

    @trtp.aot_impl(ID)  # type: ignore[untyped-decorator]
    def kernel(
        x: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc], tactic: int
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.block_x, launch.shared_mem = (
            1,
            THREADS,
            shared_bytes if dynamic else 0,
        )
        extras = trtp.SymIntExprs(1)
        extras[0] = trtp.SymInt32(x.shape[0])
        return "aapt_probe", ptx, launch, extras
