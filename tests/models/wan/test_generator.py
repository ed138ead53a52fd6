"""Rollouts of the authors' own code, reproduced; and what each likely mistake would do to them."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from aapt_deploy import profiles
from aapt_deploy.errors import ProfileError
from aapt_deploy.models import sampler
from aapt_deploy.models.family import family_of
from aapt_deploy.models.wan import generator, keys, rope
from aapt_deploy.profiles import Profile
from tests.support import wan

CASES = (
    "sf-chunk3-window9-sink3", "sf-frame-prompt-switch", "sf-tall", "cf-frame-1step-i2v",
    "ll-infinity-window9-sink3",
)  # fmt: skip
SEEN = 0.05  # a difference that nobody takes for rounding


@pytest.mark.parametrize("name", CASES)
def test_a_rollout_is_the_authors_own(name: str) -> None:
    case = wan.case(name)
    assert wan.compare(case, wan.eager(case)).latents < wan.TOLERANCE


def worst(name: str) -> float:
    case = wan.case(name)
    return wan.compare(case, wan.eager(case)).latents


# --- each of these mistakes is found ---


def test_rows_and_columns_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    def exchanged(profile: Profile) -> Tensor:
        (_, height, width), patch = rope.rope_pairs(profile), profile.model.patch
        assert height == width
        rows, columns = profile.latent_height // patch, profile.latent_width // patch
        right = generator_rope(profile).unflatten(2, (2, height)).unflatten(1, (rows, columns))
        return right.flip(3).flatten(3).flatten(1, 2)

    generator_rope = generator.spatial_rope
    monkeypatch.setattr(generator, "spatial_rope", exchanged)
    assert worst("sf-tall") > SEEN


def test_interleaved_pairs_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    order = lambda profile: torch.arange(profile.model.dim)
    monkeypatch.setattr(keys, "half_split", order)
    assert worst("sf-tall") > SEEN


def test_queries_and_keys_normalised_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_head(x: Tensor, weight: Tensor) -> Tensor:
        heads = torch.nn.functional.rms_norm(x.unflatten(-1, (2, -1)), (32,), eps=generator.EPS)
        return heads.flatten(-2) * weight

    monkeypatch.setattr(generator, "rms_norm", by_head)
    assert worst("sf-tall") > SEEN


def test_the_texts_zero_tail_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    def masked(self: generator.Block, vectors: Tensor) -> tuple[Tensor, Tensor]:
        k, v = plain(self, vectors)
        return torch.cat([k[:, :11], k[:, :5]], 1), torch.cat([v[:, :11], v[:, :5]], 1)

    plain = generator.Block.text
    monkeypatch.setattr(generator.Block, "text", masked)
    assert worst("sf-tall") > SEEN


def test_sine_before_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = lambda t: np.roll(rope.time_features(t), rope.TIME_FEATURES // 2, axis=1)
    monkeypatch.setattr("aapt_deploy.models.wan.family.time_features", swapped)
    assert worst("sf-tall") > SEEN


def test_one_temporal_index_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = lambda profile, frames: rope.temporal_rope(profile, np.full_like(frames, frames[0]))
    monkeypatch.setattr("aapt_deploy.models.wan.family.temporal_rope", flat)
    assert worst("sf-tall") > SEEN


@pytest.mark.parametrize("mistake", ["no write pass", "window too long", "no first block"])
def test_a_wrong_profile(mistake: str) -> None:
    name = "cf-frame-1step-i2v" if mistake == "no first block" else "sf-chunk3-window9-sink3"
    case = wan.case(name)
    window, steps = case.profile.window, case.profile.sampler
    wrong = {
        "no write pass": {"sampler": dataclasses.replace(steps, write=False)},
        "window too long": {"window": dataclasses.replace(window, frames=window.frames + 3)},
        "no first block": {"sampler": dataclasses.replace(steps, first_block=(1.0, 0.5, 0.4, 0.2))},
    }[mistake]
    case = case._replace(profile=case.profile.replace(**wrong))
    assert wan.compare(case, wan.eager(case)).latents > SEEN


def test_a_sink_that_stays_behind() -> None:
    case = wan.case("ll-infinity-window9-sink3")
    still = dataclasses.replace(case.profile.window, sink_follows=False)
    case = case._replace(profile=case.profile.replace(window=still))
    assert wan.compare(case, wan.eager(case)).latents > SEEN


def test_the_second_prompt_ignored() -> None:
    case = wan.case("sf-frame-prompt-switch")
    case.tensors["text.2"] = case.tensors["text"]
    assert wan.compare(case, wan.eager(case)).latents > SEEN


# --- parts ---


def test_time_features_and_angles_do_not_lose_precision_in_long_streams() -> None:
    profile = profiles.load("wan-tiny-cpu")
    near, far = (rope.temporal_rope(profile, np.array([k, k + 7])) for k in (0, 10_000_000))
    dot = lambda x: x[0, 0, 0] * x[0, 0, 1] + x[0, 1, 0] * x[0, 1, 1]  # cosine of the difference
    np.testing.assert_allclose(dot(far), dot(near), atol=2e-6)
    assert rope.time_features(0.9375)[0, 0] == pytest.approx(np.cos(937.5), abs=1e-6)


def test_the_sampler_draws_as_the_reference_does() -> None:
    asked = list[float]()

    def clean(x: np.ndarray, t: float) -> np.ndarray:
        asked.append(t)
        return x / 2

    rng, again = np.random.default_rng(5), np.random.default_rng(5)
    x = np.ones((2, 3), np.float32)
    made = sampler.renoise(clean, x, (1.0, 0.75), rng)
    noise = again.standard_normal((2, 3), np.float32)
    np.testing.assert_allclose(made, (0.25 * 0.5 + 0.75 * noise) / 2, rtol=1e-6)
    assert asked == [1.0, 0.75]
    assert not profiles.Sampler((1.0,), kind="renoise").draws
    assert profiles.Sampler((1.0,), kind="renoise", first_block=(1.0, 0.5)).draws
    with pytest.raises(AssertionError, match="empty"):
        sampler.renoise(clean, x, (), rng)


@pytest.mark.parametrize(
    ("section", "values", "problem"),
    [
        ("text", {"attention": "joint"}, "text.attention = 'joint' is not 'cross'"),
        ("text", {"kind": "vocabulary"}, "text.kind = 'vocabulary' is not 'embedding'"),
        ("text", {"tokens": 0}, "text.tokens = 0"),
        ("vae", {"kind": "aapt"}, "vae.kind = 'aapt' is not 'wan' or 'taehv'"),
        ("vae", {"temporal_kernel": 2}, "vae.temporal_kernel = 2 is not 3"),
        ("vae", {"decoder_channels": (8, 8, 8)}, "has 3 scales, not 4"),
        ("video", {"latent_channels": 4}, "video.latent_channels = 4 is not 16"),
        ("video", {"block_frames": 2}, "vae.encoder_channels is set with video.block_frames = 2"),
        ("model", {"halo": 1}, "model.halo = 1 is not 0"),
    ],
)
def test_a_profile_that_the_family_cannot_build_is_refused(
    section: str, values: dict[str, object], problem: str
) -> None:
    tiny = profiles.load("wan-tiny-cpu")
    changed = {section: dataclasses.replace(getattr(tiny, section), **values)}
    if "block_frames" in values:
        changed["window"] = profiles.Window(4, 0)
    profile = tiny.replace(**changed)
    with pytest.raises(ProfileError, match="profile wan-tiny-cpu") as caught:
        family_of(profile).signatures(profile)
    assert problem in str(caught.value)
