"""Compute names, shapes, dtypes and state of AAPT's graphs from a Profile.

No other place lists them. Exporter, builder, engines, rollout and tests read them here.

    encoder     image [H, W, 3] uint8                      -> latent
    prompt      text                                       -> text_k.NN, text_v.NN per layer
    generator   noisy, previous, condition, time, rope_time,
                k_cache.NN, v_cache.NN, cache_len          -> clean, k_block.NN, v_block.NN
    decoder     latent, memory.NN             -> frames [4, H, W, 3] uint8, memory.NN.next
"""

from aapt_deploy.bundle.signature import GraphSignature, TensorSpec, layer_names
from aapt_deploy.models.aapt.rope import rope_pairs
from aapt_deploy.profiles import CONDITION_CHANNELS, PIXEL_CHANNELS, Profile

GRAPHS = ("encoder", "prompt", "generator", "decoder")


def _per_layer(prefixes: tuple[str, str], profile: Profile, tokens: int) -> tuple[TensorSpec, ...]:
    """Keys and values [1, tokens, H, D] of every layer."""
    shape = (1, tokens, profile.model.heads, profile.head_dim)
    names = (name for prefix in prefixes for name in layer_names(prefix, profile))
    return tuple(TensorSpec(name, shape) for name in names)


def latent_shape(profile: Profile) -> tuple[int, int, int, int]:
    return 1, profile.video.latent_channels, profile.latent_height, profile.latent_width


def encoder(profile: Profile) -> GraphSignature:
    """Return the graph that turns the first image into latent 0."""
    size = (profile.video.height, profile.video.width, PIXEL_CHANNELS)
    latent = TensorSpec("latent", latent_shape(profile))
    return GraphSignature("encoder", (TensorSpec("image", size, "uint8"),), (latent,))


def prompt(profile: Profile) -> GraphSignature:
    """Return the graph that turns a prompt into each layer's keys and values [1, L, H, D]."""
    text = profile.text
    ids = TensorSpec("text", (1, text.tokens), "int64")
    vectors = TensorSpec("text", (1, text.tokens, text.dim))
    read = ids if text.kind == "vocabulary" else vectors
    return GraphSignature("prompt", (read,), _per_layer(("text_k", "text_v"), profile, text.tokens))


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
    blocks = _per_layer(("k_block", "v_block"), profile, profile.block_tokens)
    caches = _per_layer(("k_cache", "v_cache"), profile, cache_tokens or profile.cache_tokens)
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
    frames = TensorSpec("frames", (v.temporal_stride, v.height, v.width, PIXEL_CHANNELS), "uint8")
    return GraphSignature("decoder", (latent,), (frames,), state)


def signatures(profile: Profile) -> dict[str, GraphSignature]:
    """Return all graphs of a bundle by name. A generator without text has no prompt graph."""
    graphs = (encoder(profile), prompt(profile), generator(profile), decoder(profile))
    spoken = bool(profile.text.tokens)
    return {graph.name: graph for graph in graphs if spoken or graph.name != "prompt"}
