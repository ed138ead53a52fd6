"""Training: the loop resumes to the bit, and a whole tiny run ends in a checkpoint that loads."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aapt_deploy.bundle.files import locked
from aapt_deploy.errors import (
    BusyError,
    CheckpointError,
    InputError,
    MachineError,
    TrainingError,
    UsageError,
)
from aapt_deploy.models import checkpoint
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.vae import Vae
from aapt_deploy.profiles import Text, load
from aapt_deploy.train import loop, run
from aapt_deploy.train import recipe as recipes
from aapt_deploy.train.latents import cached_latents
from aapt_deploy.train.loop import fit, learning_rate
from aapt_deploy.train.losses.flow import flow_loss
from aapt_deploy.train.losses.vae_stage import Snippets, fit_linear, vae_loss
from aapt_deploy.train.recipe import FlowStage, Optimiser
from aapt_deploy.train.world.data import clip_files, render_world
from tests.support.commands import ENVIRONMENT
from tests.support.toys import RECIPE, STAGE, quiet, toy_latents, trainee
from tests.support.toys import clips as clips

TINY = load("tiny-cpu")


# --- the loop ---


def test_learning_rate_in_closed_form() -> None:
    optimiser = Optimiser(steps=500, batch=1, learning_rate=2e-3, warmup=100)
    assert learning_rate(optimiser, 0) == pytest.approx(2e-5)
    assert learning_rate(optimiser, 49) == pytest.approx(1e-3)
    assert learning_rate(optimiser, 99) == learning_rate(optimiser, 100) == pytest.approx(2e-3)
    assert learning_rate(optimiser, 300) == pytest.approx(2e-3 * (0.01 + 0.99 / 2))
    assert learning_rate(optimiser, 500) == learning_rate(optimiser, 900) == pytest.approx(2e-5)
    rates = [learning_rate(optimiser, step) for step in range(500)]
    assert all(a < b for a, b in pairwise(rates[:100]))
    assert all(a > b for a, b in pairwise(rates[100:]))
    assert learning_rate(
        Optimiser(steps=5, batch=1, learning_rate=1.0, warmup=100), 4
    ) == pytest.approx(0.05)  # ends inside the warm-up


def quiet_text(text: str) -> None:
    """The same, of a whole run."""


KILLED = """
import os, signal, sys
from pathlib import Path
from aapt_deploy.train import loop
from tests.support.commands import ENVIRONMENT
from tests.support.toys import STAGE, quiet, trainee
loop.SAVE_EVERY_S = 0.0  # after every update
generator, loss = trainee()
calls = []
def fatal(rng):
    calls.append(rng)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(rng)
loop.fit(generator, fatal, STAGE.optimiser, Path(sys.argv[1]), 7, quiet)
"""


def test_a_killed_run_resumes_to_the_bit(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "killed.state")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.Popen(
        arguments, env=ENVIRONMENT | threads, stderr=subprocess.PIPE, text=True
    )

    straight, loss = trainee()
    average = fit(straight, loss, STAGE.optimiser, tmp_path / "straight.state", 7, quiet)

    assert (killed.communicate(timeout=120)[1], killed.returncode) == ("", -signal.SIGKILL)
    assert not (tmp_path / "killed.jsonl").exists()  # it did not come to its end
    resumed, loss = trainee()
    with torch.no_grad():
        for p in resumed.parameters():
            p.fill_(9.0)  # whatever was there is replaced
    steps: list[int] = []

    def counted(rng: torch.Generator) -> Tensor:
        steps.append(1)
        return loss(rng)

    resumed_average = fit(resumed, counted, STAGE.optimiser, tmp_path / "killed.state", 7, quiet)
    assert len(steps) == 3
    for name, p in straight.named_parameters():
        assert torch.equal(p, dict(resumed.named_parameters())[name]), name
        assert torch.equal(average[name], resumed_average[name]), name
    states = [load_file(tmp_path / f"{name}.state") for name in ("straight", "killed")]
    assert states[0].keys() == states[1].keys()
    assert all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )  # Adam's moments too
    assert any(
        not torch.equal(average[name], p) for name, p in straight.named_parameters()
    )  # the average is not the last weights


def test_another_seed_takes_another_path(tmp_path: Path) -> None:
    runs = []
    for seed in (1, 2, 1):
        generator, loss = trainee()
        fit(generator, loss, STAGE.optimiser, tmp_path / f"{len(runs)}.state", seed, quiet)
        runs.append(generator.visual_out.weight.detach())
    assert torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], runs[1])


def test_every_update_draws_its_own_numbers(tmp_path: Path) -> None:
    module, drawn = nn.Linear(1, 1), []

    def loss(rng: torch.Generator) -> Tensor:
        drawn.append(torch.rand(3, generator=rng).tolist())
        return module.weight.square().sum()

    fit(module, loss, Optimiser(30, 1, 1e-3), tmp_path / "a.state", 5, quiet)
    fit(module, loss, Optimiser(30, 1, 1e-3), tmp_path / "b.state", 6, quiet)
    assert len({tuple(row) for row in drawn}) == 60


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    generator, loss = trainee()
    average = fit(generator, loss, STAGE.optimiser, tmp_path / "x.state", 0, quiet)

    def never(rng: torch.Generator) -> Tensor:
        raise AssertionError("trained again")

    again = fit(Generator(TINY), never, STAGE.optimiser, tmp_path / "x.state", 0, quiet)
    assert all(torch.equal(average[name], again[name]) for name in average)


def test_the_log_and_the_progress_hold_the_mean_loss(tmp_path: Path) -> None:
    weight = nn.Linear(1, 1, bias=False)
    seen: list[tuple[int, float]] = []
    values = iter(range(1, 51))
    optimiser = Optimiser(steps=50, batch=1, learning_rate=1e-3, warmup=10)
    fit(
        weight,
        lambda rng: weight.weight.sum() * 0 + next(values),
        optimiser,
        tmp_path / "x.state",
        0,
        lambda step, loss: seen.append((step, loss)),
    )
    assert seen == [(20, 10.5), (40, 30.5), (50, 45.5)]
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == seen
    assert lines[0]["lr"] == learning_rate(optimiser, 19)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "x.curves",
        "x.jsonl",
        "x.state",
    ]  # nothing temporary is left


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_state(
    tmp_path: Path,
) -> None:
    generator, loss = trainee()
    fit(
        generator,
        loss,
        dataclasses.replace(STAGE.optimiser, steps=2),
        tmp_path / "x.state",
        0,
        quiet,
    )
    good = (tmp_path / "x.state").read_bytes()

    def diverging(rng: torch.Generator) -> Tensor:
        return loss(rng) * float("nan")

    with pytest.raises(TrainingError, match=r"the loss of update 3 is nan \(x\)") as caught:
        fit(generator, diverging, STAGE.optimiser, tmp_path / "x.state", 0, quiet)
    assert (caught.value.exit_code, "learning rate" in caught.value.hint) == (9, True)
    assert (tmp_path / "x.state").read_bytes() == good


def test_a_gradient_that_is_no_number_reaches_neither_weights_nor_state(tmp_path: Path) -> None:
    """The root of zero is a number, its slope is none."""
    module = nn.Linear(2, 2)
    fit(
        module,
        lambda rng: module.weight.square().sum(),
        Optimiser(2, 1, 1e-3),
        tmp_path / "x.state",
        0,
        quiet,
    )
    good, weight = (tmp_path / "x.state").read_bytes(), module.weight.detach().clone()
    with pytest.raises(TrainingError, match=r"the gradient's norm of update 3 is nan \(x\)"):
        fit(
            module,
            lambda rng: (module.weight * 0).norm().sqrt(),
            Optimiser(3, 1, 1e-3),
            tmp_path / "x.state",
            0,
            quiet,
        )
    assert torch.equal(module.weight, weight) and (tmp_path / "x.state").read_bytes() == good


def test_updates_that_are_done_again_are_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, calls, last = nn.Linear(1, 1), [0], [50]

    def loss(rng: torch.Generator) -> Tensor:
        calls[0] += 1
        if calls[0] == last[0]:
            raise KeyboardInterrupt
        return module.weight.square().sum()

    monkeypatch.setattr(loop, "SAVE_EVERY_S", 1e9)
    optimiser = Optimiser(60, 1, 1e-3)
    with pytest.raises(KeyboardInterrupt):  # before anything was saved
        fit(module, loss, optimiser, tmp_path / "x.state", 0, quiet)
    logged = lambda: [
        json.loads(line)["step"] for line in (tmp_path / "x.jsonl").read_text().splitlines()
    ]
    assert logged() == [20, 40]
    last[0] = 0
    fit(module, loss, optimiser, tmp_path / "x.state", 0, quiet)
    assert logged() == [20, 40, 60]


def test_gradients_are_clipped_and_frozen_weights_stay(tmp_path: Path) -> None:
    module = nn.Linear(4, 4)
    module.bias.requires_grad_(False)
    before = module.bias.clone()
    huge: list[float] = []
    optimiser = Optimiser(steps=1, batch=1, learning_rate=1e-3, warmup=1, weight_decay=0.0)
    weight = module.weight.detach().clone()
    average = fit(
        module,
        lambda rng: module.weight.sum() * 1e6,
        optimiser,
        tmp_path / "x.state",
        0,
        lambda step, loss: huge.append(loss),
    )
    assert average.keys() == {"weight"}
    assert torch.equal(module.bias, before)
    assert torch.allclose(
        module.weight, weight - 1e-3, atol=1e-6
    )  # Adam's first step is the learning rate
    moments = load_file(tmp_path / "x.state")["exp_avg.weight"]
    assert float(moments.norm()) == pytest.approx(0.1 * optimiser.clip_norm, rel=1e-4)


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "garbage", "no-step", "nameless", "other", "misshapen", "folder"]
)
def test_a_damaged_state_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x.state"
    module = nn.Linear(4, 3)
    fit(module, lambda rng: module.weight.square().sum(), Optimiser(1, 1, 1e-3), path, 0, quiet)
    tensors, step = load_file(path), {"step": "1"}
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage in ("empty", "garbage"):
        path.write_bytes(b"" if damage == "empty" else os.urandom(500))
    elif damage == "no-step":
        save_file(tensors, path, {"step": "soon"})
    elif damage == "nameless":
        save_file({name: t for name, t in tensors.items() if name != "average.weight"}, path, step)
    elif damage == "other":
        save_file({**tensors, "weights.more": torch.zeros(3)}, path, step)
    elif damage == "misshapen":
        save_file({**tensors, "weights.weight": torch.zeros(1, 4)}, path, step)  # would broadcast
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(CheckpointError, match="cannot be resumed") as caught:
        fit(module, lambda rng: module.weight.sum(), Optimiser(2, 1, 1e-3), path, 0, quiet)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 4
    assert "delete it" in caught.value.hint


def test_sixty_updates_lower_the_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    generator, latents = Generator(TINY), toy_latents()
    stage = FlowStage(
        Optimiser(steps=60, batch=8, learning_rate=1e-2, warmup=10, ema=0.9),
        blocks=3,
        previous_noise=0.05,
    )

    def measured() -> float:
        rng = torch.Generator().manual_seed(99)
        with torch.no_grad():
            return (
                sum(
                    float(flow_loss(generator, latents.draw(TINY, stage, rng), stage, rng))
                    for _ in range(8)
                )
                / 8
            )

    before = measured()
    average = fit(
        generator,
        lambda rng: flow_loss(generator, latents.draw(TINY, stage, rng), stage, rng),
        stage.optimiser,
        tmp_path / "x.state",
        0,
        quiet,
    )
    assert measured() < 0.35 * before
    generator.load_state_dict(average, strict=False)
    assert measured() < 0.35 * before  # what ships is the average


# --- a whole run ---


def test_a_whole_run_ends_in_a_checkpoint_and_resumes(clips: Path, tmp_path: Path) -> None:
    told: list[str] = []
    path = run.train(clips, tmp_path / "run", TINY, RECIPE, told.append)
    first = checkpoint.load(path)
    assert first.profile == TINY
    assert set(first.start_frames) == set(run.STARTS)
    skipped = [line for line in told if line.startswith("skipped")]
    assert len(skipped) == 2  # each once, though every part meets it
    assert sorted(line.split()[2] for line in skipped) == [
        "clip-cut.safetensors:",
        "clip-small.safetensors:",
    ]
    assert skipped[1].endswith("(2 so far)")
    assert json.loads((tmp_path / "run" / "record.json").read_text())["skipped"] == 2

    adapted, samples = (
        tmp_path / "run" / "checkpoint-adapted.safetensors",
        tmp_path / "run" / "samples-adapted",
    )
    before, seen = (
        (adapted.read_bytes(), adapted.stat().st_mtime_ns),
        sorted(file.name for file in samples.iterdir()),
    )
    assert path.read_bytes() == before[0] and {f"{name}.mp4" for name in run.STARTS} < set(seen)

    (tmp_path / "run" / "generator-2.safetensors").unlink()
    (tmp_path / "run" / "latents.safetensors").write_bytes(b"damaged")  # a cache: made again
    path.unlink()
    shutil.rmtree(samples)
    unfinished = samples.with_name(f".{samples.name}.unfinished")
    unfinished.mkdir()
    (unfinished / "left.mp4").touch()  # by a run that was killed while it wrote samples
    told.clear()
    again = checkpoint.load(run.train(clips, tmp_path / "run", TINY, RECIPE, told.append))
    assert (
        adapted.read_bytes(),
        adapted.stat().st_mtime_ns,
    ) == before and path.read_bytes() == before[0]
    assert (
        len(list(samples.glob("*.mp4"))) == len(run.STARTS)
        and not unfinished.exists()
        and not (samples / "left.mp4").exists()
    )
    assert not any(line.startswith(("VAE", "generator stage 1")) for line in told)
    for module, same in ((first.generator, again.generator), (first.vae, again.vae)):
        assert all(
            torch.equal(a, b) for a, b in zip(module.parameters(), same.parameters(), strict=True)
        )

    adapted.write_bytes(before[0][:-9])
    run.train(clips, tmp_path / "run", TINY, RECIPE, told.append)
    assert checkpoint.load(adapted).profile == TINY  # a damaged checkpoint is written again

    part = tmp_path / "run" / "generator-1.safetensors"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"generator-1\.safetensors") as caught:
        run.train(clips, tmp_path / "run", TINY, RECIPE, told.append)
    assert "delete it" in caught.value.hint


def test_a_run_s_folder_is_that_of_one_run(clips: Path, tmp_path: Path) -> None:
    short = dataclasses.replace(RECIPE, flow=RECIPE.flow[:1], sample_seconds=0)
    path = run.train(clips, tmp_path / "run", TINY, short, quiet_text)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"] == repr(short)
    others = [
        ("another recipe", TINY, dataclasses.replace(short, seed=1), None),
        ("another profile", TINY.replace(name="other"), short, None),
        ("another start", TINY, short, run.WarmStart(path)),
        ("another profile and another recipe", TINY.replace(name="other"), RECIPE, None),
    ]
    kept = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}
    for what, profile, recipe, start in others:
        with pytest.raises(UsageError, match=f"was made with {what}$") as caught:
            run.train(clips, tmp_path / "run", profile, recipe, quiet_text, start=start)
        assert "--run" in caught.value.hint
    assert {
        file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()
    } == kept
    run.train(clips, tmp_path / "run", TINY, short, quiet_text)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json cannot be read"):
        run.train(clips, tmp_path / "run", TINY, short, quiet_text)


def test_two_processes_do_not_train_in_one_folder(clips: Path, tmp_path: Path) -> None:
    with (
        locked(tmp_path, "it"),
        pytest.raises(BusyError, match=f"run {tmp_path} is being written by process {os.getpid()}"),
    ):
        run.train(clips, tmp_path, TINY, RECIPE, quiet_text)


def test_latents_are_made_again_when_a_clip_changes(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    told: list[str] = []
    render_world(data, TINY, 0, 4)
    vae, cache = Vae(TINY), tmp_path / "latents.safetensors"

    def encoded() -> Tensor:
        return cached_latents(
            cache, vae, clip_files(data, lambda path, reason: None), TINY, told.append
        ).z

    first = encoded()
    told.clear()
    assert torch.equal(encoded(), first) and not told
    one, two = sorted(data.iterdir())
    one.write_bytes(two.read_bytes())
    assert torch.equal(encoded()[0], first[1]) and told


@pytest.mark.parametrize(
    "text",
    [
        dataclasses.replace(TINY.text, tokens=0),
        dataclasses.replace(TINY.text, kind="embedding", tokens=8),
    ],
)
def test_a_model_without_text_is_trained_and_one_with_an_encoder_refused(
    text: Text, clips: Path, tmp_path: Path
) -> None:
    profile, short = TINY.replace(text=text), dataclasses.replace(RECIPE, flow=RECIPE.flow[:1])
    if not text.tokens:
        assert (
            checkpoint.load(
                run.train(clips, tmp_path, profile, short, quiet_text)
            ).profile.text.tokens
            == 0
        )
        return
    with pytest.raises(
        UsageError, match="prompts of 8 tokens of kind 'embedding'; clips hold the ids of 4 words"
    ) as caught:
        run.train(clips, tmp_path, profile, short, quiet_text)
    assert "tokens = 0" in caught.value.hint and not (tmp_path / "latents.safetensors").exists()


def test_a_channel_that_never_moves_has_a_spread_to_divide_by() -> None:
    latents = toy_latents()
    assert float(latents.step_spread().min()) > 0
    stage = FlowStage(Optimiser(1, 2, 1e-3), blocks=3)
    generator = Generator(TINY)
    generator.step_spread.copy_(latents.step_spread())
    rng = torch.Generator().manual_seed(0)
    assert torch.isfinite(flow_loss(generator, latents.draw(TINY, stage, rng), stage, rng))


def test_the_command_line_names_every_clip_that_it_skips(
    aapt: Any, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a stderr that is no terminal progress is told every few seconds only."""
    monkeypatch.setitem(
        recipes.RECIPES, "demo", dataclasses.replace(RECIPE, flow=RECIPE.flow[:1], sample_seconds=0)
    )
    ran = aapt("train", "run", clips, "--run", tmp_path / "run", "--profile", "tiny-cpu")
    assert ran.code == 0, ran.err
    assert (
        "skipped clip clip-cut.safetensors" in ran.err
        and "skipped clip clip-small.safetensors" in ran.err
    )


@pytest.mark.parametrize(
    ("device", "code"), [("mars", UsageError.exit_code), ("cuda", MachineError.exit_code)]
)
def test_a_device_that_is_not_here_is_refused_before_any_work(
    device: str, code: int, aapt: Any, clips: Path, tmp_path: Path
) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is here")
    ran = aapt(
        "train",
        "run",
        clips,
        "--run",
        tmp_path / "run",
        "--profile",
        "tiny-cpu",
        "--device",
        device,
    )
    assert ran.code == code and not (tmp_path / "run").exists(), ran.err


def test_clips_too_short_for_a_stage_are_refused() -> None:
    latents, stage = toy_latents(), FlowStage(Optimiser(1, 2, 1e-3), blocks=6)
    with pytest.raises(
        InputError, match="a stage wants 7 blocks of a clip, the clips have 6"
    ) as caught:
        latents.draw(TINY, stage, torch.Generator())
    assert "--blocks 7" in caught.value.hint


def test_broken_clips_do_not_stop_the_vae_stage(clips: Path) -> None:
    names: list[str] = []
    snippets = Snippets(clip_files(clips, lambda path, reason: names.append(path.name)), TINY)
    stage = dataclasses.replace(
        RECIPE.vae, optimiser=dataclasses.replace(RECIPE.vae.optimiser, batch=16)
    )
    frames = snippets.draw(stage, torch.Generator().manual_seed(0))
    assert frames.shape == (16, 8, 3, TINY.video.height, TINY.video.width)
    assert float(frames.abs().max()) <= 1
    assert set(names) == {"clip-cut.safetensors", "clip-small.safetensors"}
    assert torch.equal(frames, snippets.draw(stage, torch.Generator().manual_seed(0)))


def test_clips_that_are_all_broken_are_refused(clips: Path) -> None:
    broken = [
        clip
        for clip in clip_files(clips, lambda path, reason: None)
        if not clip.path.stem.startswith("clip-0")
    ]
    with pytest.raises(InputError, match="none can be read"):
        Snippets(broken, TINY).draw(RECIPE.vae, torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="none of 2 clips can be read"):
        fit_linear(Vae(TINY), broken, TINY, 0)


def test_the_vae_loss_counts_pixels_and_gradients_after_the_first_group() -> None:
    frames = (
        torch.rand(
            2, 8, 3, TINY.video.height, TINY.video.width, generator=torch.Generator().manual_seed(0)
        )
        * 2
        - 1
    )
    stage = dataclasses.replace(RECIPE.vae, latent_noise=0.0)
    vae = Vae(TINY)
    later = frames[:, 4:]
    expected = (
        later.abs().mean() + later.diff(dim=-1).abs().mean() + later.diff(dim=-2).abs().mean()
    )
    with torch.no_grad():
        for p in vae.decoder.parameters():  # it decodes to mid-grey, which is 0
            p.zero_()
        assert vae_loss(vae, stage, lambda rng: frames, torch.Generator()).item() == pytest.approx(
            expected.item(), rel=1e-5
        )
        assert (
            vae_loss(vae, stage, lambda rng: torch.zeros_like(frames), torch.Generator()).item()
            == 0
        )
