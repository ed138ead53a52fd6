"""Wan2.1's VAE and TAEHV against the authors' own code, latent frame by latent frame."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from aapt_deploy import profiles
from aapt_deploy.models.wan import keys, networks, signature, vae
from aapt_deploy.profiles import Profile
from tests.support import wan

WIDTHS = {  # TAEHV's of the fixture
    "encoder_channels": (8, 8, 8, 8), "decoder_channels": (16, 12, 8, 8),
}  # fmt: skip
KINDS = ("wan", "taehv")


def profile_of(kind: str) -> Profile:
    tiny = profiles.load("wan-tiny-cpu")
    small = tiny.replace(video=dataclasses.replace(tiny.video, width=48, height=32))
    if kind == "wan":
        return small
    return small.replace(vae=profiles.Vae(**WIDTHS, blocks=3, temporal_kernel=2, kind="taehv"))


def loaded(kind: str) -> nn.Module:
    profile = profile_of(kind)
    made = networks.VAES[kind](profile).eval()
    name = {"wan": "weights-vae-tiny", "taehv": "weights-taehv-tiny"}[kind]
    wan.loaded(made, keys.vae_sources(profile), wan.weights(name))
    return made


def reference(kind: str) -> dict[str, Tensor]:
    """The fixture, with pictures in 0..1."""
    found = wan.weights({"wan": "vae-tiny", "taehv": "taehv-tiny"}[kind])
    if kind == "wan":
        found |= {name: found[name] / 2 + 0.5 for name in ("frames", "picture")}
    return found


def streamed(kind: str, network: nn.Module) -> tuple[Tensor, list[list[Tensor]]]:
    """Decode the fixture's latents; return frames [T, 3, H, W] and the state after each."""
    state = [torch.zeros(spec.shape) for spec in signature.decoder(profile_of(kind)).state]
    frames, states = [], []
    with torch.no_grad():
        for i, latent in enumerate(reference(kind)["latents"][0]):
            made, state = network.decode(latent[None], state)  # type: ignore[operator]
            frames.append(made if i else made[-1:])
            states.append(state)
    return torch.cat(frames), states


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_the_authors_own(kind: str) -> None:
    frames, states = streamed(kind, loaded(kind))
    wanted = reference(kind)["frames"][0]
    assert frames.shape == wanted.shape
    assert float((frames - wanted).abs().max()) < wan.TOLERANCE
    specs = signature.decoder(profile_of(kind)).state
    assert [tuple(x.shape) for x in states[0]] == [spec.shape for spec in specs]


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_has_the_authors_latent(kind: str) -> None:
    found = reference(kind)
    with torch.no_grad():
        latent = loaded(kind).encode(found["picture"][:, 0])  # type: ignore[operator]
    assert float((latent - found["picture_latent"][:, 0]).abs().max()) < wan.TOLERANCE


def test_the_doubling_layers_remember_what_the_authors_do() -> None:
    _, states = streamed("wan", loaded("wan"))
    for place in (11, 18):
        wanted = reference("wan")[f"memory_after_2.{place}"]
        assert float((states[2][place] - wanted).abs().max()) < wan.TOLERANCE
    assert all(float(state[-1]) == 1 for state in states)
    assert len(states[0]) == 33


def test_a_first_latent_that_is_taken_for_a_later_one_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`seen` is 1 from the start, as in a decoder with zeroed memories alone."""
    plain = vae.Past.__init__
    ones = lambda self, memory, seen: plain(self, memory, torch.ones_like(seen))
    monkeypatch.setattr(vae.Past, "__init__", ones)
    frames, _ = streamed("wan", loaded("wan"))
    difference = (frames - reference("wan")["frames"][0]).abs().amax((1, 2, 3))
    assert float(difference[0]) > 0.05 and float(difference[-1]) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_without_a_start_image_has_no_encoder(kind: str) -> None:
    profile = profile_of(kind)
    bare = profile.replace(vae=dataclasses.replace(profile.vae, encoder_channels=()))
    network = networks.VAES[kind](bare)
    assert not hasattr(network, "encoder")
    assert network.state_dict().keys() == keys.vae_sources(bare).keys()
    assert "encoder" not in signature.signatures(bare)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_has_a_source_of_its_shape(kind: str) -> None:
    profile, made = profile_of(kind), loaded(kind).state_dict()
    theirs = wan.weights({"wan": "weights-vae-tiny", "taehv": "weights-taehv-tiny"}[kind])
    for ours, source in keys.vae_sources(profile).items():
        for name in source.theirs:
            assert tuple(theirs[name].shape) == source.shape(tuple(made[ours].shape)), ours
