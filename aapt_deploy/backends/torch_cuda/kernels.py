"""The kernels of the torch engine's step: a GPU's, or a plain form for any device.

The plain form is the reference. It takes torch for the small operations and the FP8 products, and
NumPy for attention and the cache's tiles. So the engine's whole graph of operations runs, and is
compared, on a CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aapt_deploy.ops import fused
from aapt_deploy.ops.block_causal_attention import emulator, hopper_fp8, torch_op


@dataclass(frozen=True)
class AttentionScales:
    """hopper_fp8.Scales of one layer, on the device."""

    q: Tensor  # [H]
    k: Tensor  # [H]
    k_mean: Tensor  # [H, D]
    v: Tensor  # [H, D]

    @classmethod
    def of(cls, scales: hopper_fp8.Scales, device: torch.device) -> "AttentionScales":
        arrays = (scales.q_scale, scales.k_scale, scales.k_mean, scales.v_scale)
        packed = (np.ascontiguousarray(array, np.float32) for array in arrays)
        return cls(*(torch.from_numpy(array).to(device) for array in packed))

    def numpy(self) -> hopper_fp8.Scales:
        tensors = (self.q, self.k, self.k_mean, self.v)
        return hopper_fp8.Scales(*(tensor.cpu().numpy() for tensor in tensors))


# k, v [1, T, H, D], scales -> k_block, v_block
Pack = Callable[[Tensor, Tensor, AttentionScales, Tensor, Tensor], None]
# q, k_block, v_block, caches, cache_len, scales
AttendTiles = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, AttentionScales], Tensor]
# k_block, v_block, slot, caches, tokens; a slot below 0 is skipped
CommitTiles = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], None]
# q, k, v, caches, cache_len
AttendTokens = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Kernels:
    """One kernel for each operation. The first six are those of ops/fused.py."""

    modulated: Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]
    gated: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, Tensor | None], Pair]
    heads: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
    activated: Callable[[Tensor, Tensor | None], Tensor]
    quantised: Callable[[Tensor, Tensor], Tensor]
    product: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
    pack: Pack
    attend_tiles: AttendTiles
    commit_tiles: CommitTiles
    attend_tokens: AttendTokens


def plain() -> Kernels:
    """Return the plain form, for any device; it is slow and waits for the device."""
    return Kernels(
        fused.modulated, fused.gated, fused.heads, fused.activated, fused.quantised, fused.product,
        _pack, _attend_tiles, _commit_tiles, _attend_tokens,
    )  # fmt: skip


def on_gpu() -> Kernels:
    """Return the kernels for a CUDA device; those of FP8 attention are for Hopper only.

    Triton compiles at the first call of each shape, NVRTC at the first in a process.
    """
    from aapt_deploy.ops import fused_triton
    from aapt_deploy.ops.block_causal_attention import cuda_op, triton_op

    def pack(k: Tensor, v: Tensor, s: AttentionScales, k_block: Tensor, v_block: Tensor) -> None:
        cuda_op.pack_into(k, v, s.k, s.k_mean, s.v, k_block, v_block)

    def attend(
        q: Tensor, k_block: Tensor, v_block: Tensor, k_cache: Tensor, v_cache: Tensor,
        cache_len: Tensor, s: AttentionScales,
    ) -> Tensor:  # fmt: skip
        out = torch.empty_like(q)
        cuda_op.attend_into(q, k_block, v_block, k_cache, v_cache, cache_len, s.q, s.k, s.v, out)
        return out

    return Kernels(
        fused_triton.modulated, fused_triton.gated, fused_triton.heads, fused_triton.activated,
        fused_triton.quantised, fused_triton.product, pack, attend, cuda_op.commit_into,
        triton_op.attended,
    )  # fmt: skip


def _pack(k: Tensor, v: Tensor, s: AttentionScales, k_block: Tensor, v_block: Tensor) -> None:
    images = hopper_fp8.pack(_array(k[0]), _array(v[0]), s.numpy())
    for block, image in zip((k_block, v_block), images, strict=True):
        block.copy_(torch.from_numpy(image))


def _attend_tiles(
    q: Tensor, k_block: Tensor, v_block: Tensor, k_cache: Tensor, v_cache: Tensor,
    cache_len: Tensor, s: AttentionScales,
) -> Tensor:  # fmt: skip
    images = (image.cpu().numpy() for image in (k_block, v_block, k_cache, v_cache))
    block_k, block_v, cached_k, cached_v = images
    out = emulator.attend(
        _array(q[0]), block_k, block_v, q.shape[1], cached_k, cached_v, int(cache_len),
        s.numpy(), emulator.EXACT,
    )  # fmt: skip
    return torch.from_numpy(np.ascontiguousarray(out))[None].to(q)


def _commit_tiles(
    k_block: Tensor, v_block: Tensor, slot: Tensor, k_cache: Tensor, v_cache: Tensor, tokens: int
) -> None:
    if int(slot) < 0:
        return
    caches = [cache.cpu().numpy().copy() for cache in (k_cache, v_cache)]
    blocks = k_block.cpu().numpy(), v_block.cpu().numpy()
    hopper_fp8.commit(*blocks, tokens, int(slot), *caches)
    for target, made in zip((k_cache, v_cache), caches, strict=True):
        target.copy_(torch.from_numpy(made))


def _attend_tokens(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_len: Tensor
) -> Tensor:
    n = int(cache_len)
    return torch_op.attend_to(q, k, v, k_cache[:, :n], v_cache[:, :n]).contiguous()


def _array(x: Tensor) -> np.ndarray:
    array: np.ndarray = x.float().cpu().numpy()
    return array
