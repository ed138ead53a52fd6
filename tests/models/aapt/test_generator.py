"""Check that `forward` equals `step` with a cache, and that blocks see only what they may.

Weights are random everywhere. A fresh generator's zero head and modulation would hide every error.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from aapt_deploy.models.aapt import layers
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.layers import Stream, join_rope, posterior, rms_norm, spatial_rope
from aapt_deploy.models.aapt.prompts import VOCABULARY_SIZE
from aapt_deploy.models.aapt.rope import SLOWEST_TURN, rope_pairs, temporal_rope
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.profiles import CONDITION_CHANNELS, Profile, Text, Window, load, preset_folder

TINY = load("tiny-cpu")
PRESETS = sorted(path.stem for path in preset_folder().glob("*.toml"))
RINGS = [(text, sink, window) for text in (0, 4) for sink in (0, 1) for window in (1, 3)]
ring_cases = pytest.mark.parametrize(
    ("text", "sink", "window"), RINGS, ids=lambda value: str(value)
)
Inputs = dict[str, Tensor]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normed(x: Tensor) -> Tensor:
    """RMS norm by its formula."""
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


def profile_of(text: int = 4, sink: int = 1, window: int = 3) -> Profile:
    return TINY.replace(text=Text("vocabulary", text, 16), window=Window(window, sink))


def perturbed(profile: Profile, seed: int = 0) -> Generator:
    """A generator in which every weight matters."""
    torch.manual_seed(seed)
    generator = Generator(profile).eval()
    with torch.no_grad():
        for p in generator.parameters():
            p.add_(torch.randn(p.shape) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.2))
    return generator


def inputs_of(profile: Profile, blocks: int, batch: int = 1, first: int = 0) -> Inputs:
    rng, size = seeded(1), (profile.latent_height, profile.latent_width)
    numbers = first + np.tile(np.arange(blocks), (batch, 1))
    latent = (batch, blocks, profile.video.latent_channels, *size)
    return {
        "noisy": torch.randn(latent, generator=rng),
        "previous": torch.randn(latent, generator=rng),
        "condition": torch.randn(*latent[:2], CONDITION_CHANNELS, *latent[3:], generator=rng),
        "t": torch.rand(batch, blocks, generator=rng) * 0.9 + 0.1,
        "text": torch.randint(VOCABULARY_SIZE, (batch, profile.text.tokens), generator=rng),
        "rope_time": torch.from_numpy(temporal_rope(profile, numbers)),
    }


@torch.no_grad()
def streamed(generator: Generator, inputs: Inputs) -> Tensor:
    """Run the same blocks through `step`, with garbage in invalid slots: [1, n, C, h, w]."""
    profile, ring = generator.profile, Ring.of(generator.profile)
    shape = (1, ring.tokens, profile.model.heads, profile.head_dim)
    caches = [[torch.full(shape, math.nan) for _ in range(profile.model.depth)] for _ in range(2)]
    for cache, text in zip(caches, generator.prompt(inputs["text"]), strict=True):
        for layer, rows in enumerate(text):
            cache[layer][:, : ring.text_tokens] = rows
    out = []
    for block in range(inputs["noisy"].shape[1]):
        place = ring.place(block)
        own = [
            inputs[name][:, block] for name in ("noisy", "previous", "condition", "t", "rope_time")
        ]
        cache_len = torch.tensor([place.cache_len], dtype=torch.int32)
        clean, *blocks = generator.step(*own, *caches, cache_len)
        for cache, rows in zip(caches, blocks, strict=True):
            for layer in range(profile.model.depth):
                cache[layer][:, place.slot : place.slot + profile.frame_tokens] = rows[layer]
        out.append(clean)
    return torch.stack(out, dim=1)


def largest(error: Tensor) -> float:
    return float(error.abs().max())


# --- training form = streaming form ---


@ring_cases
def test_forward_equals_step_in_every_ring_case(text: int, sink: int, window: int) -> None:
    profile = profile_of(text, sink, window)
    generator = perturbed(profile)
    inputs = inputs_of(profile, blocks=2 * window + 3)  # fills the ring and wraps it twice
    with torch.no_grad():
        together = generator(**inputs)
    assert 0.1 < float(together.std()) < 100
    assert largest(together - streamed(generator, inputs)) < 1e-5 * max(1.0, largest(together))


def test_forward_equals_step_with_a_halo() -> None:
    profile = TINY.replace(model=dataclasses.replace(TINY.model, halo=1))
    generator = perturbed(profile)
    inputs = inputs_of(profile, blocks=5)
    changed = {**inputs, "noisy": inputs["noisy"].clone()}
    changed["noisy"][:, 3] += 1
    with torch.no_grad():
        together = generator(**inputs)
        # A halo reaches over pixels, never over blocks.
        assert not (generator(**changed) - together)[:, :3].any()
    assert largest(together - streamed(generator, inputs)) < 1e-5 * max(1.0, largest(together))


@pytest.mark.parametrize("text", [0, 4])
def test_forward_equals_step_days_into_a_stream(text: int) -> None:
    profile = profile_of(text)
    generator = perturbed(profile)
    inputs = inputs_of(profile, blocks=4, first=3_000_000)  # six days
    with torch.no_grad():
        together = generator(**inputs)
        at_the_start = generator(**{**inputs, "rope_time": inputs_of(profile, 4)["rope_time"]})
    assert largest(together - streamed(generator, inputs)) < 1e-5 * max(1.0, largest(together))
    if not text:  # between blocks only the distance counts; the text has no place in time
        assert largest(together - at_the_start) < 1e-4 * largest(together)


def test_clips_of_a_batch_do_not_mix() -> None:
    generator = perturbed(TINY)
    inputs = inputs_of(TINY, blocks=4, batch=3)
    with torch.no_grad():
        together = generator(**inputs)
        parts = [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(3)]
        alone = torch.cat([generator(**part) for part in parts])
    assert largest(together - alone) < 1e-5 * largest(together)


# --- who sees whom ---


@ring_cases
@pytest.mark.parametrize("changed", ["noisy", "previous", "condition", "t"])
def test_a_block_changes_exactly_the_blocks_that_can_see_it(
    changed: str, text: int, sink: int, window: int
) -> None:
    profile = profile_of(text, sink, window)
    generator = perturbed(profile)
    n = 2 * window + 3
    inputs, ring = inputs_of(profile, n), Ring.of(profile)
    sees = torch.zeros(n, n)
    for block in range(n):
        sees[block, ring.visible(block)] = 1
    # A layer's keys depend on what the layers below saw.
    reached = torch.linalg.matrix_power(sees, profile.model.depth) > 0
    with torch.no_grad():
        before = generator(**inputs)
        for block in range(n):
            other = inputs[changed].clone()
            noise = torch.randn(other[:, block].shape, generator=seeded(2))
            other[:, block] += 0.5 if changed == "t" else noise
            moved = (generator(**{**inputs, changed: other}) - before).abs().amax(dim=(0, 2, 3, 4))
            assert ((moved > 1e-5) == reached[:, block]).all(), f"{block=} {moved=}"
            assert not moved[:block].any()  # causality holds to the bit


@ring_cases
def test_a_noisy_block_leaves_no_trace_until_it_is_committed(
    text: int, sink: int, window: int
) -> None:
    profile = profile_of(text, sink, window)
    generator, ring = perturbed(profile), Ring.of(profile)
    inputs = inputs_of(profile, 1)
    shape = (1, ring.tokens, profile.model.heads, profile.head_dim)
    depth = range(profile.model.depth)
    caches = [[torch.randn(shape, generator=seeded(3)) for _ in depth] for _ in range(2)]
    kept = [[cache.clone() for cache in group] for group in caches]
    own = [inputs[name][:, 0] for name in ("noisy", "previous", "condition", "t", "rope_time")]
    with torch.no_grad():
        generator.step(*own, *caches, torch.tensor([ring.tokens], dtype=torch.int32))
    for now, then in zip(caches, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(now, then, strict=True))


def test_text_steers_the_video_and_not_the_reverse() -> None:
    generator = perturbed(TINY)
    inputs = inputs_of(TINY, blocks=3)
    with torch.no_grad():
        before = generator(**inputs)
        for token in range(TINY.text.tokens):
            other = inputs["text"].clone()
            other[0, token] = (other[0, token] + 1) % VOCABULARY_SIZE
            moved = (generator(**{**inputs, "text": other}) - before).abs()
            assert (moved.amax(dim=(0, 2, 3, 4)) > 1e-4).all()

    keys, values = generator.prompt(inputs["text"])
    torch.cat([*keys, *values]).sum().backward()
    used = {name.split(".")[0] for name, p in generator.named_parameters() if p.grad is not None}
    assert used == {"vocabulary", "text_in", "text"}  # no visual weight takes part, so no video can


@pytest.mark.parametrize("text", [0, 4])
def test_gradients_reach_every_parameter(text: int) -> None:
    profile = profile_of(text)
    generator = perturbed(profile)
    out = generator(**inputs_of(profile, blocks=3, batch=2))
    (out * torch.randn(out.shape, generator=seeded(4))).sum().backward()
    idle = {name for name, p in generator.named_parameters() if p.grad is None or not p.grad.any()}
    # Of the last layer's text, only keys and values are used.
    last = f"text.{profile.model.depth - 1}.norm_q"
    if text:
        assert idle == {last}
    else:
        assert {name.split(".")[0] for name in idle} == {"vocabulary", "text_in", "text"}


# --- pieces ---


@pytest.mark.parametrize("halo", [0, 1])
def test_patches_come_out_where_they_went_in(halo: int) -> None:
    """With the identity as linear predictor, `previous` is added to the posterior mean."""
    profile = TINY.replace(model=dataclasses.replace(TINY.model, halo=halo))
    generator, c, p = Generator(profile), TINY.video.latent_channels, TINY.model.patch
    with torch.no_grad():
        for channel, row, column in itertools.product(range(c), range(p), range(p)):
            output = channel * p * p + row * p + column
            generator.skip.weight[output, c + channel, halo + row, halo + column] = 1
        inputs = inputs_of(profile, blocks=3, batch=2)
        previous, t = inputs["previous"], inputs["t"][..., None, None, None]
        _, base, spread = posterior(inputs["noisy"], previous, t, generator.step_spread)
        wanted = base + spread * previous
        assert torch.allclose(generator(**inputs), wanted, atol=1e-6)
        first = {name: value[:1] for name, value in inputs.items()}
        assert torch.allclose(streamed(generator, first), wanted[:1], atol=1e-6)


@pytest.mark.parametrize("halo", [0, 1])
def test_a_token_sees_its_patch_and_halo(halo: int) -> None:
    profile = TINY.replace(model=dataclasses.replace(TINY.model, halo=halo))
    generator, rows, columns = perturbed(profile), TINY.latent_height, TINY.latent_width
    channels = 2 * TINY.video.latent_channels + CONDITION_CHANNELS
    x = torch.randn(1, channels, rows, columns, generator=seeded(8))
    near = lambda pixel, token: abs(pixel - 2 * token - 0.5) < 1 + halo
    with torch.no_grad():
        before = generator.embed(x)
        for row, column in itertools.product(range(rows), range(columns)):
            other = x.clone()
            other[..., row, column] += 1
            seen = [
                [near(row, i) and near(column, j) for j in range(columns // 2)]
                for i in range(rows // 2)
            ]
            pairs = zip(generator.embed(other), before, strict=True)
            tokens, direct = (now - then for now, then in pairs)
            moved_tokens = tokens.abs().amax(dim=(0, 2)).reshape(rows // 2, columns // 2) > 1e-5
            moved_patches = torch.nn.functional.max_pool2d(direct.abs().amax(dim=1), 2)[0] > 1e-5
            assert torch.equal(moved_tokens, torch.tensor(seen))
            assert torch.equal(moved_patches, torch.tensor(seen))


def test_a_fresh_generator_knows_what_the_frame_before_and_the_noise_tell() -> None:
    """It returns the posterior mean, which for pure noise is the previous frame."""
    inputs = inputs_of(TINY, 2)
    inputs["t"][:] = 1.0
    assert torch.allclose(Generator(TINY)(**inputs), inputs["previous"], atol=1e-6)


def test_the_posterior_is_bayes_rule() -> None:
    """Compare with a grid over the clean value.

    Over many draws, the innovation has unit deviation, and the error that of the posterior.
    """
    spread = torch.tensor([[[0.3]], [[0.9]]])
    grid = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    for t in (0.05, 0.4, 1.0):
        noisy, previous = torch.tensor([[[0.7]], [[-0.2]]]), torch.tensor([[[0.1]], [[0.5]]])
        _, mean, deviation = posterior(noisy, previous, torch.tensor(t), spread)
        for c in range(2):
            prior = (grid - previous[c].item()) / spread[c].item()
            seen = (noisy[c].item() - (1 - t) * grid) / t
            p = torch.softmax(-(prior**2 + seen**2) / 2, 0)
            wanted = float((p * grid).sum())
            wanted_deviation = float((p * (grid - wanted) ** 2).sum().sqrt())
            assert mean[c].item() == pytest.approx(wanted, abs=1e-3)
            assert deviation[c].item() == pytest.approx(wanted_deviation, rel=1e-3)
    rng = seeded(0)
    previous = torch.randn(2, 200, 200, generator=rng)
    clean = previous + spread * torch.randn(previous.shape, generator=rng)
    noisy = 0.6 * clean + 0.4 * torch.randn(previous.shape, generator=rng)
    innovation, mean, deviation = posterior(noisy, previous, torch.tensor(0.4), spread)
    assert innovation.std(dim=(1, 2)).tolist() == pytest.approx([1, 1], rel=0.02)
    error = (clean - mean).std(dim=(1, 2)).tolist()
    assert error == pytest.approx(deviation.flatten().tolist(), rel=0.02)


def test_the_velocity_of_the_single_step_is_apts() -> None:
    """APT's G(z) = z - v(z, 1) equals `step` at t = 1, with velocity (noisy - clean) / t."""
    generator = perturbed(TINY)
    inputs = inputs_of(TINY, 1)
    inputs["t"] = torch.ones(1, 1)
    with torch.no_grad():
        clean = generator(**inputs)
        velocity = (inputs["noisy"] - clean) / inputs["t"][..., None, None, None]
    assert largest(streamed(generator, inputs) - (inputs["noisy"] - velocity)) < 1e-5


def test_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    rng = seeded(5)
    spatial = spatial_rope(TINY)
    q, k = torch.randn(2, 1, TINY.frame_tokens, 2, TINY.head_dim, generator=rng)

    def score(query_block: int, key_block: int) -> Tensor:
        times = [torch.from_numpy(temporal_rope(TINY, b)) for b in (query_block, key_block)]
        ropes = [join_rope(time[None], spatial) for time in times]
        a, b = layers.rotate(q, ropes[0]), layers.rotate(k, ropes[1])
        assert torch.allclose(a.norm(dim=-1), q.norm(dim=-1), atol=1e-5)
        return torch.einsum("bnhd,bmhd->bhnm", a, b)

    assert torch.allclose(score(5, 3), score(1_000_005, 1_000_003), atol=1e-4)
    assert largest(score(5, 3) - score(5, 2)) > 0.1


def test_temporal_angles_keep_their_precision_for_years() -> None:
    block = 200_000_000  # more than a year at 6 blocks a second
    pairs = rope_pairs(load("demo-cpu"))[0]
    frequency = SLOWEST_TURN ** -(np.arange(pairs) / (pairs - 1))
    angle = np.array([math.fmod(block * f, 2 * math.pi) for f in frequency])
    cos, sin = temporal_rope(load("demo-cpu"), block)
    assert cos == pytest.approx(np.cos(angle), abs=1e-6)
    assert sin == pytest.approx(np.sin(angle), abs=1e-6)
    assert temporal_rope(TINY, np.zeros((2, 3))).shape == (2, 3, 2, rope_pairs(TINY)[0])


@pytest.mark.parametrize("name", PRESETS)
def test_rope_pairs_fill_a_head(name: str) -> None:
    profile = load(name)
    assert sum(rope_pairs(profile)) == profile.head_dim // 2
    assert min(rope_pairs(profile)) > 0
    rope = spatial_rope(profile)
    assert rope.shape == (2, profile.frame_tokens, sum(rope_pairs(profile)[1:]))
    assert torch.allclose(rope.square().sum(dim=0), torch.ones(rope.shape[1:]), atol=1e-6)
    assert (
        len(torch.unique(rope, dim=1)[0]) == profile.frame_tokens
    )  # every token has a place of its own


def test_norm_and_time_features_against_their_formulas() -> None:
    x = torch.randn(3, 8, generator=seeded(6))
    assert torch.allclose(rms_norm(x), normed(x), atol=1e-6)
    features = layers.time_features(torch.tensor([0.0, 0.25]))
    assert features.shape == (2, 256)
    assert torch.equal(features[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    assert float(features[1, 0]) == pytest.approx(math.cos(250), abs=1e-4)
    assert float(features[1, 128 + 64]) == pytest.approx(math.sin(250 / 100), abs=1e-4)


def test_a_stream_against_its_formulas() -> None:
    """A gate of 0 passes its residual branch unchanged, and a gate of -1 shuts it."""
    torch.manual_seed(0)
    stream, x, attended = Stream(TINY), torch.randn(1, 5, 32), torch.randn(1, 5, 2, 16)
    shift, scale = torch.randn(32), torch.randn(32)
    open_gate, shut = torch.zeros(32), torch.full((32,), -1.0)
    with torch.no_grad():
        q, k, v = stream.project(x, shift, scale)
        wanted = ((rms_norm(x) * (1 + scale) + shift) @ stream.qkv.weight.T).reshape(1, 5, 3, 2, 16)
        assert torch.allclose(v, wanted[:, :, 2], atol=1e-5)
        assert torch.allclose(q, normed(wanted[:, :, 0]), atol=1e-5)
        assert torch.allclose(k, normed(wanted[:, :, 1]), atol=1e-5)
        x1 = x + attended.flatten(-2) @ stream.out.weight.T + stream.out.bias
        y = rms_norm(x1) * (1 + scale) + shift
        mlp = stream.w2(torch.nn.functional.gelu(stream.w1(y), approximate="tanh"))
        passed = stream.finish(x, attended, [open_gate, shift, scale, open_gate])
        assert torch.allclose(passed, x1 + mlp, atol=1e-5)
        stopped = stream.finish(x, attended, [open_gate, shift, scale, shut])
        assert torch.allclose(stopped, x1, atol=1e-6)
        assert torch.equal(stream.finish(x, attended, [shut, shift, scale, shut]), x)


# --- sizes ---


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_without_memory(name: str) -> None:
    with torch.device("meta"):
        generator = Generator(load(name))
    assert all(tensor.is_meta for tensor in generator.state_dict().values())
    assert generator.spatial_rope.is_meta


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("aapt-8b")])
def test_the_8b_presets_are_8b(name: str) -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Generator(load(name)).parameters())
    assert 8.0e9 < parameters < 8.3e9, f"{parameters / 1e9:.3f} B"


def test_embeddings_of_an_external_encoder_take_the_place_of_words() -> None:
    profile = TINY.replace(text=Text("embedding", 6, 24))
    generator = perturbed(profile)
    inputs = inputs_of(profile, 3) | {"text": torch.randn(1, 6, 24, generator=seeded(7))}
    with torch.no_grad():
        together = generator(**inputs)
    assert largest(together - streamed(generator, inputs)) < 1e-5 * max(1.0, largest(together))
    assert not hasattr(generator, "vocabulary")
