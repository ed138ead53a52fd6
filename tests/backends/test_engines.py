"""Engines: every backend gives the frames of the torch modules.

The ring wraps, prompts change, and caches stay where they are.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from aapt_deploy.backends import build
from aapt_deploy.backends.ort import engine
from aapt_deploy.backends.ort.engine import OrtEngine, OrtEngines, OrtGenerator, Threads
from aapt_deploy.backends.table import precision_of
from aapt_deploy.backends.torch_cuda.engine import GpuEngines
from aapt_deploy.backends.torch_eager import EagerEngines, EagerGenerator
from aapt_deploy.backends.trial import BuildOptions
from aapt_deploy.backends.trt.engine import TrtEngines
from aapt_deploy.bundle import bundle as bundles
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.bundle.signature import layer_names
from aapt_deploy.errors import BundleError, MachineError, UsageError
from aapt_deploy.models.aapt.camera import Pose, condition_map
from aapt_deploy.models.aapt.prompts import parse, token_ids
from aapt_deploy.models.aapt.rope import temporal_rope
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.models.aapt.vae import from_pixels, to_pixels
from aapt_deploy.models.checkpoint import Checkpoint
from aapt_deploy.models.sampler import denoise
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.engine import Engines
from aapt_deploy.rollout.loop import Rollout, Steering, rollout
from aapt_deploy.rollout.starts import start
from tests.support.bundles import rewrite_manifest
from tests.support.commands import Ran
from tests.support.opening import open_engines, silent
from tests.support.tiny import frames_of, turning

BLOCKS = 14  # the window holds 3, the ring wraps at 4 and 5
DAY, NIGHT = (token_ids(parse(text)) for text in ("desert at noon", "islands at night, foggy"))
BACKENDS = ("onnxruntime", "torch")


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return Bundle.open(bundle)


@pytest.fixture(scope="module")
def fp32(opened: Bundle) -> Iterator[OrtEngines]:
    engines = open_engines(opened, "onnxruntime", "fp32")
    assert isinstance(engines, OrtEngines)
    yield engines
    engines.close()


@pytest.fixture(scope="module")
def eager(opened: Bundle) -> Engines:
    return open_engines(opened, "torch", "fp32")


def of(backend: str, fp32: Engines, eager: Engines) -> Engines:
    return {"onnxruntime": fp32, "torch": eager}[backend]


def worst(a: list[np.ndarray], b: list[np.ndarray]) -> tuple[int, float]:
    """Largest difference in grey levels, and the share of values that differ at all."""
    one, two = (np.concatenate(frames).astype(np.int16) for frames in (a, b))
    return int(np.abs(one - two).max()), float((one != two).mean())


def by_forward(loaded: Checkpoint, opened: Bundle, blocks: int, seed: int) -> list[np.ndarray]:
    """The same rollout without any cache.

    `Generator.forward` runs over the whole history under its block-causal mask, for every pass of
    every block.
    """
    profile, generator, vae = loaded.profile, loaded.generator, loaded.vae
    begin, rng, pose = start(opened, "dunes", None), np.random.default_rng(seed), Pose()
    assert begin.text is not None
    text, seconds = torch.from_numpy(begin.text), profile.video.temporal_stride / profile.video.fps
    with torch.inference_mode():
        latents = [
            vae.encode(from_pixels(torch.from_numpy(begin.image))[None, None])[:, 0]
        ]  # [1, C, h, w] each
        noisy, conditions, times = [], [], []  # as the last pass over each block saw them
        for block in range(blocks):
            before, pose = pose, pose.moved(turning(block), seconds)
            conditions.append(torch.from_numpy(condition_map(profile, before, pose)))
            x = torch.from_numpy(rng.standard_normal(latents[0].shape, np.float32))
            rope = torch.from_numpy(
                np.stack([temporal_rope(profile, b) for b in range(block + 1)])
            )[None]  # [1, n, 2, pairs]
            passes: list[torch.Tensor] = []

            def clean(x: torch.Tensor, t: float) -> torch.Tensor:
                passes.append(x)  # noqa: B023  denoise calls it in this turn of the loop only
                stacked = [
                    torch.stack(parts, dim=1) for parts in ([*noisy, x], latents, conditions)
                ]  # [1, n, C, h, w]
                at = torch.tensor([[*times, t]])
                return generator(*stacked, at, text, rope)[:, -1]  # noqa: B023  as above

            latents.append(denoise(clean, x, profile.sampler.timesteps))
            noisy.append(passes[-1])
            times.append(profile.sampler.timesteps[-1])
        video = [vae.decode(torch.stack(latents, dim=1))]
    frames = to_pixels(video[0][0]).numpy()  # [1 + 4 n, H, W, 3]
    return [frames[:1], *np.split(frames[1:], blocks)]


def test_rollouts_are_those_of_the_training_forward(
    loaded: Checkpoint, opened: Bundle, fp32: Engines, eager: Engines
) -> None:
    """Largest difference: one grey level, where a value lies on the edge of two.

    That is at most one value in 500.
    """
    wanted = by_forward(loaded, opened, BLOCKS, seed=3)
    assert np.concatenate(wanted[1:]).std() > 10, "a flat picture proves nothing"
    for engines in (fp32, eager):
        highest, share = worst(frames_of(engines, opened, BLOCKS, seed=3), wanted)
        assert highest <= 1
        assert share < 1 / 500


def test_onnxruntime_equals_torch(opened: Bundle, fp32: Engines, eager: Engines) -> None:
    highest, share = worst(frames_of(fp32, opened, BLOCKS), frames_of(eager, opened, BLOCKS))
    assert highest <= 1
    assert share < 1 / 500
    assert len(opened.profile.sampler.timesteps) > 1, (
        "the profile must take several passes per block"
    )


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    opened: Bundle, precision: str
) -> None:
    runs = []
    for seed in (5, 5, 6):
        engines = open_engines(opened, "onnxruntime", precision)
        runs.append(frames_of(engines, opened, 6, seed))
        engines.close()
    assert worst(runs[0], runs[1]) == (0, 0.0)
    assert worst(runs[0][1:], runs[2][1:])[1] > 0.1


def test_int8_is_close_to_fp32_but_not_fp32(opened: Bundle, fp32: Engines) -> None:
    frames = frames_of(open_engines(opened, "onnxruntime", "int8"), opened, 6)
    exact = frames_of(fp32, opened, 6)
    assert worst(frames, exact)[1] > 0
    assert np.abs(np.concatenate(frames).astype(float) - np.concatenate(exact)).mean() < 16


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rollout_begins_anew_on_used_engines(
    opened: Bundle, fp32: Engines, eager: Engines, backend: str
) -> None:
    engines = of(backend, fp32, eager)
    first = frames_of(engines, opened, 7)
    frames_of(engines, opened, 3, seed=9, text=lambda block: NIGHT)
    assert worst(frames_of(engines, opened, 7), first) == (0, 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_new_prompt_changes_later_frames_only(
    opened: Bundle, fp32: Engines, eager: Engines, backend: str
) -> None:
    engines = of(backend, fp32, eager)
    stay = frames_of(engines, opened, 8, text=lambda block: DAY)
    turn = frames_of(engines, opened, 8, text=lambda block: NIGHT if block >= 5 else DAY)
    for index, (a, b) in enumerate(
        zip(stay, turn, strict=True)
    ):  # 0 is the start image, block n is at n + 1
        assert np.array_equal(a, b) is (index < 6), index


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_new_prompt_keeps_the_past(
    opened: Bundle, fp32: Engines, eager: Engines, backend: str
) -> None:
    """Only the text rows of the caches change.

    With the old prompt back, the next pass is as if nothing had been.
    """
    engines, profile = of(backend, fp32, eager), opened.profile
    frames_of(engines, opened, 6, text=lambda block: DAY)
    generator = engines["generator"]
    inputs = pass_inputs(profile, 6)
    before = generator.run(block=6, **inputs)["clean"].copy()
    generator.reset(**engines["prompt"].run(text=NIGHT))
    night = generator.run(block=6, **inputs)["clean"].copy()
    generator.reset(**engines["prompt"].run(text=DAY))
    assert not np.array_equal(night, before)
    assert np.array_equal(generator.run(block=6, **inputs)["clean"], before)


def pass_inputs(profile: Profile, block: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    latent = (1, profile.video.latent_channels, profile.latent_height, profile.latent_width)
    condition = condition_map(profile, Pose(), Pose().moved(turning(block), 1 / 6))
    noisy, previous = (rng.standard_normal(latent, np.float32) for _ in range(2))
    return {
        "noisy": noisy, "previous": previous, "condition": condition,
        "time": np.ones(1, np.float32),
        "rope_time": temporal_rope(profile, block)[None],
    }  # fmt: skip


# --- caches ---


def caches(generator: object) -> dict[str, np.ndarray]:
    assert isinstance(generator, OrtGenerator | EagerGenerator)
    return {name: np.asarray(cache) for name, cache in generator.caches.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_caches_stay_in_place_and_only_the_blocks_own_rows_change(
    opened: Bundle, fp32: Engines, eager: Engines, backend: str
) -> None:
    engines, profile = of(backend, fp32, eager), opened.profile
    generator = engines["generator"]
    generator.reset()
    generator.reset(**engines["prompt"].run(text=DAY))
    ring = Ring.of(profile, in_place=backend == "onnxruntime")
    held = caches(generator)
    assert set(held) == {*layer_names("k_cache", profile), *layer_names("v_cache", profile)}
    addresses = {name: array.__array_interface__["data"] for name, array in held.items()}
    for block in range(2 * ring.ring_blocks + 3):
        before = {name: array.copy() for name, array in held.items()}
        for seed in (2 * block, 2 * block + 1):
            generator.run(block=block, **pass_inputs(profile, block, seed))
        generator.commit(block)
        slot = ring.place(block).slot
        own = range(slot, slot + profile.frame_tokens)
        for name, array in caches(generator).items():
            assert array.__array_interface__["data"] == addresses[name]
            changed = np.flatnonzero((array != before[name]).any(axis=(0, 2, 3)))
            assert set(changed) == set(own), f"{name}, {block=}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pass_sees_what_the_ring_says_and_nothing_else(
    opened: Bundle, fp32: Engines, eager: Engines, backend: str
) -> None:
    """What lies outside a block's sight may be anything; what lies inside changes its output."""
    engines, profile = of(backend, fp32, eager), opened.profile
    generator, ring = engines["generator"], Ring.of(profile, in_place=backend == "onnxruntime")
    tokens = profile.frame_tokens
    for block in (0, 1, 2, 5, 9):
        inputs = pass_inputs(profile, block)
        held = {
            ring.place(past).slot: past for past in range(block)
        }  # the newest block of each slot
        if ring.in_place:
            held.pop(ring.place(block).slot, None)  # overwritten before it is read
        generator.reset()
        calm = generator.run(block=block, **inputs)["clean"].copy()
        for slot in range(profile.text.tokens, ring.tokens, tokens):
            generator.reset()
            for cache in generator.caches.values():  # type: ignore[attr-defined]
                cache[:, slot : slot + tokens] = 1e6
            disturbed = not np.array_equal(generator.run(block=block, **inputs)["clean"], calm)
            assert disturbed is (held.get(slot) in ring.visible(block)), f"{block=} {slot=}"
    generator.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_generators_commit(
    opened: Bundle, fp32: Engines, eager: Engines, backend: str
) -> None:
    engines = of(backend, fp32, eager)
    assert engines.generator is engines["generator"]
    committing = [
        name
        for name in ("encoder", "prompt", "generator", "decoder")
        if hasattr(engines[name], "commit")
    ]
    assert committing == ["generator"]


def test_decoder_memory_alternates_between_two_fixed_sets(
    opened: Bundle, fp32: OrtEngines, eager: Engines
) -> None:
    decoder, profile = fp32["decoder"], opened.profile
    assert isinstance(decoder, OrtEngine)
    addresses = [[a.ctypes.data for a in held.values()] for held in decoder.state]
    assert not set(addresses[0]) & set(addresses[1])
    decoder.reset()
    eager["decoder"].reset()
    rng, shape = np.random.default_rng(0), signatures(profile)["decoder"].inputs[0].shape
    for _ in range(5):
        latent = rng.standard_normal(shape, np.float32)
        got, wanted = (
            engine.run(latent=latent)["frames"] for engine in (decoder, eager["decoder"])
        )
        assert np.abs(got.astype(int) - wanted).max() <= 1
    assert [[a.ctypes.data for a in held.values()] for held in decoder.state] == addresses


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts memory through /proc")
def test_memory_does_not_grow_with_the_stream(opened: Bundle, fp32: Engines) -> None:
    begin = start(opened, "dunes", None)
    frames = rollout(
        fp32,
        opened.profile,
        begin.image,
        lambda block: Steering(turning(block), DAY if block % 50 else NIGHT),
        0,
    )
    for _ in range(60):
        next(frames)
    before, began = rss_bytes(), time.perf_counter()
    for _ in range(500):
        last = next(frames)
    assert rss_bytes() - before < 8_000_000
    assert last.std() > 5
    assert time.perf_counter() - began < 60


# --- choosing one ---


def test_the_precision_is_the_one_asked_for_else_the_profiles_else_the_fastest(
    opened: Bundle, copied: Path
) -> None:
    assert precision_of(opened, "onnxruntime", "int8") == "int8"
    assert precision_of(opened, "onnxruntime", None) == opened.profile.precision.weights == "fp32"
    other = Bundle.open(copied)
    other.engines["onnxruntime-bf16"] = other.engines.pop("onnxruntime-fp32") | {
        "precision": "bf16",
        "step_ms": 2.0,
    }
    other.engines["onnxruntime-int8"]["step_ms"] = 1.0
    assert precision_of(other, "onnxruntime", None) == "int8"


@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": 0},
        {"step_ms": 10**400},
        {"step_ms": -1.0},
        {"step_ms": float("nan")},
        {"precision": "int4"},
    ],
    ids=str,
)
def test_what_a_manifest_says_of_an_engine_has_to_make_sense(
    wrong: dict[str, object], copied: Path
) -> None:
    """Somebody may have written it by hand, and sealed it."""
    other = Bundle.open(copied)
    other.engines["onnxruntime-int8"] |= wrong
    with pytest.raises(
        BundleError, match="says of engine onnxruntime-int8 makes no sense"
    ) as caught:
        precision_of(other, "onnxruntime", None)
    assert caught.value.hint.endswith(f"aapt build-engine {copied} --backend onnxruntime")


def test_what_was_not_built_is_named_with_the_command_that_builds_it(
    opened: Bundle, copied: Path
) -> None:
    with pytest.raises(UsageError, match="backend 'tensorflow' does not exist"):
        open_engines(opened, "tensorflow")
    with pytest.raises(
        UsageError, match="precision 'fp16' does not exist for onnxruntime"
    ) as unknown:
        open_engines(opened, "onnxruntime", "fp16")
    assert unknown.value.hint == "precisions: fp32, int8, fp8"
    with pytest.raises(BundleError, match="no onnxruntime engine in fp8") as caught:
        open_engines(opened, "onnxruntime", "fp8")
    assert caught.value.hint == (
        "built: fp32, int8; export another bundle for it with: "
        "aapt export CKPT -o OTHER --precision fp8"
    )
    other = Bundle.open(copied)
    del other.engines["torch-fp32"]
    with pytest.raises(BundleError, match="no torch engine") as caught:
        open_engines(other, "torch")
    assert f"aapt build-engine {copied} --backend torch" in caught.value.hint


@pytest.mark.parametrize(
    ("backend", "precision"), [("torch", "bf16"), ("torch", None), ("onnxruntime", "int8")]
)
def test_the_command_in_the_hint_builds_the_engine(
    bare: Path, aapt: Callable[..., Ran], one_core: None, backend: str, precision: str | None
) -> None:
    with pytest.raises(BundleError, match=f"has no {backend} engine") as caught:
        open_engines(Bundle.open(bare), backend, precision)
    command = caught.value.hint.partition("aapt ")[2].split()
    assert aapt(*command).code == 0
    assert open_engines(Bundle.open(bare), backend, precision).backend == backend


@pytest.mark.parametrize(
    "damage",
    [
        {"graphs": {}}, {"graphs": {"generator": "profile.toml"}}, {"graphs": None},
        {"threads": None}, {"threads": "many"}, {"threads": -1}, {"precision": None},
        {"backend": 3},
        {"graphs": dict.fromkeys(("encoder", "prompt", "generator", "decoder"), "../secret")},
    ],
)  # fmt: skip
@pytest.mark.parametrize("asked", ["fp32", None])
def test_an_engines_entry_that_makes_no_sense_is_a_bundle_error(
    copied: Path, damage: dict[str, object], asked: str | None
) -> None:
    """As in a bundle that somebody wrote by hand and sealed."""
    opened = Bundle.open(copied)
    opened.engines["onnxruntime-fp32"] |= damage
    del opened.engines["onnxruntime-int8"]
    with pytest.raises(BundleError) as caught:
        open_engines(opened, "onnxruntime", asked)
    assert caught.value.hint


# --- int8 on a CPU that it was not built on ---


@pytest.mark.parametrize(
    ("bits", "exact", "warned"),
    [(8, False, True), (8, True, False), (7, False, False), (7, True, False), (None, False, False)],
)
def test_weights_that_overflow_here_are_warned_of(
    copied: Path, bits: int | None, exact: bool, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle older than the entry says nothing of its bits, and nothing is said of it."""
    monkeypatch.setattr("aapt_deploy.backends.table.adds_int8_exactly", lambda: exact)
    opened, said = Bundle.open(copied), list[str]()
    entry = opened.engines["onnxruntime-int8"]
    del entry["weight_bits"]
    if bits is not None:
        entry["weight_bits"] = bits
    for precision in ("fp32", "int8"):
        open_engines(opened, "onnxruntime", precision, said.append).close()
    assert len(said) == warned
    command = f"aapt build-engine {copied} --backend onnxruntime --precision int8"
    assert all(
        line.startswith(f"engine onnxruntime-int8 of {copied} ")
        and line.endswith(command)
        and "\n" not in line
        for line in said
    )


@pytest.mark.parametrize("command", ["stream", "profile", "quality"])
def test_the_user_is_warned_once(
    copied: Path,
    tmp_path: Path,
    command: str,
    aapt: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aapt_deploy.backends.table.adds_int8_exactly", lambda: False)
    more = {
        "stream": ("-o", tmp_path / "x.y4m", "--seconds", 1),
        "profile": ("--blocks", 10),
        "quality": ("--seconds", 1),
    }[command]
    rewrite_manifest(
        copied, lambda manifest: manifest["engines"]["onnxruntime-int8"].update(weight_bits=8)
    )
    for precision, times in (("int8", 1), ("fp32", 0)):
        if (command, precision) != ("quality", "fp32"):  # which would be compared with itself
            said = aapt(command, copied, "--precision", precision, *more).err.splitlines()
            assert (
                sum(line.startswith("warning: engine onnxruntime-int8 ") for line in said) == times
            ), said


def test_a_graph_that_onnx_runtime_refuses_is_a_bundle_error(
    opened: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"cannot load .*bad\.onnx") as caught:
        engine.open_session(tmp_path / "bad.onnx", Threads(1, False))
    assert caught.value.hint == engine.EXPORT


# --- hashes that fit, of files that do not ---


def reseal(path: Path, *names: str) -> Bundle:
    """Put today's hashes of files into the manifest, as somebody would who can also seal it."""
    rewrite_manifest(
        path,
        lambda manifest: manifest["files"].update(
            {name: bundles._describe(path / name) for name in names}
        ),
    )
    return Bundle.open(path)


@pytest.mark.parametrize(
    ("graph", "other", "reason"),
    [
        (
            "generator",
            "decoder",
            "is not the generator of its bundle: input 'condition' is missing, "
            "by the profile float32 [1, 6, ",
        ),
        (
            "decoder",
            "encoder",
            "is not the decoder of its bundle: input 'image' is uint8 [32, 64, 3], "
            "by the profile none",
        ),
        (
            "prompt",
            "generator",
            "is not the prompt of its bundle: input 'condition' is float32 [1, 6, ",
        ),
    ],
)
def test_another_graph_under_an_engines_name_is_refused_with_the_command_that_builds_it(
    copied: Path, graph: str, other: str, reason: str
) -> None:
    for precision in ("fp32", "int8"):
        folder = Path(
            Bundle.open(copied).engines[f"onnxruntime-{precision}"]["graphs"][graph]
        ).parent
        (copied / folder / f"{graph}.onnx").write_bytes(
            (copied / folder / f"{other}.onnx").read_bytes()
        )
        opened = reseal(copied, f"{folder}/{graph}.onnx")
        with pytest.raises(BundleError) as caught:
            open_engines(opened, "onnxruntime", precision)
        assert str(copied / folder / f"{graph}.onnx") in str(caught.value) and reason in str(
            caught.value
        ), caught.value
        assert caught.value.hint.endswith(
            f"aapt build-engine {copied} --backend onnxruntime --precision {precision}"
        )


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("graph", "other"), [("generator", "decoder"), ("decoder", "encoder"), ("encoder", "prompt")]
)
def test_another_graph_under_the_bundles_name_is_refused_by_the_build(
    bare: Path, graph: str, other: str, precision: str
) -> None:
    (bare / f"{graph}.onnx").write_bytes((bare / f"{other}.onnx").read_bytes())
    opened = reseal(bare, f"{graph}.onnx")
    with pytest.raises(
        BundleError, match=f"graph {bare}/{graph}.onnx is not the {graph} of its bundle: input "
    ) as caught:
        build.build_engine(opened, "onnxruntime", precision, BuildOptions(silent))
    assert caught.value.hint.endswith(f"aapt export CKPT -o {bare} --force")
    assert Bundle.open(bare).engines == {} and not list(bare.glob(".stage-*"))


@pytest.mark.parametrize(
    ("old", "new"),
    [("depth = 2", "depth = 3"), ("depth = 2", "depth = 1"), ("frames = 3", "frames = 4")],
)
def test_a_profile_of_other_graphs_is_refused_by_every_engine(
    copied: Path, old: str, new: str
) -> None:
    text = (copied / "profile.toml").read_text()
    assert text.count(f"\n{old}\n") == 1
    (copied / "profile.toml").write_text(text.replace(f"\n{old}\n", f"\n{new}\n"))
    opened = reseal(copied, "profile.toml")
    for backend, reason in (
        ("onnxruntime", "by the profile "),
        ("torch", f"bundle {copied}: profile.toml and checkpoint differ in generator"),
    ):
        with pytest.raises(BundleError) as caught:
            open_engines(opened, backend, "fp32")
        assert reason in str(caught.value) and f" {copied} " in caught.value.hint


# --- several streams over one set of weights ---


def flight(opened: Bundle, block: int) -> Steering:
    return Steering(turning(block), DAY if block % 3 else NIGHT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forks_share_weights_and_nothing_else(bundle: Path, backend: str) -> None:
    """Three streams in turn give the frames that each gives alone."""
    opened = Bundle.open(bundle)
    engines, image = open_engines(opened, backend, "fp32"), start(opened, "dunes", None).image
    alone = []
    for seed in range(3):
        stream = Rollout(engines.fork(), opened.profile, image, seed)
        alone.append(
            [stream.start(), *(stream.step(flight(opened, block + seed)) for block in range(5))]
        )
    streams = [
        Rollout(held, opened.profile, image, seed)
        for seed, held in enumerate((engines, engines.fork(), engines.fork()))
    ]
    together = [[stream.start()] for stream in streams]
    for block in range(5):
        for seed, stream in enumerate(streams):
            together[seed].append(stream.step(flight(opened, block + seed)))
    for ours, theirs in zip(alone, together, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not np.array_equal(alone[0][3], alone[1][3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rollout_continues_to_the_bit_from_its_state(bundle: Path, backend: str) -> None:
    opened = Bundle.open(bundle)
    engines, image = open_engines(opened, backend, "fp32"), start(opened, "dunes", None).image
    stream = Rollout(engines, opened.profile, image, 3)
    stream.start()
    for block in range(4):
        stream.step(flight(opened, block))
    state = stream.state()
    assert np.array_equal(state["text"], flight(opened, 3).text) and state["block"] == 4
    wanted = [stream.step(flight(opened, block)) for block in range(4, 12)]  # the ring turns over
    other = Rollout(engines.fork(), opened.profile, np.zeros_like(image), 99)
    other.restore(state)
    assert all(
        np.array_equal(other.step(flight(opened, 4 + i)), frames) for i, frames in enumerate(wanted)
    )


@pytest.mark.parametrize("engines", [GpuEngines, TrtEngines])
def test_a_backend_with_one_state_says_so(engines: type) -> None:
    one = object.__new__(engines)
    for attempt in (one.fork, one.state, lambda: one.restore({})):
        with pytest.raises(MachineError, match=f"backend {one.backend} does not support") as caught:
            attempt()
        assert "--backend onnxruntime" in caught.value.hint


def test_a_block_that_was_not_run_cannot_be_kept(loaded: Checkpoint) -> None:
    generator = EagerEngines(loaded, 1, "fp32").generator
    with pytest.raises(ValueError, match="shorter"):
        generator.commit(0)
    assert not any(cache.any() for cache in generator.caches.values())
