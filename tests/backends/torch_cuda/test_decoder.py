"""The GPU's streaming decoder against the module whose weights it takes.

Its convolutions are tried in both forms.
"""

import numpy as np
import pytest
import torch

from aapt_deploy.backends.torch_cuda.decoder import Conv, StreamDecoder
from aapt_deploy.models.aapt.vae import to_pixels
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
