"""Random checkpoints: the seeds that PyTorch takes, and equal weights for equal seeds."""

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from aapt_deploy import profiles
from aapt_deploy.errors import UsageError
from aapt_deploy.models.random_weights import LARGEST_SEED, random_checkpoint
from aapt_deploy.profiles import Profile


def test_the_largest_seed_is_taken_and_one_more_is_refused(tmp_path: Path, tiny: Profile) -> None:
    count = random_checkpoint(tiny, tmp_path / "largest.safetensors", LARGEST_SEED)
    assert count > 0 and (tmp_path / "largest.safetensors").stat().st_size > count
    with pytest.raises(UsageError, match=f"--seed {LARGEST_SEED + 1} is above {LARGEST_SEED}"):
        random_checkpoint(tiny, tmp_path / "more.safetensors", LARGEST_SEED + 1)
    assert not (tmp_path / "more.safetensors").exists()


def test_a_seed_draws_the_same_weights_and_another_one_others(
    tmp_path: Path, tiny: Profile
) -> None:
    drawn = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        random_checkpoint(tiny, tmp_path / name, seed)
        drawn.append(load_file(tmp_path / name))
    same = [all(bool((one[k] == drawn[0][k]).all()) for k in one) for one in drawn]
    assert same == [True, True, False] and drawn[0].keys() == drawn[2].keys()


def test_a_random_prompt_of_an_external_encoder_has_its_shape() -> None:
    from aapt_deploy.backends.torch_cuda.engine import random_text

    text = profiles.load("aapt-8b-736x416-h100").text
    drawn = random_text(profiles.load("aapt-8b-736x416-h100"), 0)
    assert drawn is not None and drawn.shape == (1, text.tokens, text.dim)
    assert drawn.dtype == "float32" and 0.99 < float(drawn.std()) < 1.01
