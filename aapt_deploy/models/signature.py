"""Parts of a graph's signature that families share: latents, layers, encoder and prompt."""

from aapt_deploy.bundle.signature import GraphSignature, TensorSpec, layer_names
from aapt_deploy.profiles import PIXEL_CHANNELS, Profile


def per_layer(prefixes: tuple[str, str], profile: Profile, tokens: int) -> tuple[TensorSpec, ...]:
    """Return keys and values [1, tokens, H, D] of every layer."""
    shape = (1, tokens, profile.model.heads, profile.head_dim)
    names = (name for prefix in prefixes for name in layer_names(prefix, profile))
    return tuple(TensorSpec(name, shape) for name in names)


def latent_shape(profile: Profile, frames: int = 1) -> tuple[int, int, int, int]:
    return frames, profile.video.latent_channels, profile.latent_height, profile.latent_width


def frames_spec(profile: Profile) -> TensorSpec:
    """Return the pixel frames that one latent frame decodes to."""
    v = profile.video
    shape = (v.temporal_stride, v.height, v.width, PIXEL_CHANNELS)
    return TensorSpec("frames", shape, "uint8")


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
    return GraphSignature("prompt", (read,), per_layer(("text_k", "text_v"), profile, text.tokens))
