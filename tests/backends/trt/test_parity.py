"""The comparison of plans with their exported graphs: figures, limits, words."""

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aapt_deploy.backends.torch_eager import EagerEngines
from aapt_deploy.backends.trt import parity
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import ParityError
from aapt_deploy.models.checkpoint import Checkpoint
from aapt_deploy.profiles import Profile, Text
from aapt_deploy.rollout.starts import all_starts


class Spoilt:
    """Engines of the checkpoint, one of whose outputs is changed."""

    def __init__(self, loaded: Checkpoint, graph: str = "", output: str = "", change: Any = None):
        self.engines = EagerEngines(copy.deepcopy(loaded), 1, "fp32")
        self.graph, self.output, self.change = graph, output, change
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __getitem__(self, graph: str) -> Any:
        engine: Any = self.engines[graph]

        def run(**inputs: Any) -> dict[str, np.ndarray]:
            self.calls.append((graph, inputs))
            found = dict(engine.run(**inputs))
            if graph == self.graph:
                found[self.output] = self.change(found[self.output])
            return found

        return SimpleNamespace(run=run, reset=engine.reset)


def test_engines_of_the_same_weights_agree(bundle: Path, loaded: Checkpoint) -> None:
    """One pass of every graph, with the text in the cache, from the first start frame."""
    opened = Bundle.open(bundle)
    first, engines = parity.start_of(opened), Spoilt(loaded)
    found = parity.compare(engines, opened, first)  # type: ignore[arg-type]
    assert list(found) == ["encoder", "generator", "psnr_db"]
    assert found["encoder"] < 1e-4 and found["generator"] < 1e-4 and found["psnr_db"] > 60
    assert found["psnr_db"] == round(found["psnr_db"], 2)
    graphs = [graph for graph, _ in engines.calls]
    assert graphs == ["encoder", "prompt", "generator", "decoder"]
    inputs = engines.calls[2][1]
    assert inputs["block"] == 0 and inputs["time"].tolist() == [1.0]
    assert inputs["time"].dtype == np.float32
    drawn = [inputs[name] for name in ("noisy", "condition", "rope_time")]
    assert all(x.dtype == np.float32 and len(np.unique(x)) == x.size for x in drawn)
    assert 0.8 < float(np.std(inputs["noisy"])) < 1.2


@pytest.mark.parametrize(
    ("graph", "output", "change", "said"),
    [
        ("encoder", "latent", lambda x: 1.11 * x, r"encoder differs by 0\.110 \(limits"),
        ("generator", "clean", lambda x: 1.5 * x, r"generator differs by 0\.500 \(limits"),
        ("generator", "clean", lambda x: x * np.nan, r"generator differs by inf \(limits"),
        ("decoder", "frames", lambda x: x ^ 32, r"frames have 18\.03 dB \(limits"),
    ],
)
def test_what_differs_is_named_with_its_size_and_the_limits(
    bundle: Path, loaded: Checkpoint, graph: str, output: str, change: Any, said: str
) -> None:
    opened = Bundle.open(bundle)
    quality = opened.profile.quality
    with pytest.raises(ParityError, match=said) as caught:
        parity.compare(  # type: ignore[arg-type]
            Spoilt(loaded, graph, output, change), opened, parity.start_of(opened)
        )
    text = str(caught.value)
    assert text.startswith("the plans disagree with the exported graphs: ")
    assert text.endswith(f"(limits: {quality.latent_error}, {quality.psnr_db} dB)")
    assert "--attention native" in caught.value.hint and "not changed" in caught.value.hint


def test_a_difference_at_its_limit_passes(bundle: Path, loaded: Checkpoint) -> None:
    opened = Bundle.open(bundle)
    engines = Spoilt(loaded, "encoder", "latent", lambda x: x * np.float32(1.0625))
    limit = parity.compare(engines, opened, parity.start_of(opened))["encoder"]  # type: ignore[arg-type]
    assert limit == 0.0625
    for value, passes in ((limit, True), (limit - 1e-5, False)):
        quality = dataclasses.replace(opened.profile.quality, latent_error=value)
        strict = Bundle.open(bundle)
        strict.__dict__["profile"] = opened.profile.replace(quality=quality)
        if passes:
            parity.compare(engines, strict, parity.start_of(strict))  # type: ignore[arg-type]
        else:
            with pytest.raises(ParityError, match="encoder differs"):
                parity.compare(engines, strict, parity.start_of(strict))  # type: ignore[arg-type]


def test_the_error_is_relative_and_rounded() -> None:
    wanted = np.array([3.0, 4.0], np.float32)
    assert parity._error(wanted + np.float32([0, 1]), wanted) == 0.2
    assert parity._error(wanted * np.float32(1.2345678), wanted) == 0.23457
    assert parity._error(np.array([np.nan, 4]), wanted) == float("inf")
    assert parity._error(np.array([np.inf, 4]), wanted) == float("inf")
    assert parity._error(np.float32([1e-9, 0]), np.zeros(2, np.float32)) == 1.0
    assert parity._error(wanted.astype(np.float16), wanted) == 0


def test_a_start_has_random_vectors_where_there_is_no_text_encoder(
    bundle: Path, tiny: Profile
) -> None:
    opened = Bundle.open(bundle)
    first = all_starts(opened)[0]
    assert np.array_equal(parity.start_of(opened).text, first.text)  # type: ignore[arg-type]
    embedded = Bundle.open(bundle)
    embedded.__dict__["profile"] = tiny.replace(text=Text("embedding", 3, 24))
    start = parity.start_of(embedded)
    assert start.text is not None and start.text.shape == (1, 3, 24)
    assert start.text.dtype == np.float32 and 0.7 < float(start.text.std()) < 1.3
    assert np.array_equal(start.image, first.image)
    assert np.array_equal(start.text, parity.start_of(embedded).text)  # type: ignore[arg-type]
    mute = Bundle.open(bundle)
    mute.__dict__["profile"] = tiny.replace(text=Text("embedding", 0, 24))
    assert parity.start_of(mute).text is None
