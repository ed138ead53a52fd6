"""What generator and discriminator share: recomputation, fresh weights, attention over a clip."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aapt_deploy.models.aapt.backbone import Backbone
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.layers import MODULATIONS
from aapt_deploy.models.aapt.prompts import VOCABULARY_SIZE
from aapt_deploy.models.aapt.rope import temporal_rope
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.profiles import CONDITION_CHANNELS, Profile, Text, Window, load

TINY = load("tiny-cpu")
BLOCKS = 6


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs_of(profile: Profile) -> tuple[Tensor, ...]:
    rng, size = seeded(1), (profile.latent_height, profile.latent_width)
    latent = (1, BLOCKS, profile.video.latent_channels, *size)
    return (
        torch.randn(latent, generator=rng), torch.randn(latent, generator=rng),
        torch.randn(1, BLOCKS, CONDITION_CHANNELS, *size, generator=rng),
        torch.full((1, BLOCKS), 0.5),
        torch.randint(VOCABULARY_SIZE, (1, profile.text.tokens), generator=rng),
        torch.from_numpy(temporal_rope(profile, np.arange(BLOCKS)[None])),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("checkpointing", "gradients", "times"), [(True, True, 2), (False, True, 1), (True, False, 1)]
)
def test_visual_blocks_are_recomputed_for_gradients_alone(
    checkpointing: bool, gradients: bool, times: int
) -> None:
    """And those of the text never."""
    torch.manual_seed(0)
    generator = Generator(TINY)
    generator.checkpointing = checkpointing
    runs: dict[str, int] = {}

    def watch(name: str, layer: torch.nn.Module) -> None:
        layer.register_forward_pre_hook(lambda *_: runs.__setitem__(name, runs.get(name, 0) + 1))

    for i in range(TINY.model.depth):
        watch(f"visual.{i}", generator.visual[i])
        watch(f"text.{i}", generator.text[i])
    with torch.set_grad_enabled(gradients):
        out = generator(*inputs_of(TINY))
    if gradients:
        out.square().sum().backward()
    depth = range(TINY.model.depth)
    assert runs == {f"visual.{i}": times for i in depth} | {f"text.{i}": 1 for i in depth}


def test_fresh_weights_begin_as_their_layers_need() -> None:
    """Residual branches shrink with depth, time does nothing yet, a channel's spread is a half."""
    model = dataclasses.replace(TINY.model, dim=256, heads=4, depth=8)
    torch.manual_seed(0)
    fresh = Backbone(TINY.replace(model=model))
    for i, layer in enumerate([*fresh.text, *fresh.visual]):
        last_of_text = i == 7
        assert hasattr(layer, "out") != last_of_text
        for name in () if last_of_text else ("out", "w2"):
            weight = getattr(layer, name).weight.detach()
            assert float(weight.std()) == pytest.approx(0.02 / 4, rel=0.05)
            assert abs(float(weight.mean())) < 1e-4
        assert layer.modulation.shape == (2 if last_of_text else MODULATIONS, 256)
        assert not layer.modulation.any()
        assert bool((layer.norm_q == 1).all()) and bool((layer.norm_k == 1).all())
        assert layer.qkv.bias is None and layer.qkv.weight.shape == (768, 256)
    assert not any(p.any() for p in fresh.time_modulation.parameters())
    channels = TINY.video.latent_channels
    assert torch.equal(fresh.step_spread, torch.full((channels, 1, 1), 0.5))
    names = {name for name, _ in fresh.named_buffers()}
    assert names == {"spatial_rope", "step_spread"}
    assert "spatial_rope" not in fresh.state_dict() and "step_spread" in fresh.state_dict()


@pytest.mark.parametrize("halo", [0, 1])
@pytest.mark.parametrize("kind", ["vocabulary", "embedding"])
def test_embeddings_have_the_profiles_sizes(kind: str, halo: int) -> None:
    model = dataclasses.replace(TINY.model, halo=halo)
    fresh = Backbone(TINY.replace(model=model, text=Text(kind, 4, 24)))
    assert hasattr(fresh, "vocabulary") == (kind == "vocabulary")
    if kind == "vocabulary":
        assert fresh.vocabulary.weight.shape == (VOCABULARY_SIZE, 24)
    assert fresh.text_in.weight.shape == (32, 24)
    inputs, size = 2 * TINY.video.latent_channels + CONDITION_CHANNELS, 2 + 2 * halo
    assert fresh.visual_in.weight.shape == (32, inputs, size, size)
    assert fresh.visual_in.stride == (2, 2) and fresh.visual_in.padding == (halo, halo)
    shapes = [tuple(p.shape) for p in fresh.time_in.parameters()]
    assert shapes == [(32, 256), (32,), (32, 32), (32,)]
    assert fresh.time_modulation.weight.shape == (6 * 32, 32)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_attention_over_a_clip_is_masked_attention_over_all_of_it(bidirectional: bool) -> None:
    """Text, sink, window and own block; every token if it is bidirectional."""
    profile = TINY.replace(window=Window(2, 1))
    torch.manual_seed(0)
    backbone = Backbone(profile)
    text = torch.randint(VOCABULARY_SIZE, (2, profile.text.tokens), generator=seeded(3))
    f, heads, dim = profile.frame_tokens, profile.model.heads, profile.head_dim
    q, k, v = torch.randn(3, 2, BLOCKS * f, heads, dim, generator=seeded(4))
    with torch.no_grad():
        keys, values = backbone.prompt(text)
        attend = backbone._attend_to_clip(text, BLOCKS, bidirectional)
        for layer in range(profile.model.depth):
            (found,) = attend(layer, q, k, v)
            all_k, all_v = torch.cat([keys[layer], k], 1), torch.cat([values[layer], v], 1)
            mask = torch.ones(BLOCKS * f, all_k.shape[1], dtype=torch.bool)
            for block in range(BLOCKS) if not bidirectional else ():
                rows = mask[block * f : (block + 1) * f, profile.text.tokens :]
                seen = [b in Ring.of(profile).visible(block) for b in range(BLOCKS)]
                rows[:] = torch.tensor(seen).repeat_interleave(f)
            wanted = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, all_k, all_v)), attn_mask=mask
            ).transpose(1, 2)
            assert found.shape == q.shape and torch.allclose(found, wanted, atol=1e-5)
