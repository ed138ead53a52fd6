"""One layer of attention as an export leaves it, of any size."""

from onnx import ModelProto

from aapt_deploy.backends.trt.doctor.cases import portable_model
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.ops.block_causal_attention.onnx_function import strip


def one_layer(ring: Ring, heads: int, head_dim: int) -> ModelProto:
    """q, k, v, k_cache, v_cache, cache_len -> out, k_block, v_block; float32, no function."""
    return strip(portable_model(ring, heads, head_dim))
