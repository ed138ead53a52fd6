"""BlockCausalAttention in torch: an operator that runs, and a node in an exported ONNX graph.

The operator is functional. A variant that writes its caches does not survive `torch.onnx.export`, and committing is the runtime's job anyway. The
body here is plain torch and runs wherever training does; a GPU kernel for inference takes its place there with `operator.register_kernel("cuda")`.
It has a gradient, into the caches as well: student forcing trains through the same rollout that inference runs.
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
    """q, k, v [1, T, H, D], caches [1, S, H, D], cache_len int32 [1] -> out [1, T, H, D] like q, k_block and v_block in the caches' dtype.

    Inside `torch.onnx.export` this leaves one `aapt::BlockCausalAttention` node and computes nothing.
    """
    assert q.shape == k.shape == v.shape, f"{q.shape=} {k.shape=} {v.shape=}"
    assert k_cache.shape == v_cache.shape and k_cache.shape[2:] == k.shape[2:], (
        f"{k_cache.shape=} {v_cache.shape=} {k.shape=}"
    )
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
    """`torch.ops.aapt.block_causal_attention`, in plain torch; B streams in lockstep, of one length, under training."""
    n = int(cache_len)
    assert 0 <= n <= k_cache.shape[1], f"{cache_len=} {k_cache.shape=}"
    return (
        attend_to(q, k, v, k_cache[:, :n], v_cache[:, :n]).contiguous(),
        _block(k, k_cache),
        _block(v, v_cache),
    )


@operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_len: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape, dtype=k_cache.dtype),
        v.new_empty(v.shape, dtype=v_cache.dtype),
    )


def attend_to(q: Tensor, k: Tensor, v: Tensor, k_past: Tensor, v_past: Tensor) -> Tensor:
    """q, k, v [B, T, H, D], the valid past [B, n, H, D] -> [B, T, H, D]."""
    keys = torch.cat((k_past.to(k.dtype), k), dim=1)  # [B, n + T, H, D]
    values = torch.cat(
        (v_past.to(q.dtype), v.to(q.dtype)), dim=1
    )  # under autocast v is narrower than q and k, which were normalised and rotated
    return softmax_attention(
        q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    ).transpose(1, 2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, H, T, D] over all of k, v [B, H, S, D] -> [B, H, T, D].

    In mixed precision on a CPU three plain operations take half the time of the fused one, forward and backward (docs/log.md).
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
    """Computed from scratch, so that a rollout under training keeps no attention weights. Tokens that were not read get a zero gradient."""
    q, k, v, k_cache, v_cache, cache_len = ctx.saved_tensors
    n = int(cache_len)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, k_cache[:, :n], v_cache[:, :n])]
    with torch.enable_grad():
        dq, dk, dv, dk_past, dv_past = torch.autograd.grad(attend_to(*leaves), leaves, grad_out)
    rest = (0, 0, 0, 0, 0, k_cache.shape[1] - n)  # pad the token dimension
    return (
        dq,
        dk + grad_k_block.to(dk),
        dv + grad_v_block.to(dv),
        F.pad(dk_past, rest),
        F.pad(dv_past, rest),
        None,
    )


operator.register_autograd(_backward, setup_context=_keep)


def _block(new: Tensor, cache: Tensor) -> Tensor:
    """`new` as the cache stores it, always in fresh memory: an operator's output must not share its input's."""
    return new.to(cache.dtype, copy=True, memory_format=torch.contiguous_format)
