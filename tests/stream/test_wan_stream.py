"""Streams of the Wan family: text alone, its own rate, no controls but the prompt."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import UsageError
from aapt_deploy.models.family import family_of
from aapt_deploy.rollout.starts import start
from aapt_deploy.stream.controls import open_controls
from aapt_deploy.stream.session import Session
from tests.support.commands import Ran
from tests.support.fake_engines import FakeEngines


@pytest.fixture
def vectors(tmp_path: Path, wan_bundle: Path) -> Path:
    profile = Bundle.open(wan_bundle).profile
    text = family_of(profile).random_text(profile, np.random.default_rng(1))
    np.save(tmp_path / "prompt.npy", text)
    return tmp_path / "prompt.npy"


@pytest.mark.parametrize("seconds", [0.0625, 1.0, 1.3])
def test_a_video_has_its_length_to_the_frame(
    seconds: float, aapt: Callable[..., Ran], wan_bundle: Path, vectors: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.y4m"
    ran = aapt("stream", wan_bundle, "-o", out, "--seconds", seconds, "--prompt", vectors, "--json")
    assert ran.code == 0, ran.err
    frames = round(16 * seconds)
    assert json.loads(ran.out)["frames"] == frames
    head, _, rest = out.read_bytes().partition(b"\n")
    assert head.startswith(b"YUV4MPEG2 W96 H64 F16:1")
    assert rest.count(b"FRAME\n") == frames


def test_the_verdict_is_against_its_own_rate(aapt: Callable[..., Ran], wan_bundle: Path) -> None:
    ran = aapt("profile", wan_bundle, "--blocks", 10, "--json")
    found = json.loads(ran.out)
    assert found["budget_ms"] == 250 and found["passes_per_block"] == 3
    assert ran.code == (0 if found["within_budget"] else 3)
    assert {"generator", "decoder", "commit", "prompt"} <= found["steady"].keys()
    assert found["steady"]["step"]["count"] == 10


def test_int8_is_judged_against_fp32(aapt: Callable[..., Ran], wan_bundle: Path) -> None:
    ran = aapt("quality", wan_bundle, "--precision", "int8", "--seconds", 1, "--json")
    found = json.loads(ran.out)
    assert ran.code in (0, 3) and len(found["latent_error"]) == found["blocks"] == 4
    assert 0 < np.mean(found["latent_error"]) < 0.5
    same = aapt("quality", wan_bundle, "--backend", "torch", "--precision", "fp32",
                "--seconds", 1, "--json")  # fmt: skip
    assert same.code == 0 and max(json.loads(same.out)["latent_error"]) < 1e-5


def test_controls_take_prompts_and_nothing_else(
    wan_bundle: Path, vectors: Path, tmp_path: Path
) -> None:
    family, said = family_of(Bundle.open(wan_bundle).profile), list[str]()
    file = tmp_path / "lines"
    file.write_text(f'{{"forward": 3}}\n3\n{{"prompt": "{vectors}"}}\n')
    controls = open_controls(str(file), family.cruise, family.limits, said.append)
    last = [controls.at(block, 0.0) for block in range(3)][-1]
    controls.close()
    assert last.prompt == str(vectors)
    assert "unknown key 'forward', known are prompt, at" in said[0]
    assert 'not a JSON object such as {"prompt": "…"}' in said[1]


def test_pictures_that_a_profile_does_not_take_are_refused(
    wan_bundle: Path, tmp_path: Path
) -> None:
    bundle = Bundle.open(wan_bundle)
    assert start(bundle, None, None).image is None
    profile = bundle.profile
    bare = profile.replace(
        vae=type(profile.vae)((), profile.vae.decoder_channels, 2, 3, kind="wan")
    )
    vars(bundle)["profile"] = bare
    with pytest.raises(UsageError, match="takes no picture"):
        start(bundle, "x.png", None)


@pytest.mark.parametrize(("trained", "warnings"), [(0, 0), (2, 1), (4, 0)])
def test_a_stream_beyond_its_training_says_so_once(
    trained: int, warnings: int, wan_bundle: Path
) -> None:
    bundle, said = Bundle.open(wan_bundle), list[str]()
    window = bundle.profile.window
    profile = bundle.profile.replace(window=type(window)(window.frames, 1, False, trained))
    controls = open_controls(None, family_of(profile).cruise, family_of(profile).limits, print)
    session = Session(profile, start(bundle, None, None), controls, said.append, wanted=13)
    frames = sum(len(shown) for shown in session.frames(FakeEngines(profile)))
    assert frames == 13
    assert len(said) == warnings
    if warnings:
        assert "trained on 0.3 s" in said[0]
