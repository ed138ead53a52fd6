"""The three kernels in NumPy, called as the true ones are: `--small` tries the bench with them.

They compute what the kernels shall compute, from the layout's and the emulator's own code. So a
stage that runs over them shows that the stage works, and nothing about a kernel.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aapt_deploy.ops.block_causal_attention import emulator
from aapt_deploy.ops.block_causal_attention import hopper_fp8 as layout


def in_numpy(
    kernel: str,
    inputs: Sequence[Tensor],
    numbers: Sequence[int],
    outputs: Sequence[Tensor],
) -> None:
    """attention_checks.Run, on a CPU."""
    made = {"aapt_pack": pack, "aapt_attend": attend, "aapt_commit": commit}[kernel]
    for target, result in zip(outputs, made(list(inputs), list(numbers), outputs), strict=True):
        target.copy_(torch.from_numpy(np.ascontiguousarray(result)).to(target.dtype))


def pack(inputs: list[Tensor], numbers: list[int], outputs: Sequence[Tensor]) -> list[np.ndarray]:
    k, v, k_scale, k_mean, v_scale = (x.float().numpy() for x in inputs)
    return list(layout.pack(k, v, layout.Scales(k_scale, k_scale, k_mean, v_scale)))


def attend(inputs: list[Tensor], numbers: list[int], outputs: Sequence[Tensor]) -> list[np.ndarray]:
    q, q_scale, k_scale, v_scale = (inputs[i].float().numpy() for i in (0, 6, 7, 8))
    k_block, v_block, k_cache, v_cache, length = (x.numpy() for x in inputs[1:6])
    scales = layout.Scales(q_scale, k_scale, np.zeros_like(v_scale), v_scale)
    tokens, cached = numbers[0], int(length[0])
    arithmetic = emulator.EXACT
    return [
        emulator.attend(
            q, k_block, v_block, tokens, k_cache, v_cache, cached, scales, arithmetic,
        )
    ]  # fmt: skip


def commit(inputs: list[Tensor], numbers: list[int], outputs: Sequence[Tensor]) -> list[np.ndarray]:
    k_block, v_block, slot = (x.numpy() for x in inputs)
    caches = [x.numpy().copy() for x in outputs]
    tokens, first = numbers[0], int(slot[0])
    if 0 <= first <= caches[0].shape[1] * layout.TILE_KEYS - tokens:
        layout.commit(k_block, v_block, tokens, first, caches[0], caches[1])
    return caches
