"""Compute names, shapes, dtypes and state of AAPT's graphs from a Profile.

No other place lists them. Exporter, builder, engines, rollout and tests read them here.

    encoder     image [H, W, 3] uint8                      -> latent
    prompt      text                                       -> text_k.NN, text_v.NN per layer
    generator   noisy, previous, condition, time, rope_time,
                k_cache.NN, v_cache.NN, cache_len          -> clean, k_block.NN, v_block.NN
    decoder     latent, memory.NN             -> frames [4, H, W, 3] uint8, memory.NN.next
"""

from aapt_deploy.bundle.signature import GraphSignature, TensorSpec
from aapt_deploy.models.aapt.rope import rope_pairs
from aapt_deploy.models.signature import encoder as encoder
from aapt_deploy.models.signature import frames_spec, per_layer
from aapt_deploy.models.signature import latent_shape as latent_shape
from aapt_deploy.models.signature import prompt as prompt
from aapt_deploy.profiles import CONDITION_CHANNELS, Profile

GRAPHS = ("encoder", "prompt", "generator", "decoder")


def generator(profile: Profile, cache_tokens: int | None = None) -> GraphSignature:
    """Return the graph of one pass over one block; `cache_tokens` if not the op's own length."""
    latent = latent_shape(profile)
    inputs = (
        TensorSpec("noisy", latent),
        TensorSpec("previous", latent),
        TensorSpec("condition", (1, CONDITION_CHANNELS, *latent[2:])),
        TensorSpec("time", (1,)),
        TensorSpec("rope_time", (1, 2, rope_pairs(profile)[0])),
        TensorSpec("cache_len", (1,), "int32"),
    )
    blocks = per_layer(("k_block", "v_block"), profile, profile.block_tokens)
    caches = per_layer(("k_cache", "v_cache"), profile, cache_tokens or profile.cache_tokens)
    return GraphSignature("generator", inputs, (TensorSpec("clean", latent), *blocks), caches)


def decoder(profile: Profile) -> GraphSignature:
    """Return the graph from a latent to four frames, with the causal convolutions' memory."""
    v, vae = profile.video, profile.vae
    height, width = profile.latent_height, profile.latent_width
    shapes = [(1, v.latent_channels, height, width)]  # of the linear path
    if vae.temporal_kernel > 1:
        past = vae.temporal_kernel - 1
        shapes.append((past, v.latent_channels, height, width))
        for scale, channels in enumerate(vae.decoder_channels):
            stride, last = min(2**scale, v.spatial_stride), scale == len(vae.decoder_channels) - 1
            convolutions = 2 * vae.blocks + (not last) if vae.look_back == "all" else vae.blocks
            shapes += [(past, channels, height * stride, width * stride)] * convolutions
    state = tuple(TensorSpec(f"memory.{i:02d}", (1, *shape)) for i, shape in enumerate(shapes))
    latent = TensorSpec("latent", latent_shape(profile))
    return GraphSignature("decoder", (latent,), (frames_spec(profile),), state)


def signatures(profile: Profile) -> dict[str, GraphSignature]:
    """Return all graphs of a bundle by name. A generator without text has no prompt graph."""
    graphs = (encoder(profile), prompt(profile), generator(profile), decoder(profile))
    spoken = bool(profile.text.tokens)
    return {graph.name: graph for graph in graphs if spoken or graph.name != "prompt"}
