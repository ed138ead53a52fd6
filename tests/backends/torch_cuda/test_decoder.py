"""The GPU's streaming decoder against the module whose weights it takes.

Its convolutions are tried in both forms.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from aapt_deploy.backends.torch_cuda.decoder import Conv, StreamDecoder
from aapt_deploy.models.aapt.vae import CausalConv, to_pixels
from aapt_deploy.profiles import Vae as VaeShape
from tests.support.vaes import SHAPES, TINY, latents, perturbed, shapes

SIZE = (TINY.latent_height, TINY.latent_width)


def streamed(decoder: StreamDecoder, z: torch.Tensor) -> np.ndarray:
    """z [T, C, h, w] -> uint8 [T, 4, H, W, 3]"""
    with torch.no_grad():
        return np.stack([decoder(frame[None]).numpy() for frame in z])


@pytest.mark.parametrize("volumes", [False, True], ids=["stacked", "volumes"])
@shapes
def test_a_stream_decodes_as_the_module_does(shape: VaeShape, volumes: bool) -> None:
    vae, z = perturbed(shape), latents(5, batch=1)[0]
    decoder = StreamDecoder(vae.decoder, *SIZE, torch.float32)
    decoder.choose(lambda call: 0.0 if "volume" in call.__code__.co_names[0] and volumes else 1.0)
    assert {conv.as_volume for conv, _ in decoder.rates if conv.frames > 1} <= {volumes}
    with torch.no_grad():
        whole = to_pixels(vae.decode(z[None])[0])  # [1 + 4 (T - 1), H, W, 3]
    made = streamed(decoder, z)
    assert made.shape == (5, 4, TINY.video.height, TINY.video.width, 3)
    frames = np.concatenate([made[:1, -1], made[1:].reshape(-1, *made.shape[2:])])
    assert int(np.abs(frames.astype(int) - whole.numpy()).max()) <= 1
    assert frames.std() > 10
    decoder.clear()
    assert np.array_equal(streamed(decoder, z), made)  # nothing is left of the stream before


def test_half_precision_costs_little() -> None:
    vae, z = perturbed(SHAPES["paper"]), latents(4, batch=1)[0]
    exact, half = (
        streamed(StreamDecoder(vae.decoder, *SIZE, dtype), z).astype(float)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert 0 < np.abs(exact - half).mean() < 2


def test_memory_stays_where_it_is() -> None:
    """A captured graph writes to the addresses it was captured with."""
    vae, z = perturbed(SHAPES["paper"]), latents(3, batch=1)[0]
    decoder = StreamDecoder(vae.decoder, *SIZE, torch.float32)
    places = [conv.memory.data_ptr() for conv, _ in decoder.rates]
    streamed(decoder, z)
    assert [conv.memory.data_ptr() for conv, _ in decoder.rates] == places
    assert (
        sum(float(conv.memory.abs().sum()) > 0 for conv, _ in decoder.rates if conv.frames > 1) > 3
    )


def test_the_faster_form_is_taken() -> None:
    vae = perturbed(SHAPES["paper"])
    conv = Conv(vae.decoder.inlet, *SIZE, torch.float32)
    for over_volume, over_stack in ((1.0, 2.0), (2.0, 1.0)):
        conv.choose(
            1,
            lambda call, a=over_volume, b=over_stack: (
                a if "over_volume" in call.__code__.co_names else b
            ),
        )
        assert conv.as_volume == (over_volume < over_stack)


@pytest.mark.parametrize("volume", [False, True], ids=["stacked", "volume"])
def test_one_convolution_of_several_frames_at_a_time_in_both_forms(volume: bool) -> None:
    """Against the module it takes, with no two sizes alike; its memory goes on between calls."""
    torch.manual_seed(0)
    module = CausalConv(3, 5, frames=4)
    conv = Conv(module, 6, 7, torch.float32)
    conv.as_volume = volume
    x = torch.randn(1, 9, 3, 6, 7)
    with torch.no_grad():
        whole, _ = module(x, torch.zeros(1, 3, 3, 6, 7))
        parts = [conv(part) for part in x[0].split([2, 1, 6])]
    assert torch.allclose(torch.cat(parts), whole[0], atol=1e-5)
    assert torch.equal(conv.memory, x[0, -3:])
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in parts)


def test_a_sorted_convolution_gives_its_outputs_in_that_order() -> None:
    torch.manual_seed(0)
    module, order = CausalConv(2, 5, frames=1), torch.tensor([3, 0, 4, 1, 2])
    x = torch.randn(1, 2, 6, 7)
    with torch.no_grad():
        plain, sorted_ = (Conv(module, 6, 7, torch.float32, o)(x) for o in (None, order))
    assert torch.allclose(sorted_, plain[:, order], atol=1e-6)


def test_weights_and_memory_lie_channels_last_in_the_decoders_type_on_its_device() -> None:
    """As tensor cores read them. The device here is not the default one."""
    vae = perturbed(SHAPES["paper"]).to("meta")
    decoder = StreamDecoder(vae.decoder, *SIZE, torch.bfloat16)
    timed: list[torch.Tensor] = []
    decoder.choose(lambda call: timed.append(call()) or 1.0)  # type: ignore[func-returns-value]
    assert {conv.frames for conv, _ in decoder.rates} == {1, 2, 3}
    for conv, _ in decoder.rates:
        for tensor in (conv.flat, conv.memory):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert conv.volume.is_contiguous(memory_format=torch.channels_last_3d)
        for tensor in (conv.flat, conv.volume, conv.memory, conv.bias):
            assert tensor.dtype == torch.bfloat16 and tensor.device.type == "meta"
        assert not conv.as_volume, "equal times"
    assert timed and {(x.device.type, x.dtype) for x in timed} == {("meta", torch.bfloat16)}
    frames = decoder(torch.empty(1, TINY.video.latent_channels, *SIZE, device="meta"))
    assert frames.shape == (4, TINY.video.height, TINY.video.width, 3)
    assert frames.dtype == torch.uint8 and frames.is_contiguous()


def a_second(call: Callable[[], object]) -> float:
    call()
    return 1.0


@shapes
def test_each_convolution_is_timed_with_the_frames_and_the_size_that_it_gets(
    shape: VaeShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = StreamDecoder(perturbed(shape).decoder, *SIZE, torch.float32)
    given: dict[Conv, tuple[int, ...]] = {}
    convolve = Conv.__call__

    def watched(conv: Conv, x: torch.Tensor) -> torch.Tensor:
        assert conv not in given
        given[conv] = tuple(x.shape)
        return convolve(conv, x)

    monkeypatch.setattr(Conv, "__call__", watched)
    streamed(decoder, latents(1, batch=1)[0])
    timed = {conv: (frames, conv.inputs, *conv.shape) for conv, frames in decoder.rates}
    assert len(timed) == len(decoder.rates) and timed == given
    chosen: list[tuple[int, ...]] = []
    monkeypatch.setattr(Conv, "over_volume", lambda conv, seen: chosen.append(tuple(seen.shape)))
    decoder.choose(a_second)
    pasts = [(conv.frames - 1, given[conv]) for conv, _ in decoder.rates if conv.frames > 1]
    assert chosen == [(past + frames, *rest) for past, (frames, *rest) in pasts]
