"""Test stages 2 to 4: losses against closed forms and slow references, and gradients.

Also who sees whom, and what a segment is made of.
"""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from aapt_deploy.models.aapt.discriminator import ATTENTION, LOGITS, Discriminator
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.prompts import VOCABULARY_SIZE
from aapt_deploy.models.aapt.rope import temporal_rope
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.profiles import CONDITION_CHANNELS, load
from aapt_deploy.train.draws import coin, numbers
from aapt_deploy.train.losses.adversarial import (
    ForcedRollout,
    adversarial_update,
    discriminator_loss,
    frozen,
)
from aapt_deploy.train.losses.consistency import consistency_loss, times
from aapt_deploy.train.losses.flow import Clips, flow_loss
from aapt_deploy.train.losses.student_forcing import Streams
from aapt_deploy.train.recipe import AdversarialStage, ConsistencyStage, FlowStage, Optimiser, gan
from tests.support.fake_generators import ConstantGenerator
from tests.support.toys import TINY, batch_of, drawn_generator, toy_latents

RING = Ring.of(TINY)
BLOCKS = RING.sink_blocks + RING.window_blocks + 2
DISTIL = ConsistencyStage(Optimiser(4, 2, 1e-3), blocks=3, intervals=8, shift=3.0)
GAME = AdversarialStage(gan(4, 2, 1e-4), blocks=4, discriminator_rate=1e-4, extensions=1, overlap=2)
PARTS = ("loss", "discriminator", "r1", "r2", "margin")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clips_of(blocks: int = 4, batch: int = 2, seed: int = 0) -> Clips:
    rng = seeded(seed)
    size = (TINY.latent_height, TINY.latent_width)
    return Clips(
        torch.randn(batch, 1 + blocks, TINY.video.latent_channels, *size, generator=rng),
        torch.randn(batch, blocks, CONDITION_CHANNELS, *size, generator=rng),
        torch.randint(VOCABULARY_SIZE, (batch, TINY.text.tokens), generator=rng),
    )


def drawn_discriminator(
    attention: str = "causal", logits: str = "frame", seed: int = 0
) -> Discriminator:
    """Random weights that depend on everything."""
    torch.manual_seed(seed)
    discriminator = Discriminator(TINY, attention, logits)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return discriminator


# --- stage 1, in the paper's form ---


def test_one_time_for_the_whole_clip_and_the_loss_of_the_velocity() -> None:
    batch, fake = batch_of(batch=8), ConstantGenerator(0.3)
    stage = FlowStage(
        Optimiser(1, 8, 1e-3),
        blocks=3,
        shift=24.0,
        previous_noise=0.0,
        one_time=True,
        velocity=True,
    )
    loss = flow_loss(fake, batch, stage, seeded(3))  # type: ignore[arg-type]
    ((noisy, previous, _, t, _, _),) = fake.calls
    assert (t == t[:, :1]).all() and len(t.unique()) == 8
    assert torch.equal(previous, batch.previous)  # clean
    t_ = t[..., None, None, None]
    noise = (noisy - (1 - t_) * batch.clean) / t_
    predicted = (noisy - 0.3) / t_  # the velocity that a clean latent of 0.3 means
    assert loss.item() == pytest.approx(
        ((predicted - (noise - batch.clean)) ** 2).mean().item(), rel=1e-3
    )


# --- stage 2: consistency distillation ---


def test_the_fixed_times_are_shifted_and_end_at_data_and_noise() -> None:
    fixed = times(DISTIL)
    assert len(fixed) == 9 and fixed[0] == 0 and fixed[-1] == 1 and (fixed.diff() > 0).all()
    assert fixed[4].item() == pytest.approx(3.0 * 0.5 / (1 + 2 * 0.5))


class Known(nn.Module):
    """Answer a constant above t = 0 and the input at t = 0; record the calls."""

    step_spread = torch.ones(1)

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.tensor(constant))
        self.calls: list[tuple[Tensor, ...]] = []

    def forward(
        self,
        x: Tensor,
        previous: Tensor,
        condition: Tensor,
        t: Tensor,
        text: Tensor,
        rope_time: Tensor,
    ) -> Tensor:
        self.calls.append((x, previous, t, torch.tensor(torch.is_grad_enabled())))
        return torch.where(
            t[..., None, None, None] > 0, self.constant * t[..., None, None, None], x
        )


def test_the_consistency_loss_against_a_slow_reference() -> None:
    """The student's two answers along one step of the teacher's path, element by element."""
    ends = 0
    for seed in range(6):
        batch, student, teacher = batch_of(seed=seed), Known(0.5), Known(-0.2)
        rng = seeded(seed)
        loss = consistency_loss(student, teacher, batch, DISTIL, rng)  # type: ignore[arg-type]
        (x, _, now, quiet), (nearer, previous, after, target_quiet), (again, _, later, learning) = (
            teacher.calls[0],
            *student.calls,
        )
        assert (bool(quiet), bool(target_quiet), bool(learning)) == (False, False, True)
        assert (
            torch.equal(x, again)
            and torch.equal(now, later)
            and torch.equal(previous, batch.previous)
        )
        fixed = times(DISTIL).tolist()
        total, count = 0.0, 0
        for i in range(len(x)):
            assert (now[i] == now[i, 0]).all()  # one time per clip
            a, b = float(now[i, 0]), float(after[i, 0])
            place = min(range(9), key=lambda j: abs(fixed[j] - a))
            assert (a, b) == pytest.approx((fixed[place], fixed[place - 1]))
            ends += b == 0
            noise = (x[i] - (1 - a) * batch.clean[i]) / a
            assert 0.9 < float(noise.std()) < 1.1
            velocity = (x[i] + 0.2 * a) / a  # of the teacher, whose answer is -0.2 a
            step = x[i] + (b - a) * velocity
            torch.testing.assert_close(nearer[i], step, rtol=1e-4, atol=1e-5)
            target = step if b == 0 else torch.full_like(step, 0.5 * b)
            total, count = total + float(((0.5 * a - target) ** 2).sum()), count + step.numel()
        assert loss.item() == pytest.approx(total / count, rel=1e-3)
        loss.backward()
        assert teacher.constant.grad is None and student.constant.grad is not None
    assert ends, "no pair reached t = 0"


def test_at_time_zero_the_generator_answers_its_input() -> None:
    generator, batch = drawn_generator(), batch_of(blocks=3)
    t = torch.zeros(batch.clean.shape[:2])
    with torch.no_grad():
        answer = generator(
            batch.clean, batch.previous, batch.condition, t, batch.text, batch.rope_time
        )
    torch.testing.assert_close(answer, batch.clean, rtol=1e-4, atol=1e-5)


def test_distillation_leaves_every_gradient_alive_under_autocast() -> None:
    student, teacher = drawn_generator(0), drawn_generator(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = consistency_loss(student, teacher, batch_of(), DISTIL, seeded())
    loss.backward()  # type: ignore[no-untyped-call]
    assert [name for name, p in student.named_parameters() if p.grad is None] == [
        "text.1.norm_q"
    ]  # which nothing reads
    assert all(p.grad is None for p in teacher.parameters())


# --- the discriminator ---


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("logits", LOGITS)
def test_what_a_logit_sees(attention: str, logits: str) -> None:
    """Change each frame in turn.

    The logits that answer are the later ones, within the layers' reach, or all.
    """
    discriminator, clips = drawn_discriminator(attention, logits), clips_of(BLOCKS, batch=1)
    t = torch.tensor([0.4])

    def judged(frames: Tensor, condition: Tensor) -> Tensor:
        return discriminator(frames, condition, t, clips.text)[0].detach()

    before = judged(clips.frames, clips.condition)
    assert before.shape == ((BLOCKS,) if logits == "frame" else (1,))
    for changed in range(BLOCKS):
        frames, condition = clips.frames.clone(), clips.condition.clone()
        frames[:, 1 + changed] += 0.5
        condition[:, changed] += 0.5
        answered = (judged(frames, condition) - before).abs() > 1e-6
        assert bool(answered[changed if logits == "frame" else 0])
        if (attention, logits) == ("causal", "frame"):
            assert not answered[:changed].any()
        else:
            assert bool(answered[0])


def test_the_discriminator_starts_as_the_generators_backbone() -> None:
    generator = drawn_generator(3)
    discriminator = drawn_discriminator(seed=1)
    heads = {
        name: p.detach().clone()
        for name, p in discriminator.named_parameters()
        if name.startswith(("queries", "logit"))
    }
    discriminator.start_from(generator)
    theirs, own = generator.state_dict(), discriminator.state_dict()
    assert {name for name in own if name not in theirs} == set(heads)
    assert all(torch.equal(own[name], theirs[name]) for name in own if name in theirs)
    assert all(torch.equal(own[name], heads[name]) for name in heads)


def test_the_discriminators_tokens_are_the_generators_at_time_zero() -> None:
    """The backbone sees in a real clip what it learned to see."""
    generator, discriminator, clips = drawn_generator(), drawn_discriminator(), clips_of(3, batch=1)
    discriminator.start_from(generator)
    seen: dict[str, Tensor] = {}
    for name, module in (("generator", generator), ("discriminator", discriminator)):
        module.visual[-1].register_forward_hook(
            lambda module, inputs, out, name=name: seen.update({name: out[0].detach()})
        )  # type: ignore[attr-defined]
    rope = torch.from_numpy(temporal_rope(TINY, torch.arange(3)[None].numpy()))
    generator(
        clips.frames[:, 1:],
        clips.frames[:, :-1],
        clips.condition,
        torch.zeros(1, 3),
        clips.text,
        rope,
    )
    discriminator(clips.frames, clips.condition, torch.zeros(1), clips.text)
    torch.testing.assert_close(seen["discriminator"], seen["generator"], rtol=1e-4, atol=1e-5)


def test_taps_are_at_the_paper_s_depths() -> None:
    deep = load("tiny-cpu")
    deep = deep.replace(model=dataclasses.replace(deep.model, depth=36))
    assert Discriminator(deep).taps == [16, 26, 36]
    assert Discriminator(TINY).taps == [1, 2]


# --- the losses ---


class Judge(nn.Module):
    """Scores each frame by its mean; remembers the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.batches: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def forward(self, frames: Tensor, condition: Tensor, t: Tensor, text: Tensor) -> Tensor:
        self.batches.append((frames, condition, t, text))
        return self.weight * frames[:, 1:].mean(dim=(2, 3, 4))


def test_the_discriminators_loss_against_a_slow_reference() -> None:
    fake, real, judge = clips_of(seed=1), clips_of(seed=2), Judge()
    noise = [0.1 * torch.randn(fake.frames.shape, generator=seeded(i)) for i in range(2)]
    figures, real_logits = discriminator_loss(
        judge, fake, real, torch.tensor([0.2, 0.7]), noise, 50.0
    )  # type: ignore[arg-type]
    pairs, r1, r2, count = 0.0, 0.0, 0.0, 0
    for b in range(2):
        for i in range(1, 5):
            made, true = (2 * float(clips.frames[b, i].mean()) for clips in (fake, real))
            near_made, near_true = (
                2 * float((clips.frames[b, i] + eps[b, i]).mean())
                for clips, eps in zip((fake, real), noise, strict=True)
            )
            pairs, count = pairs + math.log1p(math.exp(made - true)), count + 1
            r1, r2 = r1 + (true - near_true) ** 2, r2 + (made - near_made) ** 2
            assert real_logits[b, i - 1].item() == pytest.approx(true, rel=1e-4)
    assert figures["r1"].item() == pytest.approx(r1 / count, rel=1e-3) and figures[
        "r2"
    ].item() == pytest.approx(r2 / count, rel=1e-3)
    assert figures["discriminator"].item() == pytest.approx(
        (pairs + 50 * (r1 + r2)) / count, rel=1e-4
    )
    ((frames, condition, t, text),) = judge.batches  # one pass
    assert torch.equal(
        frames[:, 0], torch.cat([fake.frames[:, 0], real.frames[:, 0]] * 2)
    )  # the given frame stays clean
    assert torch.equal(condition, torch.cat([fake.condition, real.condition] * 2)) and torch.equal(
        t, torch.tensor([0.2, 0.7] * 4)
    )
    assert (
        torch.equal(text, torch.cat([fake.text, real.text] * 2)) and not real_logits.requires_grad
    )


def test_without_a_penalty_two_clips_of_a_pair_go_through() -> None:
    judge = Judge()
    figures, _ = discriminator_loss(
        judge, clips_of(seed=1), clips_of(seed=2), torch.rand(2), [], 0.0
    )  # type: ignore[arg-type]
    assert judge.batches[0][0].shape[0] == 4 and figures.keys() == {"discriminator", "margin"}


def test_the_generators_loss_and_where_its_gradient_goes() -> None:
    """softplus(real - made) of the same logits as the discriminator's loss.

    None of it reaches the discriminator's weights.
    """
    generator, discriminator = drawn_generator(), drawn_discriminator()
    stage = dataclasses.replace(GAME, extensions=0, penalty=0.0)
    figures = adversarial_update(generator, discriminator, toy_latents(), stage, seeded(), 0, 1.0)
    real = toy_latents().clips(2, 4, rng := seeded())
    made = ForcedRollout(generator, real.frames[:, 0], real.text, stage, rng).extend(real.condition)
    t = torch.rand(2, generator=rng)
    made_logits = discriminator(
        torch.cat([real.frames[:, :1], made], dim=1), real.condition, t, real.text
    )
    margin = made_logits - discriminator(real.frames, real.condition, t, real.text)
    expected = {
        "loss": nn.functional.softplus(-margin).mean(),
        "discriminator": nn.functional.softplus(margin).mean(),
    }
    given = {name: p.grad for name, p in discriminator.named_parameters()}
    for name, value in expected.items():
        assert figures[name].item() == pytest.approx(value.item(), rel=1e-4)
    discriminator.zero_grad()
    fake = torch.cat([real.frames[:, :1], made.detach()], dim=1)
    made_logits = discriminator(fake, real.condition, t, real.text)
    true_logits = discriminator(real.frames, real.condition, t, real.text)
    nn.functional.softplus(margin.detach() * 0 + made_logits - true_logits).mean().backward()
    for name, p in discriminator.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(given[name], p.grad, rtol=1e-3, atol=1e-6)


def test_penalties_come_every_few_updates_with_as_much_more_weight() -> None:
    stage = dataclasses.replace(GAME, extensions=0, penalty=10.0, penalty_every=3)
    runs = [
        adversarial_update(
            drawn_generator(), drawn_discriminator(), toy_latents(), stage, seeded(), step, 1.0
        )
        for step in range(4)
    ]
    assert [set(PARTS) - run.keys() for run in runs] == [set(), {"r1", "r2"}, {"r1", "r2"}, set()]
    with_penalty = runs[1]["discriminator"] + 30 * (runs[0]["r1"] + runs[0]["r2"])
    assert runs[0]["discriminator"].item() == pytest.approx(with_penalty.item(), rel=1e-4)


def test_a_frozen_network_passes_gradients_on() -> None:
    judge, x = Judge(), clips_of().frames.requires_grad_()
    with frozen(judge):
        judge(x, x, x, x).sum().backward()
    assert (
        x.grad is not None
        and bool(x.grad.any())
        and judge.weight.grad is None
        and judge.weight.requires_grad
    )


# --- the rollout and its gradients ---


def test_a_segment_is_the_rollout_of_streams_bit_for_bit() -> None:
    """The training rollout equals `Streams`, with gradient checkpointing or not.

    `Streams` equals inference (tests/train/losses/test_student_forcing.py).
    """
    generator, clips = drawn_generator(), clips_of(BLOCKS)
    stage = dataclasses.replace(GAME, timesteps=(1.0, 0.5))
    with torch.no_grad():
        streams, previous, expected, rng = (
            Streams(generator, clips.text),
            clips.frames[:, 0],
            [],
            seeded(1),
        )
        torch.rand(2, generator=rng), torch.randint(1, (2,), generator=rng)
        for block in range(BLOCKS):
            rope_time = torch.from_numpy(temporal_rope(TINY, block))[None].expand(2, -1, -1)
            noise = TINY.sampler.temperature * torch.randn(previous.shape, generator=rng)
            previous = streams.sample(
                noise, previous, clips.condition[:, block], rope_time, stage.timesteps
            )
            expected.append(previous)
    for checkpointing in (False, True):
        generator.checkpointing = checkpointing
        rollout = ForcedRollout(generator, clips.frames[:, 0], clips.text, stage, seeded(1))
        parts = [rollout.extend(clips.condition[:, :3])]
        rollout.detach()
        parts.append(rollout.extend(clips.condition[:, 3:]))
        assert torch.equal(torch.cat(parts, dim=1), torch.stack(expected, dim=1))


def test_recomputed_blocks_give_the_same_gradients_where_the_ring_wraps() -> None:
    gradients = []
    for checkpointing in (False, True):
        generator, clips = drawn_generator(), clips_of(BLOCKS)
        generator.checkpointing = checkpointing
        ForcedRollout(generator, clips.frames[:, 0], clips.text, GAME, seeded(1)).extend(
            clips.condition
        ).square().sum().backward()
        gradients.append(
            {name: p.grad for name, p in generator.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_gradients_pass_through_the_cache_and_not_through_the_recycled_frame() -> None:
    """The first block's camera moves the last block's latent.

    Without its keys and values, no gradient is left.
    """
    found = {}
    for cut in (False, True):
        generator, clips = drawn_generator(), clips_of(3)
        condition = clips.condition.requires_grad_()
        rollout = ForcedRollout(generator, clips.frames[:, 0], clips.text, GAME, seeded(1))
        made = [rollout.extend(condition[:, :1])]
        if cut:
            rollout.detach()
        made.append(rollout.extend(condition[:, 1:2]))
        assert not rollout.previous.requires_grad
        made[1].square().sum().backward()
        assert condition.grad is not None
        found[cut] = condition.grad[:, 0]
        with torch.no_grad():  # the recycled frame does carry the first block's content
            other = ForcedRollout(generator, clips.frames[:, 0], clips.text, GAME, seeded(1))
            other.extend(condition[:, :1] + 1)
            other.streams.held = rollout.streams.held
            assert not torch.equal(other.previous, made[0][:, 0])
    assert float(found[False].abs().max()) > 0 and not found[True].any()


# --- long video ---


class Watching(Discriminator):
    """A discriminator that remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__(TINY)
        self.shown: list[tuple[bool, Tensor, Tensor, Tensor]] = []

    def forward(self, frames: Tensor, condition: Tensor, t: Tensor, text: Tensor) -> Tensor:
        self.shown.append((frames.requires_grad, frames.detach(), condition, text))
        return super().forward(frames, condition, t, text)


def test_long_video_overlaps_goes_on_and_is_judged_segment_by_segment() -> None:
    torch.manual_seed(0)
    generator, discriminator, stage = (
        drawn_generator(),
        Watching(),
        dataclasses.replace(GAME, extensions=2, overlap=2, penalty=0.0),
    )
    latents = toy_latents(clips=5)
    latents.conditions.normal_(generator=seeded(9))
    adversarial_update(generator, discriminator, latents, stage, seeded(), 0, 1.0)
    judged, segments = discriminator.shown[::2], discriminator.shown[1::2]
    assert (
        len(segments) == 3
        and all(learns for learns, *_ in segments)
        and not any(learns for learns, *_ in judged)
    )
    for k, (_, frames, condition, text) in enumerate(segments):
        assert frames.shape[1] == 1 + stage.blocks and torch.equal(
            text, segments[0][3]
        )  # the stream keeps its prompt
        real_frames, real_condition = judged[k][1][2:], judged[k][2][2:]
        assert torch.equal(judged[k][1][:2], frames)
        fresh = stage.blocks - (stage.overlap if k else 0)
        assert torch.equal(
            condition[:, -fresh:], real_condition[:, -fresh:]
        )  # it flies the real clip's path
        assert not torch.equal(frames, real_frames)
        if k:
            _, last, flown, _ = segments[k - 1]
            assert torch.equal(frames[:, : 1 + stage.overlap], last[:, -1 - stage.overlap :])
            assert torch.equal(condition[:, : stage.overlap], flown[:, -stage.overlap :])


def test_some_segments_may_be_streamed_before_the_first_that_is_judged() -> None:
    stage, counts = dataclasses.replace(GAME, extensions=0, penalty=0.0, unjudged=2), set()
    for step in range(12):
        judge, generator, rng = Judge(), drawn_generator(), numbers(3, step, 0)
        latents = toy_latents()
        adversarial_update(generator, judge, latents, stage, rng, 0, 1.0)  # type: ignore[arg-type]
        rng = numbers(3, step, 0)
        before = int(coin(rng, 3) * 3)
        counts.add(before)
        real = toy_latents().clips(2, 4, rng)
        rollout, shown = (
            ForcedRollout(generator, real.frames[:, 0], real.text, stage, rng),
            real.frames[:, :1],
        )
        with torch.no_grad():
            for _ in range(before):
                shown, real = rollout.extend(real.condition)[:, -1:], toy_latents().clips(2, 4, rng)
            made = rollout.extend(real.condition)
        frames = judge.batches[0][0]
        assert torch.equal(frames, torch.cat([torch.cat([shown, made], dim=1), real.frames]))
        assert generator.visual[0].qkv.weight.grad is not None
    assert counts == {0, 1, 2}


def test_the_gradients_of_all_segments_add_up() -> None:
    """Half the scale, half the gradient; one more segment, another gradient."""
    grads = []
    for scale, extensions in ((1.0, 1), (0.5, 1), (1.0, 0)):
        generator = drawn_generator()
        stage = dataclasses.replace(GAME, extensions=extensions)
        adversarial_update(
            generator, drawn_discriminator(), toy_latents(), stage, seeded(), 0, scale
        )
        grad = generator.visual_out.weight.grad
        assert grad is not None
        grads.append(grad)
    torch.testing.assert_close(grads[0], 2 * grads[1])
    assert not torch.allclose(grads[0], grads[2])


def test_during_the_head_start_the_generator_gets_no_gradient() -> None:
    generator, discriminator = drawn_generator(), drawn_discriminator()
    figures = adversarial_update(
        generator,
        discriminator,
        toy_latents(),
        dataclasses.replace(GAME, head_start=3),
        seeded(),
        2,
        1.0,
    )
    assert (
        all(p.grad is None for p in generator.parameters())
        and discriminator.logit.weight.grad is not None
    )
    assert all(math.isfinite(figures[name]) for name in PARTS)


def test_a_far_sink_is_only_further_away() -> None:
    generator, clips = drawn_generator(), clips_of(3)
    near, far = (
        ForcedRollout(
            generator,
            clips.frames[:, 0],
            clips.text,
            dataclasses.replace(GAME, far_sink=share),
            seeded(1),
        )
        for share in (0.0, 1.0)
    )
    assert not near.away.any() and bool((far.away > 0).all())
    with torch.no_grad():
        a, b = near.extend(clips.condition), far.extend(clips.condition)
    assert torch.equal(a[:, 0], b[:, 0]) and not torch.allclose(a[:, 1], b[:, 1])


def test_a_fresh_generator_learns_the_games_direction() -> None:
    """A few updates against a discriminator that likes large values make the generator's larger."""
    torch.manual_seed(0)
    generator, judge, latents = Generator(TINY), Judge(), toy_latents()
    stage = dataclasses.replace(GAME, extensions=0, penalty=0.0)
    adam = torch.optim.AdamW(generator.parameters(), lr=1e-2, betas=(0.0, 0.9))
    margins = []
    for step in range(5):
        margins.append(
            float(
                adversarial_update(generator, judge, latents, stage, seeded(0), step, 1.0)["margin"]
            )
        )  # type: ignore[arg-type]
        adam.step()
        adam.zero_grad()
    assert margins[-1] < margins[0] - 0.01


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_segment_starts_from_noise_of_the_profile_s_temperature(temperature: float) -> None:
    calm = TINY.replace(sampler=dataclasses.replace(TINY.sampler, temperature=temperature))
    clips = batch_of(blocks=2)
    found = []
    for profile in (TINY, calm):
        torch.manual_seed(0)
        rollout = ForcedRollout(
            Generator(profile), clips.previous[:, 0], clips.text, GAME, seeded(1)
        )
        rollout.streams.sample = lambda noise, *rest, made=found: made.append(noise) or noise  # type: ignore[method-assign]
        rollout.extend(clips.condition)
    assert len(found) == 4 and 0.8 < float(torch.stack(found[:2]).std()) < 1.2
    for plain, calmer in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(calmer, temperature * plain)
