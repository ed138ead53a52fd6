"""Test the generator's stages: their files, resuming to the bit, starts from checkpoints."""

import dataclasses
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aapt_deploy.cli import train
from aapt_deploy.errors import CheckpointError, InputError, UsageError
from aapt_deploy.models import checkpoint
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.train import loop, recipe, stages
from aapt_deploy.train.judge import evaluate
from aapt_deploy.train.processes import ALONE, Setup
from aapt_deploy.train.recipe import (
    AdversarialStage,
    AnchoredStage,
    ConsistencyStage,
    FlowStage,
    Optimiser,
    Recipe,
    TrajectoryStage,
    gan,
)
from aapt_deploy.train.run import WarmStart
from aapt_deploy.train.run import train as run_all
from aapt_deploy.train.stages import GeneratorStages
from tests.support.toys import RECIPE, TINY, clips, quiet, toy_latents

__all__ = ["clips"]  # a fixture

GAME = AdversarialStage(
    gan(4, 2, 1e-3), blocks=4, discriminator_rate=1e-3, head_start=1, penalty_every=2
)
WHOLE = Recipe(
    vae=RECIPE.vae,
    sample_seconds=0,
    flow=(FlowStage(Optimiser(4, 2, 1e-3, 1, accumulate=2), blocks=2),),
    consistency=(ConsistencyStage(Optimiser(4, 2, 1e-3, 1), blocks=2),),
    trajectory=(TrajectoryStage(Optimiser(4, 2, 1e-3, 1), blocks=2, worn=0.5, fade_blocks=3),),
    adversarial=(
        GAME,
        dataclasses.replace(
            GAME, extensions=1, overlap=2, head_start=0, attention="bidirectional", logits="clip"
        ),
    ),
    anchored=(AnchoredStage(Optimiser(4, 2, 1e-3, 1), blocks=2, flights=3, flight_blocks=7),),
)
NAMES = ["adapted", "consistency-1", "trajectory-1", "adversarial-1", "adversarial-2", "anchored-1"]
FILES = [
    "generator-1",
    "consistency-1",
    "trajectory-1",
    "adversarial-1",
    "discriminator-1",
    "adversarial-2",
    "discriminator-2",
    "anchored-1",
]


def run(
    folder: Path, setup: Setup = ALONE, last: int | None = None
) -> list[tuple[str, tuple[float, ...] | None]]:
    """All stages over toy latents, in `folder`, or the first `last`."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    latents = toy_latents()
    latents.z.add_(0.3 * torch.randn(latents.z.shape))  # it moves
    return list(
        islice(
            GeneratorStages(Generator(TINY), latents, WHOLE, folder, lambda text: None, setup).all(
                False, None
            ),
            last,
        )
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("stages") / "straight"
    assert run(folder) == [("adapted", None), *((name, (1.0,)) for name in NAMES[1:])]
    return folder


def test_every_stage_changes_the_generator_and_leaves_its_files(straight: Path) -> None:
    weights = [load_file(straight / f"{name}.safetensors")["visual.0.qkv.weight"] for name in FILES]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    assert {path.stem for path in straight.glob("*.state")} == {
        name for name in FILES if not name.startswith("discriminator")
    }
    assert not list(straight.glob("*.tmp"))


# Function that a stage calls once per batch, the last call, stages before, the files these leave.
KILL = [
    ("generator_loss", 6, 0, 0),
    ("consistency_loss", 3, 1, 1),
    ("trajectory_loss", 3, 2, 2),
    ("adversarial_update", 3, 3, 3),  # the generator has had one update less than the discriminator
    ("adversarial_update", 3, 4, 5),
    ("anchored_loss", 3, 5, 7),
]


@pytest.mark.parametrize(("function", "last", "before", "files"), KILL)
def test_a_stage_that_was_stopped_goes_on_to_the_bit(
    function: str,
    last: int,
    before: int,
    files: int,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in FILES[:files]:
        (tmp_path / f"{name}.safetensors").write_bytes(
            (straight / f"{name}.safetensors").read_bytes()
        )
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)  # after every update
    true: Callable[..., Any] = getattr(stages, function)
    calls: list[int] = []

    def fatal(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == last:
            raise KeyboardInterrupt
        return true(*arguments)

    monkeypatch.setattr(stages, function, fatal)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert len(list(tmp_path.glob("*.state"))) == 1
    monkeypatch.setattr(stages, function, true)
    run(tmp_path, last=before + 1)
    made = [path for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".state")]
    assert len(made) > files + 1
    for path in made:  # averages, weights and moments
        one, two = load_file(straight / path.name), load_file(path)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), (
            path.name
        )


def test_recomputing_blocks_changes_no_result(straight: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", Setup(checkpointing=True))
    for name in FILES:
        one, two = (
            load_file(folder / f"{name}.safetensors") for folder in (straight, tmp_path / "run")
        )
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)


def test_mixed_precision_is_close_and_keeps_float32_weights(straight: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", Setup(bf16=True))
    one, two = (
        load_file(folder / "adversarial-2.safetensors") for folder in (straight, tmp_path / "run")
    )
    assert {tensor.dtype for tensor in two.values()} == {torch.float32}
    assert any(not torch.equal(one[key], two[key]) for key in one)
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 0.03


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", None])
def test_mixed_precision_is_the_default_where_the_hardware_has_it(
    flag: str | None, aapt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.cpu,
        "get_capabilities",
        lambda: (
            {"avx2": True, "avx512_bf16": False, "amx_bf16": False} | ({flag: True} if flag else {})
        ),
    )
    assert train._mixed("cpu", None) is (flag is not None) and train._mixed("cuda", None) is True
    assert train._mixed("cpu", True) is True and train._mixed("cpu", False) is False
    for wish, told in (("--bf16", flag is None), ("--no-bf16", False)):
        ran = aapt("train", "run", tmp_path, wish)
        assert (
            ran.code == InputError.exit_code
            and ("warning: this CPU emulates bf16" in ran.err) is told
        )


def test_a_damaged_discriminator_is_named(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in FILES[:5]:
        (folder / f"{name}.safetensors").write_bytes(
            (straight / f"{name}.safetensors").read_bytes()[
                : -9 if name == "discriminator-1" else None
            ]
        )
    with pytest.raises(CheckpointError, match=r"discriminator-1\.safetensors") as caught:
        run(folder)
    assert "delete it" in caught.value.hint


def test_a_segment_longer_than_the_clips_is_refused(tmp_path: Path) -> None:
    long = dataclasses.replace(
        WHOLE,
        flow=(),
        consistency=(),
        trajectory=(),
        adversarial=(dataclasses.replace(GAME, blocks=40),),
    )
    with pytest.raises(InputError, match="40 blocks, the clips have 6") as caught:
        list(
            GeneratorStages(
                Generator(TINY), toy_latents(), long, tmp_path, lambda text: None, Setup()
            ).all(True, None)
        )
    assert "--blocks 40" in caught.value.hint


def test_accumulated_batches_are_one_larger_batch(tmp_path: Path) -> None:
    """Two batches of gradients, averaged: closed form on one weight under plain sums."""
    weight = torch.nn.Linear(1, 1, bias=False)
    seen: list[float] = []

    def loss(rng: torch.Generator) -> torch.Tensor:
        seen.append(float(torch.rand((), generator=rng)))
        return weight.weight.sum() * seen[-1]

    optimiser = Optimiser(1, 1, 1e-3, 1, 0.0, clip_norm=1e9, accumulate=2)
    loop.fit(weight, loss, optimiser, tmp_path / "x.state", 3, quiet)
    assert len(set(seen)) == 2
    assert load_file(tmp_path / "x.state")["exp_avg.weight"].item() == pytest.approx(
        0.1 * sum(seen) / 2
    )


# --- whole runs ---


def test_a_run_from_checkpoints_skips_what_they_stand_for(clips: Path, tmp_path: Path) -> None:
    short = dataclasses.replace(WHOLE, adversarial=WHOLE.adversarial[:1], anchored=())
    told: list[str] = []
    last = run_all(clips, tmp_path / "a", TINY, short, told.append)
    one_step = checkpoint.load(last)
    assert one_step.profile.sampler.timesteps == (1.0,)
    adapted = checkpoint.load(tmp_path / "a" / "checkpoint-adapted.safetensors")
    assert adapted.profile == TINY
    assert sorted(path.name for path in (tmp_path / "a").glob("checkpoint*")) == sorted(
        ["checkpoint.safetensors", *(f"checkpoint-{name}.safetensors" for name in NAMES[:4])]
    )
    told.clear()
    start = WarmStart(adapted.path, tmp_path / "a" / "checkpoint-trajectory-1.safetensors")
    again = checkpoint.load(run_all(clips, tmp_path / "b", TINY, short, told.append, start=start))
    assert not any(
        line.startswith(("fitting", "VAE", "generator", "consistency", "trajectory"))
        for line in told
    )
    for a, b in zip(one_step.generator.parameters(), again.generator.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-2)  # the start was rounded to float16
    assert all(
        torch.equal(a, b)
        for a, b in zip(one_step.vae.parameters(), again.vae.parameters(), strict=True)
    )


def test_the_command_line_names_recipes_and_refuses_a_lone_option(
    aapt: Any, tmp_path: Path
) -> None:
    ran = aapt("train", "run", tmp_path, "--distilled", tmp_path / "x")
    assert ran.code == UsageError.exit_code and "--from" in ran.err
    with pytest.raises(UsageError, match="recipe 'none' does not exist") as caught:
        recipe.named("none")
    assert "demo-bidirectional-clip" in caught.value.hint
    heads = {
        name: {(s.attention, s.logits) for s in made.adversarial}
        for name, made in recipe.RECIPES.items()
    }
    assert heads["paper"] == {("causal", "frame")}
    assert set().union(*heads.values()) == {
        (a, b) for a in ("causal", "bidirectional") for b in ("frame", "clip")
    }


def test_the_paper_s_recipe_is_the_paper_s() -> None:
    """App. B: updates, clips per update, rates and schedules, and a last stage of 55 s."""
    paper = recipe.PAPER
    stages_of = [*paper.flow, *paper.consistency, *paper.adversarial]
    optimisers = [stage.optimiser for stage in stages_of]
    assert [(o.steps, o.batch * o.accumulate, o.learning_rate) for o in optimisers] == [
        (20_000, 256, 1e-5), (4_000, 32, 1e-5), (5_000, 32, 1e-5), (500, 256, 3e-6),
        (500, 64, 1e-5), (500, 64, 1e-5),
    ]  # fmt: skip
    assert {s.shift for s in (*paper.flow, *paper.consistency)} == {24.0} and {
        s.intervals for s in paper.consistency
    } == {32}
    lengths = [s.blocks + s.extensions * (s.blocks - s.overlap) for s in paper.adversarial]
    assert [blocks * 4 / 24 for blocks in lengths] == [10, 19, 55]
    for s in paper.adversarial:
        assert (s.optimiser.betas, s.optimiser.weight_decay, s.penalty, s.penalty_noise) == (
            (0.0, 0.9),
            0.0,
            1000.0,
            0.1,
        )
        assert (
            loop.learning_rate(s.optimiser, 0)
            == loop.learning_rate(s.optimiser, 499)
            == s.optimiser.learning_rate
        )


@pytest.mark.slow
def test_one_command_renders_trains_and_judges(
    aapt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    game = dataclasses.replace(GAME, optimiser=gan(1, 2, 1e-3))
    short = dataclasses.replace(
        WHOLE,
        flow=(FlowStage(Optimiser(1, 2, 1e-3, 1), 2),),
        consistency=(),
        trajectory=(),
        adversarial=(game,),
        anchored=(),
    )
    monkeypatch.setitem(recipe.RECIPES, "demo", short)
    monkeypatch.setattr(evaluate, "TEACHING_WORLDS", 12)
    ran = aapt(
        "train",
        "all",
        tmp_path,
        "--worlds",
        1,
        "--flights",
        2,
        "--seconds",
        5,
        "--profile",
        "tiny-cpu",
    )
    assert ran.code == 0, ran.err
    record = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert list(record["made"]) == ["checkpoint-adapted", "checkpoint-adversarial-1"]
    assert [made["timesteps"] for made in record["made"].values()] == [
        list(TINY.sampler.timesteps),
        [1.0],
    ]
