"""Test regression on the teacher's samples.

The target is the sampler's end from true histories, and the student alone sees worn ones.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.train.draws import numbers
from aapt_deploy.train.losses.trajectory import measure_fade, trajectory_loss, worn
from aapt_deploy.train.recipe import Optimiser, TrajectoryStage
from tests.support.fake_generators import CHANNELS, TIMES, AnsweringGenerator
from tests.support.toys import TINY, batch_of, toy_latents

STAGE = TrajectoryStage(Optimiser(4, 2, 1e-3), blocks=3, worn=1.0, fade_blocks=7)
FADE = torch.linspace(0.9, 0.3, CHANNELS)


def run(
    student: AnsweringGenerator, teacher: AnsweringGenerator, stage: TrajectoryStage, seed: int = 0
) -> Tensor:
    rng = numbers(seed, 0, 0)
    return trajectory_loss(student, teacher, batch_of(), stage, FADE, rng)  # type: ignore[arg-type]


def test_a_student_that_knows_the_samplers_end_has_no_loss() -> None:
    """For constant velocities the sampler ends at the mean of noise and past."""
    halfway = lambda x, previous, t: (
        x - t[..., None, None, None] * (x - previous) / (1 + t[..., None, None, None])
    )
    clean = dataclasses.replace(STAGE, worn=0.0)
    student = AnsweringGenerator(lambda x, previous, t: (x + previous) / 2)
    teacher = AnsweringGenerator(halfway)
    assert run(student, teacher, clean) < 1e-6
    assert run(
        AnsweringGenerator(lambda x, previous, t: (x + previous) / 2 + 0.5),
        AnsweringGenerator(halfway),
        clean,
    ).item() == pytest.approx(np.sqrt(1 + 0.1**2) - 0.1, rel=1e-5)
    assert [float(t[0, 0]) for _, _, t in teacher.calls] == pytest.approx(TIMES)
    assert [float(t.min()) for _, _, t in student.calls] == [1.0] and torch.equal(
        student.calls[0][0], teacher.calls[0][0]
    )


def test_only_the_student_sees_worn_histories_and_only_it_learns() -> None:
    student, teacher = (AnsweringGenerator(lambda x, previous, t: previous) for _ in range(2))
    run(student, teacher, dataclasses.replace(STAGE, previous_noise=0.1)).backward()
    assert student.gain.grad is not None and teacher.gain.grad is None
    true = batch_of().previous
    assert all(torch.equal(previous, true) for _, previous, _ in teacher.calls)
    assert not torch.isclose(student.calls[0][1], true).all()


def test_histories_fade_by_channel_or_gain_contrast_and_the_sink_stays() -> None:
    previous = torch.randn(400, 3, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(1))
    fade = torch.linspace(0.9, 0.1, CHANNELS)
    seen = worn(previous, fade, 0.8, numbers(5, 0, 0))
    assert torch.equal(seen[:, 0], previous[:, 0])
    left = seen[:, 1:].std((3, 4)) / previous[:, 1:].std((3, 4))  # [B, 2, C]; a tint adds to it
    untouched = torch.isclose(seen, previous, atol=1e-6).flatten(1).all(1)
    assert 0.12 < float(untouched.float().mean()) < 0.28
    faded = (left[:, :, -1] < 0.8).all(1)
    raised = (left[:, :, 1:3] > 1.1).flatten(1).all(1)
    assert 0.35 < float(faded.float().mean()) < 0.65 and 0.04 < float(raised.float().mean()) < 0.3
    assert float(left[faded, :, 0].mean()) > 2 * float(
        left[faded, :, -1].mean()
    )  # the last channel fades most
    shift = (seen - previous)[:, 1:].mean((3, 4))
    assert float(shift[..., 0].std()) > 3 * float(shift[..., -1].std()) > 0
    torch.testing.assert_close(worn(previous, fade, 0.0, numbers(5, 0, 0)), previous)


class Fading(Generator):
    """Keeps half of the recycled latent's detail, and all of its mean."""

    def step(
        self, noisy: Tensor, previous: Tensor, *rest: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # type: ignore[override]
        _, keys, values = super().step(noisy, previous, *rest)  # type: ignore[arg-type]
        mean = previous.mean((2, 3), keepdim=True)
        return mean + self.keep * (previous - mean), keys, values

    keep = 0.5


@pytest.mark.parametrize(
    ("keep", "blocks", "left"), [(0.5, 3, 0.125), (0.5, 9, 0.05), (1.0, 5, 1.0), (1.3, 5, 1.0)]
)
def test_fading_is_measured_over_as_many_blocks_as_asked(
    keep: float, blocks: int, left: float
) -> None:
    torch.manual_seed(0)
    generator, latents = Fading(TINY), toy_latents()
    generator.keep = keep
    latents.z[:, 1:] = latents.z[:, :1]
    latents.z[:] = latents.z[:1]  # every clip has the same deviation
    fade = measure_fade(
        generator, latents, dataclasses.replace(STAGE, fade_blocks=blocks), numbers(0, 0, 1)
    )
    assert fade.shape == (CHANNELS,)
    torch.testing.assert_close(fade, torch.full_like(fade, left), rtol=1e-3, atol=1e-4)
