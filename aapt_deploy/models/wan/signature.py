"""Compute names, shapes, dtypes and state of the family's graphs from a Profile.

    encoder     image [H, W, 3] uint8, only for blocks of one latent frame   -> latent
    prompt      text [1, L, text.dim]               -> text_k.NN, text_v.NN per layer
    generator   noisy [n, C, h, w], time, time_features, rope_time, cache_len,
                k_cache.NN, v_cache.NN, text_k.NN, text_v.NN -> clean, k_block.NN, v_block.NN
    decoder     latent, memory.NN, seen          -> frames [4, H, W, 3] uint8, and both as NEXT

Cross-attention reads text_k.NN and text_v.NN, which stay with the engine between prompts.
"""

from aapt_deploy.bundle.signature import GraphSignature, TensorSpec
from aapt_deploy.models.signature import encoder, frames_spec, latent_shape, per_layer, prompt
from aapt_deploy.models.wan.rope import TIME_FEATURES, rope_pairs
from aapt_deploy.profiles import Profile
from aapt_deploy.sections import TIME_DOUBLINGS

Shape = tuple[int, ...]


def generator(profile: Profile, cache_tokens: int | None = None) -> GraphSignature:
    """Return the graph of one pass over one block; `cache_tokens` if not the op's own length."""
    n = profile.video.block_frames
    latent = latent_shape(profile, n)
    inputs = (
        TensorSpec("noisy", latent),
        TensorSpec("time", (1,)),
        TensorSpec("time_features", (1, TIME_FEATURES)),
        TensorSpec("rope_time", (1, 2, n, rope_pairs(profile)[0])),
        TensorSpec("cache_len", (1,), "int32"),
    )
    blocks = per_layer(("k_block", "v_block"), profile, profile.block_tokens)
    caches = per_layer(("k_cache", "v_cache"), profile, cache_tokens or profile.cache_tokens)
    text = per_layer(("text_k", "text_v"), profile, profile.text.tokens)
    outputs = (TensorSpec("clean", latent), *blocks)
    return GraphSignature("generator", inputs, outputs, caches, text)


def decoder(profile: Profile) -> GraphSignature:
    """Return the graph from a latent to four frames, with the memory of everything causal."""
    shapes = taehv_memory(profile) if profile.vae.kind == "taehv" else wan_memory(profile)
    state = tuple(TensorSpec(f"memory.{i:02d}", (1, *shape)) for i, shape in enumerate(shapes))
    if profile.vae.kind == "wan":
        state += (TensorSpec("seen", (1, 1)),)  # 1 once a latent was decoded
    latent = TensorSpec("latent", latent_shape(profile))
    return GraphSignature("decoder", (latent,), (frames_spec(profile),), state)


def wan_memory(profile: Profile) -> list[Shape]:
    """Return [C, 2, h, w] of every causal convolution's last two frames, in the order of calls."""
    vae, past = profile.vae, profile.vae.temporal_kernel - 1
    height, width, channels = profile.latent_height, profile.latent_width, vae.decoder_channels
    inside = [(profile.video.latent_channels, 1), *[(channels[0], 1)] * 4]  # conv_in, two residuals
    inputs = channels[0]
    for scale, outputs in enumerate(channels):
        stride = 2**scale
        inside += [(inputs, stride), *[(outputs, stride)] * (2 * vae.blocks + 1)]
        inside += [(outputs, stride)] * (scale < TIME_DOUBLINGS)
        inputs = outputs // 2
    inside.append((channels[-1], stride))
    return [(c, past, height * stride, width * stride) for c, stride in inside]


def taehv_memory(profile: Profile) -> list[Shape]:
    """Return [C, h, w] of every block's last frame, in the order of calls."""
    scales = enumerate(profile.vae.decoder_channels[:-1])
    height, width = profile.latent_height, profile.latent_width
    shapes = [(c, height * 2**scale, width * 2**scale) for scale, c in scales]
    return [shape for shape in shapes for _ in range(profile.vae.blocks)]


def signatures(profile: Profile) -> dict[str, GraphSignature]:
    """Return all graphs of a bundle by name."""
    graphs = [prompt(profile), generator(profile), decoder(profile)]
    if profile.vae.encoder_channels:
        graphs.insert(0, encoder(profile))
    return {graph.name: graph for graph in graphs}
