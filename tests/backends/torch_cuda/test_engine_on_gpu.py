"""The engine on a GPU: its captured graph, its memory, the demo's frames.

Imports nothing that streaming to a file needs, so bench/gpu.py runs it on a bare machine.
"""

import copy
import itertools

import numpy as np
import pytest
import torch

from aapt_deploy import assets
from aapt_deploy.backends.torch_cuda import engine as torch_cuda
from aapt_deploy.backends.torch_eager import EagerEngines
from aapt_deploy.models import checkpoint
from aapt_deploy.models.aapt.camera import CRUISE
from aapt_deploy.profiles import load
from aapt_deploy.rollout.loop import Steering, rollout
from tests.support.driven import Driven

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def test_on_a_gpu_a_graph_says_what_its_step_says_and_nothing_is_allocated() -> None:
    profile = load("demo-cpu")
    engines = torch_cuda.random_engines(profile, "bf16", 0, torch.device("cuda"))
    driven = Driven(engines, profile)
    said = []
    for block in range(3):
        said.append(driven.said(block, block))
        driven.generator.commit(block)
    allocated = torch.cuda.memory_allocated()
    for block in range(3, 40):
        driven.said(block, block)
        driven.generator.commit(block)
    assert torch.cuda.memory_allocated() == allocated
    again = Driven(torch_cuda.random_engines(profile, "bf16", 0, torch.device("cuda")), profile)
    for block in range(3):
        assert np.array_equal(again.said(block, block), said[block])
        again.generator.commit(block)


def test_on_a_gpu_the_demo_looks_as_on_a_cpu() -> None:
    held = checkpoint.load(assets.CHECKPOINT, assets.checkpoint_sha256())
    begin, cuda = next(iter(held.start_frames.values())).image.numpy(), torch.device("cuda")
    options = torch_cuda.Options.of("bf16", cuda)
    networks = [copy.deepcopy(part).to(cuda) for part in (held.generator, held.vae)]
    pair = torch_cuda.GpuEngines(*networks, None, options), EagerEngines(held, 4, "fp32")
    steer = lambda block: Steering(CRUISE, np.zeros((1, held.profile.text.tokens), np.int64))
    streams = [rollout(engines, held.profile, begin, steer, 0) for engines in pair]
    made = [list(itertools.islice(stream, 7)) for stream in streams]
    ours, true = (np.stack([x.astype(np.float64) for x in frames[1:]]) for frames in made)
    assert 10 * np.log10(255**2 / np.square(ours - true).mean()) > 40
