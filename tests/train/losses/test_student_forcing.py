"""Test that training's rollout is inference's, and where its gradients go."""

import dataclasses
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from aapt_deploy.backends.torch_eager import EagerEngines
from aapt_deploy.models.aapt.camera import Pose, Velocity, condition_map
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.rope import temporal_rope
from aapt_deploy.models.checkpoint import Checkpoint
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.ops.block_causal_attention.torch_op import block_causal_attention
from aapt_deploy.profiles import load
from aapt_deploy.rollout.loop import Steering, rollout
from aapt_deploy.train.losses.student_forcing import Streams, forced_flow_loss
from tests.support import ROOT
from tests.support.toys import STAGE, batch_of, drawn_generator

TINY = load("tiny-cpu")
RING = Ring.of(TINY)
BLOCKS = RING.sink_blocks + 2 * RING.window_blocks + 2  # fills the ring and wraps it


# --- the op under training ---


def test_the_op_runs_wherever_training_does() -> None:
    """The dispatcher shows whether a rollout on CUDA tensors would find a kernel.

    No kernel for inference is loaded for it.
    """
    name = "torch._C._dispatch_has_computed_kernel_for_dispatch_key"
    asked = f"{name}('aapt::block_causal_attention', 'CUDA')"
    code = f"import torch, aapt_deploy.train.losses.student_forcing\nprint({asked})"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert found == "True\n"


@pytest.mark.parametrize("cached", [0, 3, 5])
def test_the_gradient_of_the_op_is_that_of_its_arithmetic(cached: int) -> None:
    rng = torch.Generator().manual_seed(cached)
    q, k, v = (
        torch.randn(2, 3, 2, 4, dtype=torch.float64, generator=rng, requires_grad=True)
        for _ in range(3)
    )
    caches = [
        torch.randn(2, 5, 2, 4, dtype=torch.float64, generator=rng, requires_grad=True)
        for _ in range(2)
    ]
    length = torch.tensor([cached], dtype=torch.int32)

    def op(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return block_causal_attention(*tensors, length)

    assert torch.autograd.gradcheck(op, (q, k, v, *caches))
    op(q, k, v, *caches)[0].square().sum().backward()
    for cache in caches:
        assert cache.grad is not None
        assert torch.equal(
            cache.grad[:, cached:], torch.zeros(2, 5 - cached, 2, 4, dtype=torch.float64)
        )
        assert bool(cache.grad[:, :cached].all())


# --- the rollout ---


def test_the_rollout_under_training_equals_that_of_inference_bit_for_bit(
    loaded: Checkpoint,
) -> None:
    """Same image, noise, camera and prompt in `rollout.loop` and in Streams."""
    profile, seed, velocity, text = (
        loaded.profile,
        3,
        Velocity(forward=20.0, yaw=0.3),
        np.array([[1, 5, 10, 15]]),
    )
    engines = EagerEngines(loaded, 1, "fp32")
    image = next(iter(loaded.start_frames.values())).image.numpy()
    inference = [
        frames.copy()
        for frames in islice(
            rollout(engines, profile, image, lambda block: Steering(velocity, text), seed),
            1 + BLOCKS,
        )
    ]

    decoder, rng, pose = engines["decoder"], np.random.default_rng(seed), Pose()
    decoder.reset()
    previous = torch.from_numpy(engines["encoder"].run(image=image)["latent"].copy())
    frames = [decoder.run(latent=previous.numpy())["frames"][-1:].copy()]
    with torch.no_grad():
        streams = Streams(loaded.generator, torch.from_numpy(text))
        for block in range(BLOCKS):
            before, pose = (
                pose,
                pose.moved(velocity, profile.video.temporal_stride / profile.video.fps),
            )
            noise = torch.from_numpy(
                np.float32(profile.sampler.temperature)
                * rng.standard_normal(previous.shape, np.float32)
            )
            condition, rope_time = (
                torch.from_numpy(x)
                for x in (condition_map(profile, before, pose), temporal_rope(profile, block)[None])
            )
            previous = streams.sample(
                noise, previous, condition, rope_time, profile.sampler.timesteps
            )
            frames.append(decoder.run(latent=previous.numpy())["frames"].copy())
    assert len(frames) == len(inference)
    assert all(np.array_equal(a, b) for a, b in zip(frames, inference, strict=True))
    assert len({f[-1].tobytes() for f in inference}) == len(inference)  # it moves


def test_streams_of_a_batch_do_not_meet() -> None:
    generator, batch = drawn_generator(), batch_of(blocks=3, batch=2)

    def run(rows: slice) -> Tensor:
        streams, x = Streams(generator, batch.text[rows]), batch.previous[rows, 0]
        for j in range(3):
            x = streams.sample(
                batch.clean[rows, j],
                x,
                batch.condition[rows, j],
                batch.rope_time[rows, j],
                (1.0, 0.5),
            )
        return x

    with torch.no_grad():
        together, first, second = run(slice(None)), run(slice(0, 1)), run(slice(1, 2))
    torch.testing.assert_close(together, torch.cat([first, second]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, second, atol=0.1)


def test_gradients_flow_through_the_cache() -> None:
    """The second block's loss reaches the first block's input by keys and values alone."""
    generator, batch = drawn_generator(), batch_of(blocks=2, batch=1)
    noise = batch.clean[:, 0].clone().requires_grad_()
    streams = Streams(generator, batch.text)
    streams.sample(
        noise, batch.previous[:, 0], batch.condition[:, 0], batch.rope_time[:, 0], (1.0,)
    )
    clean, _, _ = streams.step(
        batch.clean[:, 1],
        batch.previous[:, 1],
        batch.condition[:, 1],
        torch.ones(1),
        batch.rope_time[:, 1],
    )
    clean.square().sum().backward()
    assert noise.grad is not None and float(noise.grad.abs().max()) > 0


# --- the loss ---


class Recorder(Generator):
    """A generator that remembers what its passes were given."""

    def __init__(self) -> None:
        super().__init__(TINY)
        self.passes: list[tuple[bool, tuple[Tensor, ...], int]] = []

    def step(self, noisy, previous, condition, t, *rest):  # type: ignore[no-untyped-def]
        given = (noisy.detach(), previous, condition, t)
        self.passes.append((torch.is_grad_enabled(), given, int(rest[-1])))  # the cache's length
        return super().step(noisy, previous, condition, t, *rest)


def test_the_forced_loss_asks_for_the_truth_and_shows_its_own_past() -> None:
    torch.manual_seed(0)
    generator, batch = Recorder(), batch_of(blocks=4)
    generator.load_state_dict(drawn_generator().state_dict())
    loss = forced_flow_loss(generator, batch, STAGE, torch.Generator().manual_seed(0))
    trained = [p for p in generator.passes if p[0]]
    sampled = [p for p in generator.passes if not p[0]]
    passes = len(TINY.sampler.timesteps)
    assert (len(trained), len(sampled)) == (4, 4 * passes)
    assert [p[2] for p in trained] == [RING.place(j).cache_len for j in range(4)]
    for j, (_, (_, previous, condition, _), _) in enumerate(trained):
        assert torch.equal(condition, batch.condition[:, j])
        assert not previous.requires_grad
        assert torch.equal(previous, batch.previous[:, j]) == (
            j < 2
        )  # later ones are the generator's own
    loss.backward()
    assert all(
        p.grad is not None and bool(p.grad.isfinite().all())
        for name, p in generator.named_parameters()
        if "norm_q" not in name
    )


def test_the_first_block_of_the_loss_in_closed_form() -> None:
    """Heads at zero predict the posterior mean, so times and noise fix the loss."""
    torch.manual_seed(0)
    generator, batch = Generator(TINY), batch_of(blocks=1)
    generator.step_spread.fill_(0.7)
    loss = forced_flow_loss(generator, batch, STAGE, torch.Generator().manual_seed(1)).item()
    rng, total = torch.Generator().manual_seed(1), 0.0
    times, noise = torch.rand(2, generator=rng), torch.randn(batch.clean[:, 0].shape, generator=rng)
    for stream, u in enumerate(times.tolist()):
        t = max(0.05, STAGE.shift * u / (1 + (STAGE.shift - 1) * u))
        clean, previous = batch.clean[stream, 0].double(), batch.previous[stream, 0].double()
        precision = (
            1 / 0.7**2 + (1 - t) ** 2 / t**2
        )  # of a Gaussian prior and one Gaussian measurement
        mean = (
            previous / 0.7**2 + (1 - t) * ((1 - t) * clean + t * noise[stream].double()) / t**2
        ) / precision
        total += ((mean - clean) ** 2 * precision).mean().item() / 2
    assert loss == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_forced_rollout_starts_from_noise_of_the_profile_s_temperature(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = TINY.replace(sampler=dataclasses.replace(TINY.sampler, temperature=temperature))
    noises: dict[float, list[Tensor]] = {}
    for profile in (TINY, calm):
        torch.manual_seed(0)
        generator, found = Generator(profile), noises.setdefault(profile.sampler.temperature, [])

        def sample(
            streams: Streams, noise: Tensor, *arguments: object, found: list[Tensor] = found
        ) -> Tensor:
            found.append(noise)
            return noise

        monkeypatch.setattr(Streams, "sample", sample)
        forced_flow_loss(generator, batch_of(blocks=2), STAGE, torch.Generator().manual_seed(1))
    assert len(noises[1.0]) == len(noises[temperature]) == 2
    for plain, calmer in zip(noises[1.0], noises[temperature], strict=True):
        assert 0.8 < float(plain.std()) < 1.2
        torch.testing.assert_close(calmer, temperature * plain)
