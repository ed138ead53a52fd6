"""BlockCausalAttention as two ahead-of-time TensorRT plugins (`tensorrt.plugin`).

The plan contains the kernels and needs no Python to run.

    aapt::BlockCausalAttentionPack    (k, v, k_scale, k_mean, v_scale) -> (k_block, v_block)
    aapt::BlockCausalAttentionAttend  (q, k_block, v_block, k_cache, v_cache, cache_len, q_scale,
                                       k_scale, v_scale) -> out

A plugin of this form is one kernel, so the op's two kernels are two plugins. Layout hopper_fp8,
with the kernels' own parameter order (inputs, int32 numbers, outputs). It is the optional form:
TensorRT compiles PTX through the driver and passes at most 48 KiB of dynamic shared memory. `aapt
doctor` checks whether a kernel with more static shared memory starts. python.py has no such limit.

`tensorrt.plugin` has rules that it does not document, and this file keeps them. Annotations must be
real types (no postponed evaluation). `tactic` must be a parameter, and numbers `SymInt32`. Launch
parameters must be made while TensorRT asks. Only PTX is an image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorrt as trt
import tensorrt.plugin as trtp

from aapt_deploy.backends.trt.plugin.python import ATTEND, PACK
from aapt_deploy.errors import BundleError
from aapt_deploy.ops.block_causal_attention import NAME, PLUGIN_NAMESPACE
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import TILE_KEYS

PACK_ID, ATTEND_ID = (f"{PLUGIN_NAMESPACE}::{NAME}{part}" for part in ("Pack", "Attend"))
MOST_DYNAMIC_SHARED_BYTES = 48 << 10

Sizes3 = tuple[int, int, int]


@dataclass(frozen=True)
class Compiled:
    """Kernel inside the plan, for given sizes."""

    name: str  # as the PTX spells it
    ptx: str
    grid: Sizes3
    block: Sizes3
    dynamic_shared_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.ptx.lstrip().startswith(("//", ".version")):
            hint = "compile it to PTX, or build with the Python plugin"
            text = f"kernel {self.name} is no PTX; TensorRT embeds nothing else"
            raise BundleError(text, hint)
        if self.dynamic_shared_bytes > MOST_DYNAMIC_SHARED_BYTES:
            wants = f"wants {self.dynamic_shared_bytes} bytes of dynamic shared memory"
            most = f"a self-contained plan passes at most {MOST_DYNAMIC_SHARED_BYTES}"
            raise BundleError(f"kernel {self.name} {wants}; {most}", "build with the Python plugin")


Compile = Callable[[str, int, int, int], Compiled]  # (kernel, tokens T, heads H, head_dim D)


_DEFINED: list[Compile] = []  # tensorrt.plugin takes a name once a process


def define_once(launch_of: Callable[[str, int, int, int], Any]) -> None:
    """Define both plugins, unless that was done before.

    `launch_of` is kernels.ptx_launch: PTX and launch shape of a kernel for given sizes.
    """

    def compile_kernel(kernel: str, tokens: int, heads: int, head_dim: int) -> Compiled:
        launch = launch_of(kernel, tokens, heads, head_dim)
        return Compiled(launch.name, launch.ptx, launch.grid, launch.block)

    if not _DEFINED:
        define(compile_kernel)
        _DEFINED.append(compile_kernel)


def define(compile_kernel: Compile, lazy: bool = False) -> None:
    """Define both plugins, once a process.

    They join TensorRT's registry now, or (`lazy`) when a network first adds one.
    """
    _define_pack(compile_kernel, lazy)
    _define_attend(compile_kernel, lazy)


def _define_pack(compile_kernel: Compile, lazy: bool) -> None:
    @trtp.register(PACK_ID, lazy_register=lazy)  # type: ignore[untyped-decorator]
    def describe(
        k: trtp.TensorDesc,
        v: trtp.TensorDesc,
        k_scale: trtp.TensorDesc,
        k_mean: trtp.TensorDesc,
        v_scale: trtp.TensorDesc,
    ) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
        _, tokens, heads, head_dim = k.shape_expr
        shape = (heads, trtp.cdiv(tokens, TILE_KEYS), head_dim * TILE_KEYS)
        fp8 = trt.DataType.FP8
        return trtp.from_shape_expr(shape, fp8), trtp.from_shape_expr(shape, fp8)

    @trtp.autotune(PACK_ID)  # type: ignore[untyped-decorator]
    def formats(
        k: trtp.TensorDesc,
        v: trtp.TensorDesc,
        k_scale: trtp.TensorDesc,
        k_mean: trtp.TensorDesc,
        v_scale: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        return [trtp.AutoTuneCombination("BF16, BF16, FP32, FP32, FP32, FP8, FP8", "LINEAR")]

    @trtp.aot_impl(PACK_ID)  # type: ignore[untyped-decorator]
    def kernel(
        k: trtp.TensorDesc,
        v: trtp.TensorDesc,
        k_scale: trtp.TensorDesc,
        k_mean: trtp.TensorDesc,
        v_scale: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        _, tokens, heads, head_dim = k.shape
        return _answer(compile_kernel(PACK, tokens, heads, head_dim), (tokens, heads))


def _define_attend(compile_kernel: Compile, lazy: bool) -> None:
    @trtp.register(ATTEND_ID, lazy_register=lazy)  # type: ignore[untyped-decorator]
    def describe(
        q: trtp.TensorDesc,
        k_block: trtp.TensorDesc,
        v_block: trtp.TensorDesc,
        k_cache: trtp.TensorDesc,
        v_cache: trtp.TensorDesc,
        cache_len: trtp.TensorDesc,
        q_scale: trtp.TensorDesc,
        k_scale: trtp.TensorDesc,
        v_scale: trtp.TensorDesc,
    ) -> trtp.TensorDesc:
        return q.like()

    @trtp.autotune(ATTEND_ID)  # type: ignore[untyped-decorator]
    def formats(
        q: trtp.TensorDesc,
        k_block: trtp.TensorDesc,
        v_block: trtp.TensorDesc,
        k_cache: trtp.TensorDesc,
        v_cache: trtp.TensorDesc,
        cache_len: trtp.TensorDesc,
        q_scale: trtp.TensorDesc,
        k_scale: trtp.TensorDesc,
        v_scale: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        types = "BF16, FP8, FP8, FP8, FP8, INT32, FP32, FP32, FP32, BF16"
        return [trtp.AutoTuneCombination(types, "LINEAR")]

    @trtp.aot_impl(ATTEND_ID)  # type: ignore[untyped-decorator]
    def kernel(
        q: trtp.TensorDesc,
        k_block: trtp.TensorDesc,
        v_block: trtp.TensorDesc,
        k_cache: trtp.TensorDesc,
        v_cache: trtp.TensorDesc,
        cache_len: trtp.TensorDesc,
        q_scale: trtp.TensorDesc,
        k_scale: trtp.TensorDesc,
        v_scale: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        _, tokens, heads, head_dim = q.shape
        compiled = compile_kernel(ATTEND, tokens, heads, head_dim)
        return _answer(compiled, (tokens, heads, k_cache.shape[1]))


def _answer(compiled: Compiled, numbers: tuple[int, ...]) -> tuple[str, str, Any, Any]:
    """Return what an aot_impl returns.

    Call it only while TensorRT asks: made earlier, the numbers would silently be empty.
    """
    launch = trtp.KernelLaunchParams()
    launch.grid_x, launch.grid_y, launch.grid_z = compiled.grid
    launch.block_x, launch.block_y, launch.block_z = compiled.block
    launch.shared_mem = compiled.dynamic_shared_bytes
    extras = trtp.SymIntExprs(len(numbers))
    for index, number in enumerate(numbers):
        extras[index] = trtp.SymInt32(number)
    return compiled.name, compiled.ptx, launch, extras
