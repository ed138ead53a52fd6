"""Test that what strays beyond the natural band is measured and pulled back.

Otherwise the teacher's answer stays what it is.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from aapt_deploy.errors import TrainingError
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.train.draws import numbers
from aapt_deploy.train.losses.anchor import GRID, Anchor, coarse, fit_anchor, smooth
from aapt_deploy.train.losses.anchored import MIXED, anchored_loss, level_errors, own_flights
from aapt_deploy.train.losses.flow import Latents
from aapt_deploy.train.recipe import AnchoredStage, Optimiser
from tests.support.fake_generators import CHANNELS, AnsweringGenerator
from tests.support.toys import TINY, batch_of, toy_latents

STAGE = AnchoredStage(Optimiser(4, 2, 1e-3), blocks=3, flights=4, flight_blocks=8)
SIZE = (TINY.latent_height, TINY.latent_width)


def worlds(clips: int = 300, blocks: int = 6, shaking: float = 0.1) -> Latents:
    """Clips whose levels are the prompt's, with a deviation `shaking` from frame to frame."""
    rng = torch.Generator().manual_seed(3)
    tokens = torch.randint(5, (clips, 2), generator=rng)
    level = tokens.sum(1)[:, None] * torch.linspace(1, -1, CHANNELS)  # [N, C]
    frames = level[:, None, :, None, None] + shaking * torch.randn(
        clips, 1 + blocks, CHANNELS, 1, 1, generator=rng
    )
    return Latents(
        frames + 0.2 * torch.randn(clips, 1 + blocks, CHANNELS, *SIZE, generator=rng),
        torch.zeros(clips, blocks, 6, *SIZE),
        tokens,
    )


@pytest.fixture(scope="module")
def fitted() -> tuple[Latents, Anchor]:
    return (latents := worlds()), fit_anchor(latents)


def test_true_frames_are_inside_the_band_and_strayed_ones_are_measured(
    fitted: tuple[Latents, Anchor],
) -> None:
    latents, anchor = fitted
    first, later = latents.z[:, 0], latents.z[:, 4]
    levels, deviations = anchor.excess(later, latents.tokens, first, 2.0)
    assert levels.shape == (300, CHANNELS, *GRID) and deviations.shape == (300, CHANNELS)
    assert (
        float((levels != 0).float().mean()) < 0.1 and float((deviations != 0).float().mean()) < 0.1
    )
    everything, _ = anchor.excess(later, latents.tokens, first, 0.0)
    strayed = later.clone()
    strayed[:, 1] += 3.0
    off, _ = anchor.excess(strayed, latents.tokens, first, 0.0)
    torch.testing.assert_close(
        (off - everything)[:, 1], torch.full((300, *GRID), 3.0), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(off[:, 2], everything[:, 2])
    inside, _ = anchor.excess(strayed, latents.tokens, first, 2.0)
    assert 2 < float(inside[:, 1].mean()) < 3 and float(inside[:, 2].abs().mean()) < 0.1
    doubled = coarse(later) + 2 * (later - coarse(later))
    found = (
        anchor.excess(doubled, latents.tokens, first, 0.0)[1]
        - anchor.excess(later, latents.tokens, first, 0.0)[1]
    )
    assert (
        0.4 < float(found.mean()) < 0.75
    )  # log 2 is 0.69; what is coarse of the detail is not doubled


def test_another_prompt_expects_other_levels() -> None:
    """Where a frame tells little, the words do."""
    latents = worlds(shaking=3.0)
    anchor, wrong = fit_anchor(latents), (latents.tokens + 2) % 5
    level = lambda z: z.mean((2, 3))[:, 0]
    first, later = latents.z[:, 0], latents.z[:, 5]
    told, misled = (
        level(later) - anchor.excess(later, text, first, 0.0)[0].mean((2, 3))[:, 0]
        for text in (latents.tokens, wrong)
    )
    true = latents.tokens.sum(1).float()
    assert (
        float((told - true).abs().mean()) < 0.8
        and float((misled - wrong.sum(1)).abs().mean()) < 0.8
    )


def test_pulling_takes_the_part_back(fitted: tuple[Latents, Anchor]) -> None:
    latents, anchor = fitted
    target = latents.z[:8, 2]
    levels, deviations = torch.randn(8, CHANNELS, *GRID), torch.full((8, CHANNELS), 0.5)
    same = anchor.pulled(target, levels, 0 * deviations, 0.3)
    torch.testing.assert_close(same, target - 0.3 * smooth(levels, target))
    duller = anchor.pulled(target, 0 * levels, deviations, 0.3)
    torch.testing.assert_close(
        duller - coarse(target), (target - coarse(target)) * torch.exp(torch.tensor(-0.15))
    )
    torch.testing.assert_close(anchor.pulled(target, 0 * levels, 0 * deviations, 0.3), target)


@pytest.mark.parametrize("words", [0, 3])
def test_prompts_are_not_needed(words: int) -> None:
    latents = dataclasses.replace(worlds(40), tokens=torch.zeros(40, words, dtype=torch.long))
    anchor = fit_anchor(latents)
    assert all(
        torch.isfinite(x).all()
        for x in anchor.excess(latents.z[:, 1], latents.tokens, latents.z[:, 0], 1.0)
    )


def loss(
    student: AnsweringGenerator,
    teacher: AnsweringGenerator,
    errors: Tensor,
    anchor: Anchor,
    stage: AnchoredStage = STAGE,
) -> Tensor:
    return anchored_loss(
        student, teacher, batch_of(), errors, batch_of(seed=1), anchor, stage, numbers(0, 0, 0)
    )  # type: ignore[arg-type]


def flat_anchor(spread: float) -> Anchor:
    """Guesses levels 0 and deviations exp(0)."""
    places = CHANNELS * GRID[0] * GRID[1]
    features = 64 + CHANNELS * (GRID[0] + 1) + 1
    return Anchor(
        torch.zeros(features, places + CHANNELS), torch.full((places + CHANNELS,), spread), 64
    )


def test_the_student_sees_the_errors_and_only_it_learns() -> None:
    student, teacher = (AnsweringGenerator(lambda x, previous, t: previous) for _ in range(2))
    errors = torch.randn(2, 1, CHANNELS, 1, 1).expand(-1, -1, -1, *SIZE)
    loss(student, teacher, errors, flat_anchor(1.0)).backward()
    assert student.gain.grad is not None and teacher.gain.grad is None
    (noise, seen, t), (same_noise, true, _) = student.calls[0], teacher.calls[0]
    assert torch.equal(noise, same_noise) and float(t.min()) == 1.0
    torch.testing.assert_close((seen - true)[:2, 1:], errors.expand(-1, 3, -1, -1, -1))
    assert torch.equal(seen[:, 0], true[:, 0]) and torch.equal(
        seen[2:], true[2:]
    )  # the sink is true, and own flights are as they are


def test_a_student_that_takes_the_asked_part_back_has_no_loss() -> None:
    """The teacher repeats its history: 0.8 of the error, 0.75 of what is out of band."""
    teacher, errors, anchor = (
        AnsweringGenerator(lambda x, previous, t: previous),
        torch.full((2, 1, CHANNELS, *SIZE), 0.4),
        flat_anchor(1e9),
    )

    def answer(keeps: float) -> AnsweringGenerator:
        kept = torch.zeros(4, 4, 1, 1, 1)
        kept[:2, 1:] = 0.4 * (1 - keeps)
        return AnsweringGenerator(lambda x, previous, t: previous - kept)

    assert (
        loss(answer(0.8), teacher, errors, anchor)
        < 1e-6
        < 1e-2
        < loss(answer(1.0), teacher, errors, anchor)
    )
    outside = dataclasses.replace(STAGE, band=0.0, pull=1.0)
    restored = AnsweringGenerator(lambda x, previous, t: previous)
    assert (
        loss(restored, teacher, 0 * errors, anchor)
        < 1e-6
        < loss(restored, teacher, 0 * errors, flat_anchor(0.0), outside)
    )
    own = batch_of(seed=1).previous[:, 1:].flatten(0, 1)
    excess = flat_anchor(0.0).excess(own, torch.zeros(6, 2, dtype=torch.long), own, 0.0)
    asked = flat_anchor(0.0).pulled(own, *excess, 1.0)

    def exactly(x: Tensor, previous: Tensor, t: Tensor) -> Tensor:
        found = previous.clone()
        found[2:, 1:] = asked.unflatten(0, (2, 3))
        return found

    assert loss(AnsweringGenerator(exactly), teacher, 0 * errors, flat_anchor(0.0), outside) < 1e-6


def test_errors_are_of_levels_and_lead_to_other_clips() -> None:
    latents = worlds()
    previous = latents.z[:200, :4]
    errors = level_errors(latents, previous, numbers(1, 0, 0))
    assert errors.shape == (200, 1, CHANNELS, *SIZE)
    torch.testing.assert_close(level_errors(latents, previous, numbers(1, 0, 0)), errors)
    rough = errors[:, 0] - coarse(errors[:, 0])
    assert float(rough.std()) < 0.2 * float(errors.std())  # nothing fine
    mean = errors.mean((3, 4))[:, 0]  # [B, C]
    far = mean[:, 0].abs() > 3 * 0.15
    assert 0.2 < float(far.float().mean()) < MIXED
    assert (
        float(torch.corrcoef(torch.stack([mean[far, 0], mean[far, -1]]))[0, 1]) < -0.9
    )  # as palettes differ between these worlds


def test_own_flights_are_what_the_streams_make(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    generator, latents = Generator(TINY), toy_latents()
    latents = dataclasses.replace(
        latents, conditions=latents.conditions.half()
    )  # as a run keeps them
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own_flights(generator, latents, STAGE, numbers(0, 0, 1))
    flights = own_flights(generator, latents, STAGE, numbers(0, 0, 1))
    assert flights.z.shape == (4, 9, CHANNELS, *SIZE) and flights.conditions.shape[:2] == (4, 8)
    again = own_flights(generator, latents, STAGE, numbers(0, 0, 1))
    assert torch.equal(flights.z, again.z)
    assert all(any(torch.equal(flights.z[i, 0], clip[0]) for clip in latents.z) for i in range(4))
    batch = flights.draw(TINY, STAGE, numbers(0, 0, 0))
    assert batch.previous.shape[:2] == (2, 4)
    true = Generator.step

    def wild(
        self: Generator, noisy: Tensor, previous: Tensor, *rest: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        clean, keys, values = true(self, noisy, previous, *rest)  # type: ignore[arg-type]
        return (
            clean + torch.tensor([100.0, float("nan"), 0.0, 0.0])[:, None, None, None],
            keys,
            values,
        )

    monkeypatch.setattr(Generator, "step", wild)
    assert len(own_flights(generator, latents, STAGE, numbers(0, 0, 1)).z) == 2
    monkeypatch.setattr(Generator, "step", lambda *a: (true(*a)[0] * float("nan"), *true(*a)[1:]))
    with pytest.raises(TrainingError, match="all 4 flights of 8 blocks run away"):
        own_flights(generator, latents, STAGE, numbers(0, 0, 1))
