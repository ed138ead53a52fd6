"""Check the loop's calls of its engines, and the sampler against a closed form."""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from aapt_deploy.models.aapt.camera import CRUISE, Pose, Velocity, condition_map
from aapt_deploy.models.aapt.rope import temporal_rope
from aapt_deploy.models.sampler import denoise
from aapt_deploy.profiles import Profile, Sampler
from aapt_deploy.rollout.loop import Steering, one_ahead, rollout
from tests.support.fake_engines import CLEAN, FakeEngines

LEFT = Velocity(forward=10.0, yaw=-0.2)
DAY, NIGHT = np.array([[0, 5, 10, 15]]), np.array([[1, 5, 10, 15]])


def straight(block: int) -> Steering:
    return Steering(CRUISE, DAY)


def run(
    profile: Profile, blocks: int, steer: Callable[[int], Steering] = straight, seed: int = 0
) -> tuple[FakeEngines, list[np.ndarray]]:
    fake = FakeEngines(profile)
    image = np.zeros((profile.video.height, profile.video.width, 3), np.uint8)
    return fake, list(itertools.islice(rollout(fake, profile, image, steer, seed), 1 + blocks))


def inputs(fake: FakeEngines, graph: str) -> list[dict[str, Any]]:
    return [arguments for name, call, arguments in fake.calls if (name, call) == (graph, "run")]


def with_steps(profile: Profile, *timesteps: float) -> Profile:
    return profile.replace(sampler=Sampler(timesteps))


def test_the_order_of_calls(tiny: Profile) -> None:
    fake, _ = run(tiny, 2)
    order = [f"{graph}.{call}" for graph, call, _ in fake.calls]
    start = ["generator.reset", "decoder.reset", "encoder.run", "decoder.run"]
    block = ["generator.run"] * len(tiny.sampler.timesteps) + ["generator.commit", "decoder.run"]
    assert order == [*start, "prompt.run", "generator.reset", *block, *block]
    assert fake.calls[0][2] == fake.calls[1][2] == {}
    assert set(fake.calls[5][2]) >= {"text_k.00"}  # the second reset sets the text


@pytest.mark.parametrize("timesteps", [(1.0,), (1.0, 0.5), (1.0, 0.75, 0.5, 0.25)])
def test_every_pass_has_its_time_and_block_and_every_block_is_committed_once(
    tiny: Profile, timesteps: tuple[float, ...]
) -> None:
    fake, _ = run(with_steps(tiny, *timesteps), 5)
    passes = inputs(fake, "generator")
    assert [p["block"] for p in passes] == [block for block in range(5) for _ in timesteps]
    assert [p["time"].tolist() for p in passes] == [[t] for _ in range(5) for t in timesteps]
    committed = [arguments["block"] for _, call, arguments in fake.calls if call == "commit"]
    assert committed == list(range(5))
    for p in passes:
        assert np.array_equal(p["rope_time"], temporal_rope(tiny, p["block"])[None])


@pytest.mark.parametrize("timesteps", [(1.0,), (1.0, 0.5), (1.0, 0.75, 0.5, 0.25)])
def test_noise_falls_along_a_straight_path(tiny: Profile, timesteps: tuple[float, ...]) -> None:
    """With a constant result c, the input at time t is c + (noise - c) t. A block ends on c."""
    fake, _ = run(with_steps(tiny, *timesteps), 3, seed=7)
    passes = inputs(fake, "generator")
    shape = np.shape(passes[0]["noisy"])
    rng = np.random.default_rng(7)
    for block in range(3):
        noise = rng.standard_normal(shape, np.float32)
        own = passes[block * len(timesteps) : (block + 1) * len(timesteps)]
        for p, t in zip(own, timesteps, strict=True):
            wanted = CLEAN + (noise - CLEAN) * t
            np.testing.assert_allclose(p["noisy"], wanted, rtol=0, atol=1e-6)
    for shown in inputs(fake, "decoder")[1:]:
        np.testing.assert_allclose(np.asarray(shown["latent"]), CLEAN, rtol=0, atol=1e-6)


def gaussian_error(timesteps: Iterable[float]) -> float:
    """Return the error of `denoise` for Gaussian data of deviation s = 0.3.

    The flow is known: x at t is x at 1 times sqrt((1-t)^2 s^2 + t^2).
    """
    return abs(denoise(gaussian_clean, 1.0, list(timesteps)) - 0.3)


def gaussian_clean(x: float, t: float) -> float:
    return x * (1 - t) * 0.3**2 / ((1 - t) ** 2 * 0.3**2 + t * t)


def test_half_the_step_has_a_quarter_of_the_error() -> None:
    grids = (np.linspace(1, 0, n, endpoint=False) for n in (32, 64, 128))
    coarse, fine, finest = map(gaussian_error, grids)
    assert coarse / fine == pytest.approx(4, rel=0.2)
    assert fine / finest == pytest.approx(4, rel=0.1)


def test_the_demos_five_passes_are_as_good_as_eleven_straight_ones() -> None:
    x, euler = 1.0, np.array([*np.linspace(1, 0.1, 10), 0.05, 0.0])
    for t, t_next in itertools.pairwise(euler):
        clean = gaussian_clean(x, t)
        x = clean + (x - clean) * t_next / t
    assert gaussian_error([1.0, 0.75, 0.5, 0.25, 0.1]) < abs(x - 0.3)


def test_two_passes_by_hand() -> None:
    """From 1 with results 0.2 and 0.1: straight to 0.6 at t = 0.5, with speeds 0.8 and 1.0."""
    results = iter([0.2, 0.1])
    x = denoise(lambda x, t: next(results), 1.0, (1.0, 0.5))
    assert x == pytest.approx(0.6 - 0.5 * (1.0 + (1.0 - 0.8) / 2))


def test_a_single_pass_ends_on_its_answer() -> None:
    answer = np.float32([0.1, -3.7, 1e-7])
    assert np.array_equal(denoise(lambda x, t: answer, np.float32([5, 6, 7]), [1.0]), answer)


def test_a_block_starts_from_the_one_before(tiny: Profile) -> None:
    """The start image's latent first, then each block's result. The fake counts its results."""

    class Counting(FakeEngines):
        def __getitem__(self, graph: str) -> "Counting":
            return Counting(self.profile, graph, self.calls)

        def run(self, **given: np.ndarray | int) -> dict[str, np.ndarray]:
            out = super().run(**given)
            return out | {"clean": out["clean"] + len(inputs(self, "generator"))}

    fake = Counting(with_steps(tiny, 1.0))
    image = np.zeros((tiny.video.height, tiny.video.width, 3), np.uint8)
    mute = lambda block: Steering(CRUISE, None)
    list(itertools.islice(rollout(fake, fake.profile, image, mute, 0), 4))
    results = [CLEAN, CLEAN + 1, CLEAN + 2, CLEAN + 3]
    assert [np.ravel(p["previous"])[0] for p in inputs(fake, "generator")] == results[:3]
    assert [np.ravel(p["latent"])[0] for p in inputs(fake, "decoder")] == results


def test_first_one_frame_then_four_and_each_yield_is_its_own_memory(tiny: Profile) -> None:
    _, frames = run(tiny, 3)
    assert [len(f) for f in frames] == [1, 4, 4, 4]
    assert frames[0].max() == 3  # the last of the decoder's four: the first three repeat it
    assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(frames, 2))


def test_the_prompt_is_encoded_when_it_changes_and_only_then(tiny: Profile) -> None:
    fake, _ = run(tiny, 6, lambda block: Steering(CRUISE, (NIGHT if block >= 3 else DAY).copy()))
    texts = [p["text"].tolist() for p in inputs(fake, "prompt")]
    assert texts == [DAY.tolist(), NIGHT.tolist()]
    generator_calls = [call for graph, call, _ in fake.calls if graph == "generator"]
    assert generator_calls.count("reset") == 3
    second = [i for i, call in enumerate(generator_calls) if call == "reset"][2]
    assert generator_calls[:second].count("commit") == 3  # before block 3, the cache keeps its past


def test_a_generator_without_text_is_asked_for_no_prompt(tiny: Profile) -> None:
    fake, _ = run(tiny, 3, lambda block: Steering(CRUISE, None))
    assert not inputs(fake, "prompt")


def test_the_camera_moves_by_what_steer_says_once_per_block(tiny: Profile) -> None:
    asked: list[int] = []

    def steer(block: int) -> Steering:
        asked.append(block)
        return Steering(LEFT if block % 2 else CRUISE, None)

    fake, _ = run(tiny, 4, steer)
    assert asked == [0, 1, 2, 3]
    pose = Pose()
    passes = inputs(fake, "generator")[:: len(tiny.sampler.timesteps)]
    for block, p in enumerate(passes):
        after = pose.moved(LEFT if block % 2 else CRUISE, 4 / 24)
        assert np.array_equal(np.asarray(p["condition"]), condition_map(tiny, pose, after))
        pose = after


def test_steer_is_asked_just_before_its_block_and_not_earlier(tiny: Profile) -> None:
    asked: list[int] = []

    def steer(block: int) -> Steering:
        asked.append(block)
        return straight(block)

    image = np.zeros((32, 64, 3), np.uint8)
    frames = rollout(FakeEngines(tiny), tiny, image, steer, 0)
    next(frames)
    assert asked == []
    next(frames)
    assert asked == [0]


def test_the_seed_is_all_there_is_to_chance(tiny: Profile) -> None:
    fakes = [run(tiny, 3, seed=seed)[0] for seed in (1, 1, 2)]
    noises = [[p["noisy"] for p in inputs(fake, "generator")] for fake in fakes]
    assert all(np.array_equal(a, b) for a, b in zip(noises[0], noises[1], strict=True))
    assert not np.array_equal(noises[0][0], noises[2][0])
    assert not np.array_equal(noises[0][0], noises[0][2])  # and every block has noise of its own


# --- one block ahead ---


def test_overlapped_engines_make_the_same_frames_one_block_ahead(tiny: Profile) -> None:
    class Beside(FakeEngines):
        overlapped = True

    asked: list[int] = []

    def steer(block: int) -> Steering:
        asked.append(block)
        return Steering(LEFT, DAY)

    image = np.zeros((tiny.video.height, tiny.video.width, 3), np.uint8)
    frames = rollout(Beside(tiny), tiny, image, steer, seed=1)
    made = [next(frames)]
    assert asked == []
    made += [next(frames) for _ in range(3)]
    frames.close()  # waits for the thread
    assert asked == [0, 1, 2, 3]
    _, wanted = run(tiny, 3, lambda block: Steering(LEFT, DAY), seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(made, wanted, strict=True))


def test_noise_is_drawn_in_the_order_of_blocks_while_the_block_before_runs(
    tiny: Profile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true, drawn = np.random.default_rng, threading.Semaphore(0)

    class Drawn:
        def __init__(self, seed: int) -> None:
            self.rng = true(seed)
            self.bit_generator = self.rng.bit_generator

        def standard_normal(self, *given: object) -> np.ndarray:
            found = self.rng.standard_normal(*given)  # type: ignore[call-overload]
            drawn.release()
            return found

    class Waiting(FakeEngines):
        def __getitem__(self, graph: str) -> "Waiting":
            return Waiting(self.profile, graph, self.calls)

        def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
            if self.graph == "generator":  # goes on when the noise of the block behind is there
                for _ in range(2 if inputs["block"] == 0 else 1):
                    assert drawn.acquire(timeout=20), "no noise is drawn while a block runs"
            return super().run(**inputs)

    monkeypatch.setattr(np.random, "default_rng", Drawn)
    profile, rng = with_steps(tiny, 1.0), true(7)
    fake, size = Waiting(profile), (profile.video.height, profile.video.width, 3)
    image = np.zeros(size, np.uint8)
    frames = rollout(fake, profile, image, lambda block: Steering(CRUISE, DAY), 7)
    next(frames)
    for block in range(4):
        next(frames)
        noisy = np.asarray(inputs(fake, "generator")[block]["noisy"])
        wanted = rng.standard_normal(noisy.shape, np.float32)
        np.testing.assert_array_equal(noisy, np.float32(profile.sampler.temperature) * wanted)


def test_what_goes_wrong_in_the_thread_is_raised_where_the_item_is_asked_for() -> None:
    def items() -> Iterator[np.ndarray]:
        yield np.zeros(1)
        raise ValueError("broken")

    ahead = one_ahead(items())
    assert next(ahead).shape == (1,)
    with pytest.raises(ValueError, match="broken"):
        next(ahead)


# --- samplers that no preset has ---


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_a_block_starts_from_noise_of_the_profile_s_temperature(
    tiny: Profile, temperature: float
) -> None:
    fake, _ = run(tiny.replace(sampler=Sampler((1.0, 0.5), temperature)), 2, seed=7)
    rng = np.random.default_rng(7)
    for first in inputs(fake, "generator")[::2]:
        noise = rng.standard_normal(np.shape(first["noisy"]), np.float32)
        assert np.array_equal(np.asarray(first["noisy"]), np.float32(temperature) * noise)


@pytest.mark.parametrize(
    "timesteps", [(1.0, 0.75, 0.6), (1.0, 0.9, 0.4, 0.3), (1.0, 0.75, 0.5, 0.25)]
)
def test_a_path_that_bends_evenly_is_followed_exactly_whatever_the_steps(
    timesteps: tuple[float, ...],
) -> None:
    """Along x' = a + b t the first step is straight, and every later one exact.

    The path is a parabola, and a later step fits one.
    """
    a, b, x = 0.3, 2.0, 1.0
    speed = lambda t: a + b * t
    travelled = lambda t: a * t + b * t * t / 2
    second = timesteps[1]
    wanted = x + speed(1.0) * (second - 1.0) - travelled(second)
    assert denoise(lambda x, t: x - t * speed(t), x, timesteps) == pytest.approx(wanted, abs=1e-12)


def test_the_sampler_asks_at_the_point_where_the_last_step_ended() -> None:
    """Three uneven steps by hand: speeds 0.8, 1.0 and 0.5 from 1."""
    asked: list[tuple[float, float]] = []
    speeds = iter([0.8, 1.0, 0.5])

    def clean(x: float, t: float) -> float:
        asked.append((x, t))
        return x - t * next(speeds)

    end = denoise(clean, 1.0, (1.0, 0.75, 0.6))
    second = 1.0 - 0.25 * 0.8
    third = second - 0.15 * 1.0 + (1.0 - 0.8) * 0.15**2 / (2 * -0.25)
    last = third - 0.6 * 0.5 + (0.5 - 1.0) * 0.6**2 / (2 * -0.15)
    assert [t for _, t in asked] == [1.0, 0.75, 0.6]
    assert [x for x, _ in asked] == pytest.approx([1.0, second, third])
    assert end == pytest.approx(last)
