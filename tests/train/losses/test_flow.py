"""Test that the flow loss is the paper's and its batches are what they say.

Its histories are the generator's own and carry no gradient.
"""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.layers import posterior
from aapt_deploy.models.aapt.rope import temporal_rope
from aapt_deploy.profiles import CONDITION_CHANNELS, load
from aapt_deploy.train.draws import coin, numbers
from aapt_deploy.train.losses.flow import SMALLEST_T, Latents, flow_loss, resample_history, shifted
from tests.support.fake_generators import SPREAD, ConstantGenerator
from tests.support.toys import STAGE, batch_of

TINY = load("tiny-cpu")


class Oracle:
    """Answers what it is told to."""

    step_spread = SPREAD

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        self.answer = answer

    def __call__(
        self,
        noisy: Tensor,
        previous: Tensor,
        condition: Tensor,
        t: Tensor,
        text: Tensor,
        rope: Tensor,
    ) -> Tensor:
        return self.answer(t)


# --- the flow loss ---


def test_flow_loss_against_a_slow_reference() -> None:
    """Element by element, in posterior deviations, with times bounded by SMALLEST_T."""
    clipped = 0
    for seed in range(8):
        batch, fake = batch_of(seed=seed), ConstantGenerator(0.3)
        loss = flow_loss(fake, batch, STAGE, torch.Generator().manual_seed(seed))
        ((_, _, condition, t, text, rope_time),) = fake.calls
        assert (condition is batch.condition, text is batch.text, rope_time is batch.rope_time) == (
            True,
            True,
            True,
        )
        total, count = 0.0, 0
        for i in range(t.shape[0]):
            for j in range(t.shape[1]):
                time = float(t[i, j])
                for c, spread in enumerate(fake.step_spread.flatten().tolist()):
                    variance = 1 / (
                        1 / spread**2 + ((1 - time) / time) ** 2
                    )  # of the clean value, given the frame before and the noisy one
                    for clean in batch.clean[i, j, c].flatten().tolist():
                        total, count = total + (clean - 0.3) ** 2 / variance, count + 1
                clipped += time <= SMALLEST_T * 1.001
        assert loss.item() == pytest.approx(total / count, rel=1e-3)
    assert clipped > 0, "no block was below SMALLEST_T: the bound was not tested"


def test_the_loss_is_zero_for_the_right_answer_alone() -> None:
    batch = batch_of()
    oracle = Oracle(lambda t: batch.clean)
    off = Oracle(lambda t: batch.clean + 0.1)
    rng = lambda: torch.Generator().manual_seed(0)
    assert float(flow_loss(oracle, batch, STAGE, rng())) == 0  # type: ignore[arg-type]
    assert float(flow_loss(off, batch, STAGE, rng())) > 0.1**2 * 0.99  # type: ignore[arg-type]


def test_the_noisy_input_is_the_straight_path() -> None:
    batch, fake = batch_of(batch=16), ConstantGenerator(0.0)
    flow_loss(fake, batch, STAGE, torch.Generator().manual_seed(3))
    noisy, _, _, t, _, _ = fake.calls[0]
    noise = (noisy - (1 - t[..., None, None, None]) * batch.clean) / t[..., None, None, None]
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    assert (
        len(t.unique()) > 0.9 * t.numel()
    )  # every block has its own time; the smallest ones share their bound


def test_the_recycled_latent_is_noised_as_the_stage_says() -> None:
    batch = batch_of(batch=16)

    def blemishes(strength: float) -> Tensor:
        fake = ConstantGenerator(0.0)
        flow_loss(
            fake,
            batch,
            dataclasses.replace(STAGE, previous_noise=strength),
            torch.Generator().manual_seed(3),
        )
        return fake.calls[0][1] - batch.previous

    assert not blemishes(0.0).any()
    assert torch.allclose(blemishes(0.4), 2 * blemishes(0.2), atol=1e-5)
    level = blemishes(1.0).std(dim=(2, 3, 4))  # of each block
    assert 0.3 < float(level.mean()) < 1.5
    assert float(level.min()) < 0.5 * float(level.max())


def test_times_follow_the_shifted_distribution() -> None:
    fake, shift = ConstantGenerator(0.0), 3.0
    flow_loss(
        fake,
        batch_of(blocks=64, batch=16),
        dataclasses.replace(STAGE, shift=shift),
        torch.Generator().manual_seed(4),
    )
    t = fake.calls[0][3]
    smallest = float(t.min())
    for level in (0.3, 0.5, 0.8):  # P(t < level) is the inverse of the shift
        assert float((t < level).float().mean()) == pytest.approx(
            level / (shift - (shift - 1) * level), abs=0.05
        )
    assert smallest == pytest.approx(SMALLEST_T)
    assert float(t.max()) <= 1


def test_the_shift_of_time() -> None:
    u = torch.linspace(0, 1, 11)
    assert torch.equal(shifted(u, 1.0), u)
    assert shifted(u, 2.5)[[0, -1]].tolist() == [0, 1]
    assert float(shifted(torch.tensor(0.5), 3.0)) == pytest.approx(0.75)
    assert torch.allclose(shifted(shifted(u, 2.5), 1 / 2.5), u, atol=1e-6)


# --- histories of the generator's own ---


def test_resampling_keeps_the_first_two_and_shifts_the_rest() -> None:
    batch, fake = batch_of(blocks=5), ConstantGenerator(0.7)
    history = resample_history(fake, batch, torch.Generator().manual_seed(0))
    assert torch.equal(history[:, :2], batch.previous[:, :2])
    assert torch.equal(
        history[:, 2:], torch.full_like(history[:, 2:], 0.7)
    )  # the last pass ends on what the generator says
    assert not history.requires_grad

    echo = Oracle(lambda t: batch.clean * t[..., None, None, None].sign())
    own = resample_history(echo, batch, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert torch.allclose(
        own[:, 2:], batch.clean[:, 1:-1]
    )  # block i stands in for the history of block i + 1


def test_resampling_denoises_from_a_random_time_in_one_or_two_passes() -> None:
    batch, passes, times = batch_of(blocks=5, batch=16), [], []
    for seed in range(12):
        fake = ConstantGenerator(0.0)
        resample_history(fake, batch, torch.Generator().manual_seed(seed))
        (first, history, _, t, _, _), *rest = fake.calls
        assert history is batch.previous
        assert (t == t[:, :1]).all()
        noise = (first - (1 - t[..., None, None, None]) * batch.clean) / t[..., None, None, None]
        assert float(noise.std()) == pytest.approx(1, abs=0.05)
        for second, again, _, later, _, _ in rest:
            assert again is history
            assert torch.allclose(
                second / later[..., None, None, None], first / t[..., None, None, None], atol=1e-5
            )  # Euler steps towards 0
            assert (later < t).all()
        passes.append(len(fake.calls))
        times.append(t)
    assert set(passes) == {1, 2}
    assert 0.3 < float(torch.stack(times).min()) < 0.5
    assert 0.9 < float(torch.stack(times).max()) <= 1


def test_a_resampled_history_carries_no_gradient() -> None:
    batch, calls = batch_of(), []
    torch.manual_seed(0)
    generator = Generator(TINY)
    nn.init.normal_(generator.skip.weight, std=0.1)
    generator.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    flow_loss(
        generator,
        batch,
        dataclasses.replace(STAGE, resampled=1.0),
        torch.Generator().manual_seed(0),
    ).backward()  # type: ignore[no-untyped-call]
    assert len(calls) > 1  # passes for the history, one to learn from
    assert not any(value.requires_grad for value in calls[-1])
    assert not torch.allclose(
        calls[-1][1][:, 2:], batch.previous[:, 2:], atol=STAGE.previous_noise * 8
    )
    given = generator.skip.weight.grad
    assert given is not None

    generator.zero_grad()
    _, _, spread = posterior(
        *calls[-1][:2], calls[-1][3][..., None, None, None], generator.step_spread
    )
    (
        ((generator(*calls[-1]) - batch.clean) / spread) ** 2
    ).mean().backward()  # the same pass over the same history, given as data
    assert generator.skip.weight.grad is not None
    assert torch.allclose(given, generator.skip.weight.grad, rtol=1e-4, atol=1e-6)


def test_resampling_leaves_every_gradient_alive_under_autocast() -> None:
    """A weight that autocast cached without gradient must not serve the next pass."""
    torch.manual_seed(0)
    generator = Generator(TINY)
    with torch.no_grad():
        for p in generator.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = flow_loss(
            generator,
            batch_of(),
            dataclasses.replace(STAGE, resampled=1.0),
            torch.Generator().manual_seed(0),
        )
    loss.backward()  # type: ignore[no-untyped-call]
    assert [name for name, p in generator.named_parameters() if p.grad is None] == [
        "text.1.norm_q"
    ]  # which nothing reads


# --- batches ---


def test_a_batch_is_a_sink_and_consecutive_blocks() -> None:
    clips, blocks = 5, 9
    index = torch.arange(clips * (1 + blocks)).reshape(clips, 1 + blocks, 1, 1, 1)
    z = index.expand(
        -1, -1, TINY.video.latent_channels, TINY.latent_height, TINY.latent_width
    ).float()
    conditions = (
        index[:, 1:]
        .expand(-1, -1, CONDITION_CHANNELS, TINY.latent_height, TINY.latent_width)
        .float()
    )
    latents = Latents(z, conditions, torch.arange(clips)[:, None].expand(-1, 4))
    stage = dataclasses.replace(
        STAGE, optimiser=dataclasses.replace(STAGE.optimiser, batch=200), far_sink=0.5
    )
    batch = latents.draw(TINY, stage, torch.Generator().manual_seed(0))
    made = batch.clean[:, :, 0, 0, 0].long()
    assert made.shape == (200, 1 + stage.blocks)
    clip, block = (
        made // (1 + blocks),
        made % (1 + blocks) - 1,
    )  # latent 1 + i is what block i makes
    assert (clip == batch.text[:, :1]).all()
    assert (block[:, 0] == 0).all()
    assert (block[:, 1:] - block[:, 1:2] == torch.arange(stage.blocks)).all()
    assert set(block[:, 1].tolist()) == set(
        range(1, blocks - stage.blocks + 1)
    )  # every start, none past the end
    assert (batch.previous[:, :, 0, 0, 0] == made - 1).all()
    assert (batch.condition[:, :, 0, 0, 0] == made).all()
    near = torch.from_numpy(temporal_rope(TINY, block.numpy()))
    assert torch.equal(batch.rope_time[:, 0], near[:, 0])
    moved = (batch.rope_time[:, 1:] != near[:, 1:]).flatten(1).any(dim=1)
    assert 0.35 < float(moved.float().mean()) < 0.65
    steps = (
        batch.rope_time[:, 2:, 0] * batch.rope_time[:, 1:-1, 0]
        + batch.rope_time[:, 2:, 1] * batch.rope_time[:, 1:-1, 1]
    )
    assert torch.allclose(
        steps, torch.from_numpy(temporal_rope(TINY, 1))[0].expand_as(steps), atol=1e-5
    )  # one block apart, wherever they lie


# --- random numbers ---


def test_batches_have_their_own_numbers_and_share_their_coins() -> None:
    drawn, tossed = {}, {}
    for update in range(40):
        for batch in range(3):
            rng = numbers(5, update, batch)
            tossed[update, batch] = coin(rng, 0), coin(rng, 1)
            drawn[update, batch] = float(torch.rand((), generator=rng, dtype=torch.float64))
    assert len(set(drawn.values())) == len(drawn)
    assert all(tossed[update, batch] == tossed[update, 0] for update, batch in tossed)
    coins = [value for update in range(40) for value in tossed[update, 0]]
    assert len(set(coins)) == 80 and 0.35 < sum(coins) / 80 < 0.65
    one, two = torch.tensor(
        [[tossed[u, 0][0] for u in range(40)], [drawn[u, 0] for u in range(40)]]
    )
    assert float((one - two).abs().max()) > 0.3  # a coin says nothing about what the batch draws
    assert (
        torch.rand(2, generator=numbers(3, 4, 0)).tolist()
        == torch.rand(2, generator=torch.Generator().manual_seed(3_000_013)).tolist()
    )
