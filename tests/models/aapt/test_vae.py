"""Check the VAE: clips decode like streams, time is causal, starts are closed-form optima."""

import math

import pytest
import torch
from torch import Tensor, nn

from aapt_deploy.models.aapt import signature
from aapt_deploy.models.aapt.vae import CausalConv, Decoder, Encoder, Vae, from_pixels, to_pixels
from aapt_deploy.models.aapt.vae import channels_to_space_time as unfold
from aapt_deploy.models.aapt.vae import space_time_to_channels as fold
from aapt_deploy.profiles import Profile, Video, load, preset_folder
from aapt_deploy.profiles import Vae as VaeShape
from aapt_deploy.train.losses.vae_fit import pca_encoder, ridge_decoder
from tests.support.toys import TINY
from tests.support.vaes import latents, perturbed, shapes

PRESETS = sorted(path.stem for path in preset_folder().glob("*.toml"))


def clip(frames: int, batch: int = 2) -> Tensor:
    size = (batch, frames, 3, TINY.video.height, TINY.video.width)
    return torch.rand(size, generator=torch.Generator().manual_seed(2)) * 2 - 1


# --- one code, two schedules ---


@shapes
def test_a_stream_decodes_like_a_whole_clip(shape: VaeShape) -> None:
    vae, z = perturbed(shape), latents(5)
    with torch.no_grad():
        whole = vae.decode(z)
        memory, parts = vae.decoder.empty_memory(z), []
        for i in range(z.shape[1]):
            frames, memory = vae.decode_step(z[:, i], memory)
            assert frames.shape == (2, 4, 3, TINY.video.height, TINY.video.width)
            parts.append(frames)
    assert whole.shape == (2, 1 + 4 * 4, 3, TINY.video.height, TINY.video.width)
    assert float((torch.cat(parts, dim=1)[:, 3:] - whole).abs().max()) < 1e-5


@shapes
def test_the_memory_matters(shape: VaeShape) -> None:
    vae, z = perturbed(shape), latents(2)
    with torch.no_grad():
        _, memory = vae.decode_step(z[:, 0], vae.decoder.empty_memory(z))
        carried, _ = vae.decode_step(z[:, 1], memory)
        forgotten, _ = vae.decode_step(z[:, 1], vae.decoder.empty_memory(z))
    assert float((carried - forgotten).abs().max()) > 1e-2


@shapes
def test_the_first_frame_alone_is_latent_0(shape: VaeShape) -> None:
    vae, frames = perturbed(shape), clip(9)
    with torch.no_grad():
        z = vae.encode(frames)
        alone = vae.encode(frames[:, :1])
        assert z.shape == (2, 3, TINY.video.latent_channels, TINY.latent_height, TINY.latent_width)
        assert alone.shape[1] == 1
        assert torch.allclose(z[:, :1], alone, atol=1e-6)
        assert vae.decode(alone).shape[1] == 1


# --- causality by perturbation ---


@shapes
def test_the_encoder_is_causal(shape: VaeShape) -> None:
    vae, frames = perturbed(shape), clip(13, batch=1)
    with torch.no_grad():
        before = vae.encode(frames)
        for at in range(13):
            other = frames.clone()
            other[:, at] = -other[:, at]
            moved = (vae.encode(other) - before).abs().amax(dim=(0, 2, 3, 4))
            first = math.ceil(at / 4)  # the latent whose group holds the frame
            assert not moved[:first].any(), f"frame {at} changed an earlier latent: {moved}"
            assert float(moved[first]) > 1e-3, f"frame {at} does not change latent {first}"


@shapes
def test_the_decoder_is_causal(shape: VaeShape) -> None:
    vae, z = perturbed(shape), latents(4, batch=1)
    with torch.no_grad():
        before = vae.decode(z)
        for at in range(4):
            other = z.clone()
            other[:, at] = -other[:, at]
            moved = (vae.decode(other) - before).abs().amax(dim=(0, 2, 3, 4))
            first = max(0, 4 * at - 3)  # of the frames that latent `at` makes
            assert not moved[:first].any(), f"latent {at} changed an earlier frame: {moved}"
            own = moved[first : 4 * at + 1]
            assert (own > 1e-3).all(), f"latent {at} does not reach its own frames: {moved}"


def test_a_causal_convolution_against_a_plain_loop() -> None:
    torch.manual_seed(0)
    layer, x = CausalConv(3, 5, frames=3), torch.randn(2, 6, 3, 4, 7)
    with torch.no_grad():
        y, memory = layer(x, torch.zeros(2, 2, 3, 4, 7))
        padded = torch.cat([torch.zeros(2, 2, 3, 4, 7), x], dim=1)
        kernel = layer.conv.weight.unflatten(1, (3, 3))  # [outputs, frames, inputs, 3, 3]
        for t in range(6):
            pairs = [(padded[:, t + i], kernel[:, i]) for i in range(3)]
            slow = sum(nn.functional.conv2d(frame, part, padding=1) for frame, part in pairs)
            assert torch.allclose(y[:, t], slow + layer.conv.bias[:, None, None], atol=1e-5)
    assert torch.equal(memory, x[:, -2:])


# --- shuffles and pixels ---


@pytest.mark.parametrize(("time", "space"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 8)])
def test_the_shuffles_are_inverses(time: int, space: int) -> None:
    shape = (2, 2 * time, 3, 3 * space, 5 * space)
    x = torch.arange(math.prod(shape)).reshape(shape)
    folded = fold(x, time, space)
    assert folded.shape == (2, 2, time * 3 * space * space, 3, 5)
    assert torch.equal(unfold(folded, time, space), x)
    # The pixels behind folded pixel (1, 2) of time 1.
    block = x[1, time : 2 * time, :, space : 2 * space, 2 * space : 3 * space]
    assert torch.equal(folded[1, 1, :, 1, 2].sort().values, block.flatten().sort().values)


def test_pixels_round_trip_and_clip() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    assert torch.equal(to_pixels(from_pixels(levels)), levels)
    assert from_pixels(levels).shape == (1, 3, 16, 16)
    wide = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]).reshape(5, 1, 1, 1)
    assert to_pixels(wide).flatten().tolist() == [0, 0, 128, 255, 255]


# --- shapes by signature ---


def meta_decoder(profile: Profile) -> Decoder:
    with torch.device("meta"):
        return Decoder(profile)


def memory_shapes(decoder: Decoder, profile: Profile) -> list[tuple[int, ...]]:
    size = (profile.latent_height, profile.latent_width)
    return [(1, *shape) for shape in decoder.memory_shapes(*size)]


@pytest.mark.parametrize("name", PRESETS)
def test_the_signature_lists_the_decoders_memory(name: str) -> None:
    profile = load(name)
    decoder = meta_decoder(profile)
    shapes = memory_shapes(decoder, profile)
    assert [spec.shape for spec in signature.decoder(profile).state] == shapes
    z = torch.empty(1, *signature.latent_shape(profile), device="meta")
    frames, memory = decoder(z, decoder.empty_memory(z))
    assert [tuple(m.shape) for m in memory] == shapes  # what leaves fits what enters
    assert frames.shape == (1, 4, 3, profile.video.height, profile.video.width)


@shapes
def test_the_signature_lists_the_memory_of_every_shape(shape: VaeShape) -> None:
    profile = TINY.replace(vae=shape)
    shapes = memory_shapes(meta_decoder(profile), profile)
    assert [spec.shape for spec in signature.decoder(profile).state] == shapes


@pytest.mark.parametrize("stride", [2, 4, 16])
def test_other_strides_build_and_decode(stride: int) -> None:
    scales = max(2, int(math.log2(stride)))
    shape = VaeShape((4,) * scales, (4,) * scales, 1, 2)
    profile = TINY.replace(video=Video(64, 32, 24, 4, spatial_stride=stride), vae=shape)
    vae = Vae(profile)
    with torch.no_grad():
        z = vae.encode(torch.zeros(1, 5, 3, 32, 64))
        assert z.shape == (1, 2, 4, 32 // stride, 64 // stride)
        assert vae.decode(z).shape == (1, 5, 3, 32, 64)
    shapes = memory_shapes(vae.decoder, profile)
    assert [spec.shape for spec in signature.decoder(profile).state] == shapes


@pytest.mark.parametrize("name", PRESETS)
def test_the_encoder_of_every_preset_encodes(name: str) -> None:
    profile = load(name)
    with torch.device("meta"):
        z = Encoder(profile)(torch.empty(1, 4, 3, profile.video.height, profile.video.width))
    assert tuple(z.shape) == (1, *signature.latent_shape(profile))


def test_gradients_reach_every_parameter() -> None:
    vae = perturbed(TINY.vae)
    out = vae.decode(vae.encode(clip(9)))
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


# --- closed-form starts ---


def low_rank_clips(rank: int, clips: int = 6, groups: int = 4) -> list[Tensor]:
    """Make clips [4 groups, 3, H, W] whose patches are mixtures of `rank` patterns."""
    rng = torch.Generator().manual_seed(4)
    patterns = torch.linalg.qr(torch.randn(4 * 3 * 64, rank, generator=rng)).Q * 8
    size = (TINY.latent_height, TINY.latent_width)
    mixtures = torch.randn(clips, groups, *size, rank, generator=rng)
    mixtures = mixtures * torch.linspace(1.0, 0.4, rank)
    return [unfold((m @ patterns.T).movedim(-1, 1)[None], 4, 8)[0] for m in mixtures]


def patches_of(clips: list[Tensor]) -> Tensor:
    """All patches of `clips`: [N, 4 * 3 * 64]."""
    return torch.cat([fold(c[None], 4, 8)[0].movedim(1, -1).flatten(0, -2) for c in clips])


@torch.no_grad()
def error(vae: Vae, clips: list[Tensor]) -> float:
    frames = torch.stack(clips)  # [N, 4 groups, 3, H, W]
    z = vae.encoder(frames)
    return float((vae.decoder(z, vae.decoder.empty_memory(z))[0] - frames).square().mean())


def test_pca_keeps_a_low_rank_set_whole() -> None:
    torch.manual_seed(0)
    vae, clips = Vae(TINY), low_rank_clips(TINY.video.latent_channels)
    assert pca_encoder(vae, clips) == pytest.approx(1.0, abs=1e-5)
    with torch.no_grad():
        z = torch.cat([vae.encoder(c[None])[0] for c in clips])  # [n, C, h, w]
    flat = z.movedim(1, -1).flatten(0, -2)
    assert float(flat.mean(dim=0).abs().max()) < 1e-4
    assert float(flat.square().mean()) == pytest.approx(1.0, rel=1e-4)
    covariance = flat.T @ flat / len(flat)
    assert (
        float((covariance - covariance.diagonal().diag()).abs().max()) < 1e-4
    )  # channels are decorrelated
    power = covariance.diagonal().tolist()
    assert power == sorted(power, reverse=True)
    patches, affine = patches_of(clips), nn.functional.pad(flat, (0, 1), value=1.0)
    solution = torch.linalg.lstsq(affine, patches).solution
    assert torch.allclose(affine @ solution, patches, atol=1e-3)  # nothing was lost


def test_pca_of_less_than_the_latent_holds_stays_finite() -> None:
    torch.manual_seed(0)
    vae = Vae(TINY)
    assert pca_encoder(vae, low_rank_clips(2)) == pytest.approx(1.0, abs=1e-5)
    with torch.no_grad():
        z = vae.encoder(low_rank_clips(2)[0][None])
    assert z.isfinite().all()
    assert float(z.abs().max()) < 100


def test_clips_without_any_picture_leave_finite_weights() -> None:
    vae, black = Vae(TINY), [torch.full((8, 3, TINY.video.height, TINY.video.width), -1.0)] * 2
    assert pca_encoder(vae, black) == 1.0
    ridge_decoder(vae, black)
    assert all(p.isfinite().all() for p in vae.parameters())
    assert error(vae, black) < 1e-3


def test_pca_reports_what_it_drops() -> None:
    torch.manual_seed(0)
    clips = low_rank_clips(12)
    kept = pca_encoder(Vae(TINY), clips)
    patches = patches_of(clips).double()
    power = torch.linalg.svdvals(patches - patches.mean(dim=0)).square()
    assert kept == pytest.approx(float(power[:4].sum() / power.sum()), rel=1e-4)
    assert 0.3 < kept < 0.8


def test_ridge_lowers_the_error() -> None:
    torch.manual_seed(0)
    vae, clips = Vae(TINY), low_rank_clips(TINY.video.latent_channels, clips=24)
    pca_encoder(vae, clips)
    power = sum(float(c.square().mean()) for c in clips) / len(clips)
    before = error(vae, clips)
    ridge_decoder(vae, clips)
    assert error(vae, clips) < 0.05 * power < 0.05 * before
    held_out = low_rank_clips(TINY.video.latent_channels, clips=26)[24:]
    assert error(vae, held_out) < 0.06 * power
    best = error(vae, clips)
    with torch.no_grad():
        for scale in (0.8, 1.25 / 0.8):  # an optimum, not merely small
            vae.decoder.linear.conv.weight.mul_(scale)
            assert error(vae, clips) > best
