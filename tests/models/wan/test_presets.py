"""Presets of published checkpoints: every tensor of their files, and what they cost."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from aapt_deploy import profiles
from aapt_deploy.backends.torch_eager import EagerEngines
from aapt_deploy.errors import UsageError
from aapt_deploy.models import checkpoint, cost, published, random_weights
from aapt_deploy.models.family import family_of
from aapt_deploy.models.wan import keys
from aapt_deploy.models.wan import networks as wan_networks
from aapt_deploy.rollout.loop import Rollout, Steering
from tests.support import ROOT

PRESETS = sorted(path.stem for path in (ROOT / "profiles").glob("*-832x480-*.toml"))
PARAMETERS, KEYS = 1_418_996_800, 825  # of Wan2.1-T2V-1.3B, in every published file


def test_every_published_file_has_its_presets() -> None:
    wanted = {f"{k.preset}-{gpu}" for k in published.KNOWN for gpu in ("h100", "4090")}
    assert wanted == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_every_tensor_of_the_published_file(name: str) -> None:
    profile = profiles.load(name)
    with torch.device("meta"):
        generator, vae = wan_networks.build(profile)
    assert sum(p.numel() for p in generator.parameters()) == PARAMETERS
    sources = keys.generator_sources(profile)
    assert sources.keys() == generator.state_dict().keys()
    theirs = {
        name: shape
        for ours, source in sources.items()
        for name, shape in (
            (t, source.shape(tuple(generator.state_dict()[ours].shape))) for t in source.theirs
        )
    }
    assert len(theirs) == KEYS
    assert sum(math.prod(shape) for shape in theirs.values()) == PARAMETERS
    assert theirs["blocks.29.self_attn.q.weight"] == (1536, 1536)
    assert theirs["patch_embedding.weight"] == (1536, 16, 1, 2, 2)
    assert keys.vae_sources(profile).keys() == vae.state_dict().keys()
    decoder = sum(p.numel() for p in vae.decoder.parameters())
    known = {"wan": 73.3e6, "taehv": 9_844_611}[profile.vae.kind]
    assert decoder == pytest.approx(known, rel=1e-3)
    state = family_of(profile).signatures(profile)["decoder"].state
    assert len(state) == {"wan": 33, "taehv": 9}[profile.vae.kind]
    assert profile.step_budget_ms == {1: 250, 3: 750}[profile.video.block_frames]


def test_the_operations_and_bytes_of_a_step_by_hand() -> None:
    """1250.5 M products a token in linear layers; attention over 21 latent frames."""
    profile = profiles.load("self-forcing-832x480-h100")
    planned = cost.cost_of(profile)
    stages = {stage.name: stage for stage in planned.stages}
    tokens, seen = 3 * 1560, 21 * 1560
    assert profile.frame_tokens == 1560 and profile.block_tokens == tokens
    generator = stages["generator"]
    assert generator.attention_gflop == pytest.approx(4 * tokens * seen * 1536 * 30 / 1e9, rel=1e-6)
    cross = 4 * tokens * 512 * 1536 * 30 / 1e9
    assert generator.products_gflop == pytest.approx(2 * 1250.5e6 * tokens / 1e9 + cross, rel=2e-3)
    assert stages["decoder"].products_gflop == pytest.approx(13_550, rel=1e-3)
    assert planned.cache_gb == pytest.approx(18 * 1560 * 92_160 / 1e9, rel=1e-3)
    assert planned.passes == 5 and planned.latents == 3
    floors = planned.floors_ms
    assert floors["decoder"] == pytest.approx(3 * (stages["decoder"].floor_ms or 0))
    assert planned.floor_ms == pytest.approx(floors["generator"] + floors["decoder"], abs=0.02)


def test_a_plan_for_another_gpu() -> None:
    profile = profiles.load("causal-forcing-1step-832x480-4090")
    slow, fast = (cost.cost_of(cost.on_gpu(profile, f"RTX {n}")) for n in ("4090", "5090"))
    assert slow == cost.cost_of(profile) and slow.fits
    assert fast.floor_ms is not None and slow.floor_ms is not None
    assert slow.floor_ms / fast.floor_ms == pytest.approx(209.5 / 165.2, rel=0.05)
    assert (slow.limit_gb, fast.limit_gb) == (24, 32)
    with pytest.raises(UsageError, match="GPU 'RTX 1' is not one"):
        cost.on_gpu(profile, "RTX 1")


def test_random_weights_of_the_tiny_preset_run(tmp_path: Path) -> None:
    profile = profiles.load("wan-tiny-cpu")
    count = random_weights.random_checkpoint(profile, tmp_path / "r.safetensors", 0)
    loaded = checkpoint.load(tmp_path / "r.safetensors")
    networks = (loaded.generator, loaded.vae)
    assert count == sum(p.numel() for network in networks for p in network.parameters())
    engines = EagerEngines(loaded, 1, "fp32")
    stream = Rollout(engines, profile, None, 0)
    family = family_of(profile)
    steering = Steering(family.cruise, family.random_text(profile, np.random.default_rng(0)))
    latents = np.stack([stream.latent(steering) for _ in range(7)])
    assert 0.1 < latents.std() < 10


def test_streams_beyond_the_training_are_known() -> None:
    assert profiles.load("self-forcing-832x480-h100").trained_seconds == 81 / 16
    assert profiles.load("longlive-832x480-h100").trained_seconds == math.inf
    assert profiles.load("tiny-cpu").trained_seconds == math.inf
