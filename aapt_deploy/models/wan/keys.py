"""Map the tensors of published files to ours: Wan2.1 generators, its VAE, TAEHV.

Pure functions of the profile. A `Source` says which tensors of a file make one of ours. q and k
lose their interleaved pairs: within each head, even rows come first, then odd ones. RMS over all
heads does not see the order, and attention needs the same one for q and k only. q, k and v become
one product.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from aapt_deploy.models.sources import Part, Shape, Source
from aapt_deploy.profiles import Profile
from aapt_deploy.sections import TIME_DOUBLINGS

Sources = dict[str, Source]
BOTH = ("weight", "bias")


def _itself(shape: Shape) -> Shape:
    return shape


def _same(name: str) -> Source:
    return Source((name,), lambda x: x, _itself)


def _rows(name: str, order: Tensor) -> Source:
    return Source((name,), lambda x: x[order], _itself)


def _slice(name: str, frames: int, index: int) -> Source:
    """Take one time slice of a kernel over `frames` frames."""
    return Source((name,), lambda x: x[:, :, index], lambda s: (*s[:2], frames, *s[2:]))


def _norm(name: str, trailing: int) -> Source:
    return Source((name,), torch.flatten, lambda s: (*s, *[1] * trailing))


def _modulation(name: str) -> Source:
    return Source((name,), lambda x: x[0], lambda s: (1, *s))


def _linear(ours: str, theirs: str) -> Iterator[tuple[str, Source]]:
    yield from ((f"{ours}.{part}", _same(f"{theirs}.{part}")) for part in BOTH)


def half_split(profile: Profile) -> Tensor:
    """Return the order of rows that turns interleaved pairs into half-split ones, per head."""
    rows = torch.arange(profile.model.dim).reshape(profile.model.heads, -1, 2)  # [H, P, 2]
    return rows.transpose(1, 2).flatten()


def _fused(order: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([q[order], k[order], v])


def generator_sources(profile: Profile) -> Sources:
    """Return the sources of the generator's tensors."""
    order = half_split(profile)
    thirds: Callable[[Shape], Shape] = lambda s: (s[0] // 3, *s[1:])
    found: Sources = {
        "visual_in.weight": _slice("patch_embedding.weight", 1, 0),
        "visual_in.bias": _same("patch_embedding.bias"),
        "modulation": _modulation("head.modulation"),
    }
    for ours, theirs in (("text_in", "text_embedding"), ("time_in", "time_embedding")):
        for layer in ("0", "2"):
            found |= _linear(f"{ours}.{layer}", f"{theirs}.{layer}")
    found |= _linear("time_modulation", "time_projection.1")
    found |= _linear("head", "head.head")
    for i in range(profile.model.depth):
        b = f"blocks.{i}"
        found[f"{b}.modulation"] = _modulation(f"{b}.modulation")
        for part in BOTH:
            names = tuple(f"{b}.self_attn.{x}.{part}" for x in "qkv")
            found[f"{b}.qkv.{part}"] = Source(names, partial(_fused, order), thirds)
        for x in "qk":
            found[f"{b}.norm_{x}"] = _rows(f"{b}.self_attn.norm_{x}.weight", order)
            found[f"{b}.norm_text_{x}"] = _same(f"{b}.cross_attn.norm_{x}.weight")
        found[f"{b}.norm_text"] = _same(f"{b}.norm3.weight")
        found[f"{b}.bias_text"] = _same(f"{b}.norm3.bias")
        found |= _linear(f"{b}.out", f"{b}.self_attn.o")
        for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o")):
            found |= _linear(f"{b}.text_{ours}", f"{b}.cross_attn.{theirs}")
        found |= _linear(f"{b}.w1", f"{b}.ffn.0")
        found |= _linear(f"{b}.w2", f"{b}.ffn.2")
    return found


def wan_vae_sources(profile: Profile) -> Sources:
    """Return the sources of the tensors of Wan2.1's VAE."""
    vae = profile.vae
    found: Sources = dict(_linear("decoder.latent_in", "conv2"))
    found |= _linear("decoder.conv_in", "decoder.conv1")
    found |= _middle("decoder", _residual)
    place, inputs = 0, vae.decoder_channels[0]
    for scale, outputs in enumerate(vae.decoder_channels):
        ours = f"decoder.scales.{scale}"
        for block in range(vae.blocks + 1):
            theirs = f"decoder.upsamples.{place}"
            found |= _residual(f"{ours}.blocks.{block}", theirs, inputs != outputs)
            place, inputs = place + 1, outputs
        if scale < TIME_DOUBLINGS:
            found |= _linear(f"{ours}.time", f"decoder.upsamples.{place}.time_conv")
        if scale < len(vae.decoder_channels) - 1:
            found |= _linear(f"{ours}.space", f"decoder.upsamples.{place}.resample.1")
        place, inputs = place + 1, outputs // 2
    found["decoder.norm_out"] = _norm("decoder.head.0.gamma", 3)
    found |= _linear("decoder.conv_out", "decoder.head.2")
    return found | (_wan_encoder(profile) if vae.encoder_channels else {})


def _residual(ours: str, theirs: str, shortcut: bool = False) -> Sources:
    found: Sources = {}
    for i, norm, layer in ((1, 0, 2), (2, 3, 6)):
        found[f"{ours}.norm{i}"] = _norm(f"{theirs}.residual.{norm}.gamma", 3)
        found |= _linear(f"{ours}.conv{i}", f"{theirs}.residual.{layer}")
    return found | (dict(_linear(f"{ours}.shortcut", f"{theirs}.shortcut")) if shortcut else {})


def _flat_residual(ours: str, theirs: str, shortcut: bool = False) -> Sources:
    found = _residual(ours, theirs, shortcut)
    for i, layer in ((1, 2), (2, 6)):
        found[f"{ours}.conv{i}.weight"] = _slice(f"{theirs}.residual.{layer}.weight", 3, -1)
    if shortcut:
        found[f"{ours}.shortcut.weight"] = _slice(f"{theirs}.shortcut.weight", 1, 0)
    return found


def _middle(half: str, residual: Callable[[str, str], Sources]) -> Sources:
    found = residual(f"{half}.before", f"{half}.middle.0")
    found |= residual(f"{half}.after", f"{half}.middle.2")
    found[f"{half}.attention.norm"] = _norm(f"{half}.middle.1.norm.gamma", 2)
    found |= _linear(f"{half}.attention.qkv", f"{half}.middle.1.to_qkv")
    return found | dict(_linear(f"{half}.attention.out", f"{half}.middle.1.proj"))


def _wan_encoder(profile: Profile) -> Sources:
    """Return the sources of the encoder, whose kernels lose all but their last time slice."""
    channels = profile.vae.encoder_channels
    found: Sources = {
        "encoder.conv_in.weight": _slice("encoder.conv1.weight", 3, -1),
        "encoder.conv_in.bias": _same("encoder.conv1.bias"),
        "encoder.norm_out": _norm("encoder.head.0.gamma", 3),
        "encoder.conv_out.weight": _slice("encoder.head.2.weight", 3, -1),
        "encoder.conv_out.bias": _same("encoder.head.2.bias"),
        "encoder.latent_out.weight": _slice("conv1.weight", 1, 0),
        "encoder.latent_out.bias": _same("conv1.bias"),
    }
    found |= _middle("encoder", _flat_residual)
    place, inputs = 0, channels[0]
    for scale, outputs in enumerate(channels):
        for _ in range(profile.vae.blocks):
            ours, theirs = f"encoder.layers.{place}", f"encoder.downsamples.{place}"
            found |= _flat_residual(ours, theirs, inputs != outputs)
            place, inputs = place + 1, outputs
        if scale < len(channels) - 1:
            theirs = f"encoder.downsamples.{place}.resample.1"
            found |= _linear(f"encoder.layers.{place}", theirs)
            place += 1
    return found


def taehv_sources(profile: Profile) -> Sources:
    """Return the sources of TAEHV's tensors. Its layers are numbered in their order."""
    vae, found = profile.vae, dict(_linear("decoder.conv_in", "decoder.1"))
    scales, place = len(vae.decoder_channels) - 1, 3
    for scale in range(scales):
        for block in range(vae.blocks):
            found |= _memory(f"decoder.blocks.{scale * vae.blocks + block}", f"decoder.{place}")
            place += 1
        found[f"decoder.times.{scale}.weight"] = _same(f"decoder.{place + 1}.conv.weight")
        found[f"decoder.narrow.{scale}.weight"] = _same(f"decoder.{place + 2}.weight")
        place += 3
    found |= _linear("decoder.conv_out", f"decoder.{place + 1}")
    if vae.encoder_channels:
        place = 2
        found |= _linear("encoder.conv_in", "encoder.0")
        for scale in range(scales):
            found[f"encoder.times.{scale}.weight"] = _same(f"encoder.{place}.conv.weight")
            found[f"encoder.halve.{scale}.weight"] = _same(f"encoder.{place + 1}.weight")
            place += 2
            for block in range(vae.blocks):
                found |= _memory(f"encoder.blocks.{scale * vae.blocks + block}", f"encoder.{place}")
                place += 1
        found |= _linear("encoder.conv_out", f"encoder.{place}")
    return found


def _memory(ours: str, theirs: str) -> Sources:
    found: Sources = {}
    for i, layer in ((1, 0), (2, 2), (3, 4)):
        found |= _linear(f"{ours}.conv{i}", f"{theirs}.conv.{layer}")
    return found


def vae_sources(profile: Profile) -> Sources:
    """Return the sources of the VAE's tensors by the profile's vae.kind."""
    return {"wan": wan_vae_sources, "taehv": taehv_sources}[profile.vae.kind](profile)


def parts(profile: Profile) -> list[Part]:
    """Return the generator's and the VAE's sources, each of a file of its own.

    A VAE's file has an encoder, of which Wan2.1's has layers that a single picture does not need.
    """
    small = profile.vae.kind == "taehv"
    option, file = ("--taehv", "taew2_1.pth") if small else ("--vae", "Wan2.1_VAE.pth")
    vae = Part("vae.", vae_sources(profile), ("encoder.", "conv1."), option, file)
    return [Part("generator.", generator_sources(profile)), vae]
