"""BlockCausalAttention in torch: an operator that runs, and a node in an exported ONNX graph.

The operator is functional. A variant that writes its caches does not survive `torch.onnx.export`, and committing is the runtime's job anyway. The
body here is for CPU tensors; a GPU kernel adds itself with `operator.register_kernel("cuda")`. There is no gradient on purpose: training attends
with a dense mask over whole clips (`Ring.visible`) and never runs through a cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aapt_deploy.ops.block_causal_attention import DOMAIN, NAME, PLUGIN_NAMESPACE, PLUGIN_VERSION, TORCH_NAME, VERSION, softmax_scale


def block_causal_attention(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_len: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, T, H, D], caches [1, S, H, D], cache_len int32 [1] -> out [1, T, H, D] like q, k_block and v_block in the caches' dtype.

    Inside `torch.onnx.export` this leaves one `aapt::BlockCausalAttention` node and computes nothing.
    """
    assert q.shape == k.shape == v.shape, f"{q.shape=} {k.shape=} {v.shape=}"
    assert k_cache.shape == v_cache.shape and k_cache.shape[2:] == k.shape[2:], f"{k_cache.shape=} {v_cache.shape=} {k.shape=}"
    if not torch.onnx.is_in_onnx_export():
        computed: tuple[Tensor, Tensor, Tensor] = operator(q, k, v, k_cache, v_cache, cache_len)
        return computed
    out, k_block, v_block = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{NAME}",
        (q, k, v, k_cache, v_cache, cache_len),
        {"scale": softmax_scale(q.shape[-1]), "plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION},
        dtypes=(q.dtype, k_cache.dtype, v_cache.dtype),
        shapes=(q.shape, k.shape, v.shape),
        version=VERSION,
    )
    return out, k_block, v_block


@torch.library.custom_op(TORCH_NAME, mutates_args=(), device_types="cpu")
def operator(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_len: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.ops.aapt.block_causal_attention` for CPU tensors."""
    n = int(cache_len)
    assert 0 <= n <= k_cache.shape[1], f"{cache_len=} {k_cache.shape=}"
    keys = torch.cat((k_cache[:, :n].to(k.dtype), k), dim=1)  # [1, n + T, H, D]
    values = torch.cat((v_cache[:, :n].to(v.dtype), v), dim=1)
    out = F.scaled_dot_product_attention(  # [1, H, T, D]
        q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), scale=softmax_scale(q.shape[-1])
    )
    return out.transpose(1, 2).contiguous(), _block(k, k_cache), _block(v, v_cache)


@operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_len: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape, dtype=k_cache.dtype), v.new_empty(v.shape, dtype=v_cache.dtype)


def _block(new: Tensor, cache: Tensor) -> Tensor:
    """`new` as the cache stores it, always in fresh memory: an operator's output must not share its input's."""
    return new.to(cache.dtype, copy=True, memory_format=torch.contiguous_format)
