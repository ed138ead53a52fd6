"""BlockCausalAttention in PyTorch: an operator that runs, and a node in an exported graph.

The operator is functional. One that writes its caches does not survive `torch.onnx.export`, and
the runtime commits anyway. The body here runs wherever training does; a GPU kernel for inference
replaces it with `operator.register_kernel("cuda")`. It has a gradient, into the caches as well:
student forcing trains through the same rollout that inference runs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aapt_deploy.ops.block_causal_attention import (
    DOMAIN,
    NAME,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    TORCH_NAME,
    VERSION,
    softmax_scale,
)


def block_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_len: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, T, H, D], caches [1, S, H, D], cache_len int32 [1] -> out, k_block, v_block.

    out [1, T, H, D] is like q, k_block and v_block have the caches' dtype. Inside
    `torch.onnx.export` this leaves one `aapt::BlockCausalAttention` node and computes nothing.
    """
    assert q.shape == k.shape == v.shape, f"{q.shape=} {k.shape=} {v.shape=}"
    shapes = f"{k_cache.shape=} {v_cache.shape=} {k.shape=}"
    assert k_cache.shape == v_cache.shape and k_cache.shape[2:] == k.shape[2:], shapes
    if not torch.onnx.is_in_onnx_export():
        computed: tuple[Tensor, Tensor, Tensor] = operator(q, k, v, k_cache, v_cache, cache_len)
        return computed
    out, k_block, v_block = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{NAME}",
        (q, k, v, k_cache, v_cache, cache_len),
        {
            "scale": softmax_scale(q.shape[-1]),
            "plugin_namespace": PLUGIN_NAMESPACE,
            "plugin_version": PLUGIN_VERSION,
        },
        dtypes=(q.dtype, k_cache.dtype, v_cache.dtype),
        shapes=(q.shape, k.shape, v.shape),
        version=VERSION,
    )
    return out, k_block, v_block


@torch.library.custom_op(TORCH_NAME, mutates_args=())
def operator(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_len: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.ops.aapt.block_causal_attention`, in plain PyTorch.

    In training there may be B streams in lockstep, of one length.
    """
    n = int(cache_len)
    assert 0 <= n <= k_cache.shape[1], f"{cache_len=} {k_cache.shape=}"
    out = attend_to(q, k, v, k_cache[:, :n], v_cache[:, :n]).contiguous()
    return out, _block(k, k_cache), _block(v, v_cache)


@operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_len: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    k_block = k.new_empty(k.shape, dtype=k_cache.dtype)
    return q.new_empty(q.shape), k_block, v.new_empty(v.shape, dtype=v_cache.dtype)


def attend_to(q: Tensor, k: Tensor, v: Tensor, k_past: Tensor, v_past: Tensor) -> Tensor:
    """q, k, v [B, T, H, D], the valid past [B, n, H, D] -> [B, T, H, D]."""
    keys = torch.cat((k_past.to(k.dtype), k), dim=1)  # [B, n + T, H, D]
    # Under autocast v is narrower than q and k, which were normalised and rotated.
    values = torch.cat((v_past.to(q.dtype), v.to(q.dtype)), dim=1)
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    return softmax_attention(q, keys, values).transpose(1, 2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, H, T, D] over all of k, v [B, H, S, D] -> [B, H, T, D].

    In mixed precision on a CPU, three plain operations take half the time of the fused one,
    forward and backward (docs/log.md).
    """
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        narrow = torch.get_autocast_dtype("cpu")
        q, k, v = (x.to(narrow).contiguous() for x in (q * softmax_scale(q.shape[-1]), k, v))
        return torch.softmax(q @ k.transpose(-1, -2), dim=-1).to(narrow) @ v
    return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale(q.shape[-1]))


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(
    ctx: Any, grad_out: Tensor, grad_k_block: Tensor, grad_v_block: Tensor
) -> tuple[Tensor | None, ...]:
    """Recompute, so a rollout in training stores no attention weights.

    Tokens that were not read get a zero gradient.
    """
    q, k, v, k_cache, v_cache, cache_len = ctx.saved_tensors
    n = int(cache_len)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, k_cache[:, :n], v_cache[:, :n])]
    with torch.enable_grad():
        dq, dk, dv, dk_past, dv_past = torch.autograd.grad(attend_to(*leaves), leaves, grad_out)
    rest = (0, 0, 0, 0, 0, k_cache.shape[1] - n)  # pad the token dimension
    dk, dv = dk + grad_k_block.to(dk), dv + grad_v_block.to(dv)
    return dq, dk, dv, F.pad(dk_past, rest), F.pad(dv_past, rest), None


operator.register_autograd(_backward, setup_context=_keep)


def _block(new: Tensor, cache: Tensor) -> Tensor:
    """Return `new` in the cache's dtype and fresh memory; outputs must not share an input's."""
    return new.to(cache.dtype, copy=True, memory_format=torch.contiguous_format)
