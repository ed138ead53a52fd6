"""The GPU engine's operations on a CPU, with plain kernels in the place of ours: the same frames as the reference, and nothing that a graph forbids."""

import copy
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Exported, frames_of
from test_fp8_to_stream import decibels
from test_fp8_to_stream import wanted as wanted

from aapt_deploy import scales
from aapt_deploy.bundle import Bundle
from aapt_deploy.camera import CRUISE
from aapt_deploy.engine import Engines, torch_cuda
from aapt_deploy.engine.eager import EagerEngines
from aapt_deploy.engine.torch_calibrate import noise_inputs
from aapt_deploy.engine.torch_kernels import AttentionScales, Kernels, plain
from aapt_deploy.engine.torch_step import Step, Tiles, Tokens, fp8_layers, wide_layers
from aapt_deploy.errors import MachineError, UsageError
from aapt_deploy.models import checkpoint
from aapt_deploy.models.checkpoint import Checkpoint
from aapt_deploy.ops.block_causal_attention import hopper_fp8
from aapt_deploy.profiles import Profile, load
from aapt_deploy.rollout import Steering, rollout
from aapt_deploy.scales import LinearScales, Scales
from aapt_deploy.starts import start

CPU = torch.device("cpu")
BLOCKS = 9  # the ring of `tiny` wraps at 4


def over(loaded: Checkpoint, precision: str = "fp32", found: Scales | None = None, by_row: bool = True) -> torch_cuda.GpuEngines:
    """The engines of `loaded`, which keeps its weights."""
    options = torch_cuda.Options.of(precision, CPU, by_row)
    return torch_cuda.GpuEngines(copy.deepcopy(loaded.generator), copy.deepcopy(loaded.vae), found, options)


def latents(engines: Engines, opened: Bundle, prompts: Callable[[int], np.ndarray | None]) -> list[np.ndarray]:
    """What the generator says over a rollout, [C, h, w] each."""
    generator, said = engines["generator"], []
    run = generator.run

    def heard(**inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        found = run(**inputs)
        said.append(found["clean"].copy()[0])
        return found

    generator.run = heard  # type: ignore[method-assign]
    begin = start(opened, "dunes", None)
    list(itertools.islice(rollout(engines, opened.profile, begin.image, lambda block: Steering(CRUISE, prompts(block)), 3), 1 + BLOCKS))
    return said


def test_in_float32_it_says_what_the_reference_says(loaded: Checkpoint, bundle: Path) -> None:
    opened = Bundle.open(bundle)
    words = [np.array([[4, 1, 2, 3]]), np.array([[0, 3, 3, 1]])]
    prompts = lambda block: words[block > 5]  # changes behind the wrap
    mine, theirs = latents(over(loaded), opened, prompts), latents(EagerEngines(loaded, 1, "fp32"), opened, prompts)
    assert len(mine) == len(theirs) == BLOCKS * len(opened.profile.sampler.timesteps)
    for block, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max(), err_msg=f"pass {block}")
    frames = [frames_of(engines, opened, 5) for engines in (over(loaded), EagerEngines(loaded, 1, "fp32"))]
    assert max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(*frames, strict=True)) <= 1  # a value between two levels may round either way
    assert len({frame.tobytes() for frame in frames[0]}) == 6
