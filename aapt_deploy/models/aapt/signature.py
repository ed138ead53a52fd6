"""The tensors of AAPT's graphs: names, shapes, dtypes and state, computed from a Profile. The only place that spells them.

Exporter, builder, engines, rollout and tests read it, so a renamed tensor is renamed once.

    encoder     image [H, W, 3] uint8                       -> latent
    prompt      text                                        -> text_k.NN, text_v.NN per layer
    generator   noisy, previous, condition, time, rope_time,
                k_cache.NN, v_cache.NN, cache_len           -> clean, k_block.NN, v_block.NN
    decoder     latent, memory.NN                           -> frames [4, H, W, 3] uint8, memory.NN.next
"""

from aapt_deploy.bundle.signature import GraphSignature, TensorSpec, layer_names
from aapt_deploy.models.aapt.rope import rope_pairs
from aapt_deploy.profiles import CONDITION_CHANNELS, PIXEL_CHANNELS, Profile

GRAPHS = ("encoder", "prompt", "generator", "decoder")


def _per_layer(prefixes: tuple[str, str], profile: Profile, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, shape) for prefix in prefixes for name in layer_names(prefix, profile))


def latent_shape(profile: Profile) -> tuple[int, int, int, int]:
    return 1, profile.video.latent_channels, profile.latent_height, profile.latent_width


def encoder(profile: Profile) -> GraphSignature:
    """First image -> latent 0."""
    image = TensorSpec("image", (profile.video.height, profile.video.width, PIXEL_CHANNELS), "uint8")
    return GraphSignature("encoder", (image,), (TensorSpec("latent", latent_shape(profile)),))


def prompt(profile: Profile) -> GraphSignature:
    """Prompt tokens -> the text's keys and values, one pair per layer [1, L, H, D]."""
    text = profile.text
    ids = TensorSpec("text", (1, text.tokens), "int64") if text.kind == "vocabulary" else TensorSpec("text", (1, text.tokens, text.dim))
    shape = (1, text.tokens, profile.model.heads, profile.head_dim)
    return GraphSignature("prompt", (ids,), _per_layer(("text_k", "text_v"), profile, shape))


def generator(profile: Profile, cache_tokens: int | None = None) -> GraphSignature:
    """One pass over one block. `cache_tokens` is the cache length where an engine's ring differs from the op's own."""
    latent, heads = latent_shape(profile), (profile.model.heads, profile.head_dim)
    return GraphSignature(
        "generator",
        inputs=(
            TensorSpec("noisy", latent),
            TensorSpec("previous", latent),
            TensorSpec("condition", (1, CONDITION_CHANNELS, *latent[2:])),
            TensorSpec("time", (1,)),
            TensorSpec("rope_time", (1, 2, rope_pairs(profile)[0])),
            TensorSpec("cache_len", (1,), "int32"),
        ),
        outputs=(TensorSpec("clean", latent), *_per_layer(("k_block", "v_block"), profile, (1, profile.frame_tokens, *heads))),
        state=_per_layer(("k_cache", "v_cache"), profile, (1, cache_tokens or profile.cache_tokens, *heads)),
    )


def decoder(profile: Profile) -> GraphSignature:
    """One latent frame -> four frames, with the memory of the causal convolutions."""
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
    frames = TensorSpec("frames", (v.temporal_stride, v.height, v.width, PIXEL_CHANNELS), "uint8")
    return GraphSignature("decoder", (TensorSpec("latent", latent_shape(profile)),), (frames,), state)


def signatures(profile: Profile) -> dict[str, GraphSignature]:
    """All graphs of a bundle by name. A generator without text has no prompt graph."""
    graphs = {"encoder": encoder(profile), "prompt": prompt(profile), "generator": generator(profile), "decoder": decoder(profile)}
    if not profile.text.tokens:
        del graphs["prompt"]
    return graphs
