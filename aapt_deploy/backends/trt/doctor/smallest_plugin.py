"""The smallest ahead-of-time plugin, for `aapt doctor --tensorrt`.

It computes y = 2 x through the far end of a thread block's shared memory, in three variants:

    small     does TensorRT take PTX into a plan at all
    static    does it start a kernel with more than 48 KiB of static shared memory
    dynamic   does it ask the driver for more than 48 KiB of dynamic shared memory

Our attention stays below; a variant with more tiles in flight would not. Each variant is one
process, because `tensorrt.plugin` takes a name only once.
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
    float* end = memory + AAPT_BYTES / 4 - 1;  // outside if there is less memory than asked for
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
        launch.grid_x, launch.block_x = 1, THREADS
        launch.shared_mem = shared_bytes if dynamic else 0
        extras = trtp.SymIntExprs(1)
        extras[0] = trtp.SymInt32(x.shape[0])
        return "aapt_probe", ptx, launch, extras
