"""BlockCausalAttention in NumPy, float64: every other facet is measured against it.

Written to be read, not to be fast: nothing is fused and the prefix of the cache is copied.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from aapt_deploy.ops.block_causal_attention import softmax_scale

Array = NDArray[Any]


def block_causal_attention(
    q: Array, k: Array, v: Array, k_cache: Array, v_cache: Array, cache_len: NDArray[np.int32]
) -> tuple[NDArray[np.float64], Array, Array]:
    """q, k, v [1, T, H, D], caches [1, S, H, D], cache_len [1] -> out, k_block, v_block.

    out [1, T, H, D] is float64, k_block and v_block have the caches' dtype.
    """
    assert q.shape == k.shape == v.shape, f"{q.shape=} {k.shape=} {v.shape=}"
    shapes = f"{k_cache.shape=} {v_cache.shape=} {k.shape=}"
    assert k_cache.shape == v_cache.shape and k_cache.shape[2:] == k.shape[2:], shapes
    assert 0 <= cache_len[0] <= k_cache.shape[1], f"{cache_len=} {k_cache.shape=}"
    n = int(cache_len[0])
    wide = np.float64
    keys = np.concatenate([k_cache[:, :n].astype(wide), k.astype(wide)], axis=1)  # [1, n + T, H, D]
    values = np.concatenate([v_cache[:, :n].astype(np.float64), v.astype(np.float64)], axis=1)
    scores = np.einsum("bqhd,bkhd->bhqk", q.astype(np.float64), keys) * softmax_scale(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bhqk,bkhd->bqhd", weights, values)
    return out, k.astype(k_cache.dtype), v.astype(v_cache.dtype)
