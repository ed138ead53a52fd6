"""Check that only models/ names a family, and that a family controls the rollout."""

import dataclasses
import re
from dataclasses import astuple

import numpy as np
import pytest

from aapt_deploy import profiles
from aapt_deploy.models import family as families
from aapt_deploy.models.aapt.family import FAMILY, CameraFeed
from aapt_deploy.models.aapt.prompts import parse, token_ids
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.loop import Rollout, Steering
from tests.support import ROOT
from tests.support.fake_engines import FakeEngines

PRESETS = sorted(path.stem for path in (ROOT / "profiles").glob("*.toml"))
KNOWS = re.compile(r"models\.aapt|\.family\s*(==|!=|in\b)|text\|visual|\"text\", \"visual\"")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_family_with_its_graphs(preset: str) -> None:
    profile = profiles.load(preset)
    family = families.family_of(profile)
    graphs = family.signatures(profile)
    assert {"generator", "decoder"} <= graphs.keys()
    assert family.generator(profile) == graphs["generator"]
    tokens = 7 * profile.frame_tokens
    assert family.generator(profile, tokens).state[0].shape[1] == tokens


def test_no_module_outside_models_knows_a_family() -> None:
    """The rooms that train AAPT and write its pass out by hand are other things."""
    wrong = []
    for path in sorted((ROOT / "aapt_deploy").rglob("*.py")):
        name = path.relative_to(ROOT / "aapt_deploy").as_posix()
        if name.startswith(("models/", "train/", "backends/torch_cuda/")):
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        wrong += [f"{name}:{n}: {line}" for n, line in enumerate(lines, 1) if KNOWS.search(line)]
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "from aapt_deploy.models.aapt.camera import CRUISE", 'if profile.family == "aapt":',
        'r"generator.(text|visual)."', "(?:text|visual)", 'if stream in ("text", "visual"):',
    ],
)  # fmt: skip
def test_the_search_itself(line: str) -> None:
    assert KNOWS.search(line)
    assert not KNOWS.search("from aapt_deploy.models.family import family_of")


def test_controls_of_a_trial_and_of_a_calibration_are_within_the_limits() -> None:
    limits = np.array(astuple(FAMILY.limits))
    turns = [FAMILY.left_and_right(block) for block in range(8)]
    for controls in (FAMILY.cruise, *FAMILY.flights, *turns):
        assert (np.abs(astuple(controls)) <= limits).all()
    turns = [FAMILY.left_and_right(block).yaw for block in range(8)]
    assert turns == [0.2] * 4 + [-0.2] * 4
    assert len({astuple(controls) for controls in FAMILY.flights}) == len(FAMILY.flights) == 5


def test_prompts_are_drawn_read_and_compared(tiny: Profile) -> None:
    rng = np.random.default_rng(0)
    drawn = {FAMILY.random_text(tiny, rng).tobytes() for _ in range(20)}  # type: ignore[union-attr]
    assert len(drawn) > 10
    ids = token_ids(parse("forest at dusk"))
    assert np.array_equal(FAMILY.text_of(tiny, "forest at dusk"), ids)  # type: ignore[arg-type]
    assert FAMILY.in_common("forest at dusk", "a forest in autumn, at dusk") == 2
    assert FAMILY.in_common("", "forest") == 0
    mute = tiny.replace(text=profiles.Text("vocabulary", 0, 8))
    assert FAMILY.text_of(mute, "forest") is None and FAMILY.random_text(mute, rng) is None


def test_a_feed_comes_back_from_its_state(tiny: Profile) -> None:
    one, other = CameraFeed(tiny), CameraFeed(tiny)
    shape = (1, 4, tiny.latent_height, tiny.latent_width)
    latent = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    one.start(latent)
    one.inputs(0, FAMILY.flights[2])
    other.start(np.zeros_like(latent))
    other.restore({name: array.copy() for name, array in one.state().items()})
    ours, theirs = (feed.inputs(1, FAMILY.flights[3]) for feed in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_write_pass_is_one_more_run_before_the_commit(tiny: Profile) -> None:
    profile = tiny.replace(sampler=dataclasses.replace(tiny.sampler, write=True))
    fake = FakeEngines(profile)
    image = np.zeros((tiny.video.height, tiny.video.width, 3), np.uint8)
    stream = Rollout(fake, profile, image, 0)
    stream.step(Steering(FAMILY.cruise, np.array([[0, 5, 10, 15]])))
    calls = [(method, given) for graph, method, given in fake.calls if graph == "generator"]
    assert [method for method, _ in calls] == [
        "reset",
        "reset",
        *["run"] * profile.passes,
        "commit",
    ]
    assert profile.passes == len(tiny.sampler.timesteps) + 1
    last = calls[-2][1]
    assert last["time"] == [0.0]  # type: ignore[comparison-overlap]
    assert np.array_equal(last["noisy"], stream.feed.state()["previous"])
