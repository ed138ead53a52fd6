"""Test that two processes give what one does, over gloo on the CPU.

They share batches, weights (FSDP2), and the tokens and heads of one batch.
"""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from aapt_deploy.errors import UsageError
from aapt_deploy.train.processes import joined
from tests.support.commands import ENVIRONMENT

FILES = [
    "generator-1",
    "consistency-1",
    "trajectory-1",
    "adversarial-1",
    "discriminator-1",
    "anchored-1",
]

RUN = """
import dataclasses, json, os, sys
from pathlib import Path
import torch
from tests.support.toys import TINY, toy_latents
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.train import loop
from aapt_deploy.train.stages import GeneratorStages
from aapt_deploy.train.recipe import *
from aapt_deploy.train.processes import joined
two = dict(accumulate=2)
game = AdversarialStage(gan(2, 2, 1e-3, **two), blocks=6, discriminator_rate=1e-3, extensions=1,
                        overlap=2, unjudged=1, penalty=10.0)
flow = FlowStage(Optimiser(2, 2, 1e-3, 1, ema=0.5, **two), 2, resampled=0.5, forced=0.5)
recipe = Recipe(VaeStage(Optimiser(1, 1, 1e-3)), (flow,),
                (ConsistencyStage(Optimiser(2, 2, 1e-3, 1, ema=0.5, **two), 2),),
                (TrajectoryStage(Optimiser(2, 2, 1e-3, 1, ema=0.5, **two), 2, worn=0.5,
                fade_blocks=2),), (dataclasses.replace(game, attention="bidirectional"),),
                (AnchoredStage(Optimiser(2, 2, 1e-3, 1, ema=0.5, **two), 2, flights=3,
                flight_blocks=4),))
loop.LOG_EVERY = 1
for folder, context, checkpointing, port in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    setup = joined("cpu", False, checkpointing, context)
    torch.manual_seed(0)
    generator, latents = Generator(TINY), toy_latents()
    with torch.no_grad():
        for p in generator.parameters():
            p += 0.05 * torch.randn_like(p)
    latents.z.add_(0.3 * torch.randn(latents.z.shape))
    stages = GeneratorStages(generator, latents, recipe, Path(folder), lambda text: None, setup)
    list(stages.all(False, None))
    if setup.mesh is not None:
        torch.distributed.destroy_process_group()
"""


class Case(NamedTuple):
    """How the two processes share the work."""

    context: int
    checkpointing: bool


CASES = {"batches": Case(1, False), "heads": Case(2, True)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(cases: dict[Path, Case], world: int) -> list[subprocess.Popen[str]]:
    """The toy recipe in `world` processes, as torchrun starts them, once for each case."""
    found = []
    for folder in cases:
        folder.mkdir()
    runs = json.dumps([[str(folder), *case, free_port()] for folder, case in cases.items()])
    for rank in range(world):
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
        }
        environment = ENVIRONMENT | {name: str(value) for name, value in variables.items()}
        command = [sys.executable, "-c", RUN, runs]
        found.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    return found


def finish(processes: list[subprocess.Popen[str]]) -> None:
    try:
        ended = [(process.communicate(timeout=240)[1], process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert all(code == 0 for _, code in ended), ended


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all runs: `alone`, and one for each case.

    Each process starts once, for the imports take longest.
    """
    folder = tmp_path_factory.mktemp("parallel")
    shared = start({folder / name: case for name, case in CASES.items()}, 2)
    finish([*shared, *start({folder / "alone": Case(1, False)}, 1)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case: str, runs: Path) -> None:
    alone, shared = runs / "alone", runs / case
    for stage in ("generator-1", "consistency-1", "trajectory-1", "adversarial-1", "anchored-1"):
        one, two = (
            [json.loads(line) for line in (folder / f"{stage}.jsonl").read_text().splitlines()]
            for folder in (alone, shared)
        )
        assert len(one) == len(two) == 2
        for a, b in zip(one, two, strict=True):
            for name in a.keys() - {"seconds"}:
                assert b[name] == pytest.approx(a[name], rel=2e-3, abs=2e-5), (stage, name)
    for name in FILES:
        mine, theirs = (load_file(folder / f"{name}.safetensors") for folder in (alone, shared))
        assert mine.keys() == theirs.keys()
        wrong = {key: float((mine[key] - theirs[key]).abs().max()) for key in mine}
        assert sum(value > 2e-4 for value in wrong.values()) <= len(wrong) // 16, (
            wrong
        )  # Adam makes a sign of a gradient that is almost nothing
    state = load_file(shared / "generator-1.state")  # as one process would have left it
    held = load_file(alone / "generator-1.state")
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in held.items()
    }


def test_processes_that_cannot_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="--context 3 does not divide 4 processes"):
        joined("cpu", False, False, 3)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert joined("cpu", True, False, 1).mesh is None
    assert torch.distributed.is_initialized() is False
