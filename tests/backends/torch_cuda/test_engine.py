"""The GPU engine's operations on a CPU, with plain kernels in the place of ours.

They give the reference's frames, and do nothing that a graph forbids.
"""

import copy
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from aapt_deploy.backends.torch_cuda import engine as torch_cuda
from aapt_deploy.backends.torch_cuda import lane as torch_lane
from aapt_deploy.backends.torch_cuda.calibrate import noise_inputs
from aapt_deploy.backends.torch_cuda.kernels import AttentionScales, Kernels, plain
from aapt_deploy.backends.torch_cuda.step import Step, Tiles, Tokens, fp8_layers, wide_layers
from aapt_deploy.backends.torch_eager import EagerEngines
from aapt_deploy.bundle import scales
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.bundle.scales import LinearScales, Scales
from aapt_deploy.errors import MachineError, UsageError
from aapt_deploy.models import checkpoint
from aapt_deploy.models.aapt.camera import CRUISE
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.models.checkpoint import Checkpoint
from aapt_deploy.ops.block_causal_attention import hopper_fp8
from aapt_deploy.profiles import load
from aapt_deploy.rollout.engine import Engines
from aapt_deploy.rollout.loop import Steering, rollout
from aapt_deploy.rollout.starts import start
from tests.support.driven import Driven
from tests.support.tiny import Exported, frames_of
from tests.support.trt_plans import decibels

CPU = torch.device("cpu")
BLOCKS = 9  # the ring of `tiny` wraps at 4


def over(
    loaded: Checkpoint, precision: str = "fp32", found: Scales | None = None, by_row: bool = True
) -> torch_cuda.GpuEngines:
    """The engines of `loaded`, which keeps its weights."""
    options = torch_cuda.Options.of(precision, CPU, by_row)
    return torch_cuda.GpuEngines(
        copy.deepcopy(loaded.generator), copy.deepcopy(loaded.vae), found, options
    )


def latents(
    engines: Engines, opened: Bundle, prompts: Callable[[int], np.ndarray | None]
) -> list[np.ndarray]:
    """What the generator says over a rollout, [C, h, w] each."""
    generator, said = engines["generator"], []
    run = generator.run

    def heard(**inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        found = run(**inputs)
        said.append(found["clean"].copy()[0])
        return found

    generator.run = heard  # type: ignore[method-assign]
    begin = start(opened, "dunes", None)
    list(
        itertools.islice(
            rollout(
                engines,
                opened.profile,
                begin.image,
                lambda block: Steering(CRUISE, prompts(block)),
                3,
            ),
            1 + BLOCKS,
        )
    )
    return said


def test_in_float32_it_says_what_the_reference_says(loaded: Checkpoint, bundle: Path) -> None:
    opened = Bundle.open(bundle)
    words = [np.array([[4, 1, 2, 3]]), np.array([[0, 3, 3, 1]])]
    prompts = lambda block: words[block > 5]  # changes behind the wrap
    mine, theirs = (
        latents(over(loaded), opened, prompts),
        latents(EagerEngines(loaded, 1, "fp32"), opened, prompts),
    )
    passes = BLOCKS * len(
        opened.profile.sampler.timesteps
    )  # the engine that overlaps is one block ahead
    for block, (a, b) in enumerate(zip(mine[:passes], theirs[:passes], strict=True)):
        np.testing.assert_allclose(
            a, b, rtol=0, atol=2e-5 * np.abs(b).max(), err_msg=f"pass {block}"
        )
    frames = [
        frames_of(engines, opened, 5) for engines in (over(loaded), EagerEngines(loaded, 1, "fp32"))
    ]
    assert (
        max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(*frames, strict=True)) <= 1
    )  # a value between two levels may round either way
    assert len({frame.tobytes() for frame in frames[0]}) == 6


def test_only_a_committed_pass_leaves_a_trace(loaded: Checkpoint) -> None:
    engines, profile = over(loaded), loaded.profile

    def story(stray: bool, commit: bool = True) -> list[np.ndarray]:
        driven, found = Driven(engines, profile), []
        for block in range(6):
            if stray:
                driven.said(block, 100 + block)  # an earlier step of the sampler, say
            found.append(driven.said(block, block))
            if commit or block != 3:
                driven.generator.commit(block)
        return found

    plain_one, again = story(False), story(True)
    assert all(np.array_equal(a, b) for a, b in zip(plain_one, again, strict=True))
    without = story(False, commit=False)
    assert np.array_equal(without[3], plain_one[3]) and not np.array_equal(without[4], plain_one[4])


def test_a_reset_engine_is_a_fresh_one(loaded: Checkpoint, bundle: Path) -> None:
    opened, used = Bundle.open(bundle), over(loaded)
    first = frames_of(used, opened, 4, 5)
    frames_of(used, opened, 3, 6)
    for engines in (used, over(loaded)):
        assert all(
            np.array_equal(a, b)
            for a, b in zip(first, frames_of(engines, opened, 4, 5), strict=True)
        )


@pytest.mark.parametrize("by_row", [True, False], ids=["by row", "one scale"])
def test_in_fp8_it_streams_an_fp8_export(
    exported: Exported, three: Checkpoint, exported_frames: list[np.ndarray], by_row: bool
) -> None:
    """Against ONNX Runtime on the exported graphs, with products in FP8 and attention in float32.

    The bound is that of the TensorRT path.
    """
    opened = Bundle.open(exported.path)
    found = scales.load(opened.checked(scales.FILE), opened.profile)
    engines = over(three, "fp8", found, by_row)
    caches = engines["generator"].cache.caches  # type: ignore[union-attr]
    assert all(cache.dtype == torch.uint8 for cache in caches)
    frames = frames_of(engines, opened, 5, 3)
    assert decibels(frames, exported_frames) > 26
    exact = frames_of(over(three), opened, 5, 3)
    assert decibels(exact, exported_frames) < 60  # FP8 is in what is compared with


def test_a_step_of_codes_is_the_product_of_what_they_stand_for(
    exported: Exported, three: Checkpoint
) -> None:
    """One pass with nothing cached: FP8 layers against the same layers in float32.

    The weights and inputs of both are rounded.
    """
    opened = Bundle.open(exported.path)
    found, generator = (
        scales.load(opened.checked(scales.FILE), opened.profile),
        copy.deepcopy(three.generator),
    )
    torch_cuda.settle(generator, torch.float32)
    layers = fp8_layers(generator, found, plain(), torch.float32, CPU, True)
    narrow = {
        name
        for layer in layers
        for name, linear in layer.linears.items()
        if linear.step is not None
    }
    assert narrow == {"qkv", "out", "w1", "w2"}
    x = torch.randn(opened.profile.frame_tokens, opened.profile.model.dim)
    for i, layer in enumerate(layers):
        linear = layer.linears["qkv"]
        if linear.step is None:
            continue
        weights = generator.visual[i].qkv
        step = torch.from_numpy(found.linear[f"visual.{i}.qkv"].weight_scale)[:, None]
        rounded = lambda values, scale: (
            (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        )
        expected = torch.nn.functional.linear(
            rounded(x, linear.step), rounded(weights.weight, step), weights.bias
        )
        torch.testing.assert_close(
            linear((x / linear.step).clamp(-448, 448).to(torch.float8_e4m3fn)),
            expected,
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_random_engines_are_tame_and_drawn_from_the_seed(precision: str) -> None:
    profile = load("tiny-cpu")
    profile = profile.replace(
        model=dataclasses.replace(profile.model, dim=128, depth=3)
    )  # heads of 64
    for seed, same in ((0, True), (1, False)):
        one, two = (
            Driven(torch_cuda.random_engines(profile, precision, s, CPU), profile)
            for s in (0, seed)
        )
        said = []
        for block in range(12):
            a, b = (driven.said(block, block) for driven in (one, two))
            assert np.array_equal(a, b) == same
            for driven in (one, two):
                driven.generator.commit(block)
            said.append(a)
        assert 0.05 < float(np.std(said)) < 20 and np.isfinite(said).all()


# --- what a CUDA graph forbids ---


def shapes_alone() -> Kernels:
    """Attention that gives its shape; everything else as it is.

    It runs on the meta device, which has no numbers: any look at one raises.
    """

    def attend_tiles(q: torch.Tensor, *rest: torch.Tensor | AttentionScales) -> torch.Tensor:
        assert q.is_contiguous()
        return torch.empty_like(q)

    def nothing(*arguments: object) -> None:
        pass

    return dataclasses.replace(
        plain(),
        attend_tiles=attend_tiles,
        attend_tokens=attend_tiles,
        pack=nothing,
        commit_tiles=nothing,
    )


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
@pytest.mark.parametrize("name", ["aapt-8b-736x416-h100", "aapt-8b-1280x720-h100"])
def test_a_step_of_8b_reads_no_number_on_the_host(name: str, precision: str) -> None:
    profile, kernels, meta = load(name), shapes_alone(), torch.device("meta")
    with meta:
        generator, _ = checkpoint.build(profile)
    torch_cuda.settle(generator, torch.bfloat16)
    heads, dim = profile.model.heads, profile.head_dim
    cache: Tokens | Tiles
    if precision == "fp8":
        sizes = {
            f"visual.{i}.{n}": getattr(generator.visual[i], n)
            for i in range(1, profile.model.depth - 1)
            for n in ("qkv", "out", "w1", "w2")
        }
        linear = {
            key: LinearScales(np.ones(1, np.float32), np.ones(layer.out_features, np.float32))
            for key, layer in sizes.items()
        }
        of_head, of_channel = np.ones(heads, np.float32), np.ones((heads, dim), np.float32)
        found = Scales(
            linear,
            [hopper_fp8.Scales(of_head, of_head, of_channel, of_channel)] * profile.model.depth,
        )
        layers = fp8_layers(generator, found, kernels, torch.bfloat16, meta, True)
        cache = Tiles(profile, kernels, found.attention, meta)
    else:
        layers, cache = (
            wide_layers(generator, torch.bfloat16),
            Tokens(profile, kernels, torch.bfloat16, meta),
        )
    step = Step(generator, layers, cache, kernels, torch.bfloat16)
    kinds = {"float32": torch.float32, "int32": torch.int32}
    inputs = {
        spec.name: torch.empty(spec.shape, dtype=kinds[spec.dtype], device=meta)
        for spec in signatures(profile)["generator"].inputs
    }
    with torch.no_grad():
        clean = step(inputs | {"slot": torch.empty(1, dtype=torch.int32, device=meta)})
        assert clean.shape == inputs["noisy"].shape and clean.dtype == torch.float32
        with pytest.raises(
            (RuntimeError, NotImplementedError)
        ):  # the check itself: a number of this device cannot be had
            int(inputs["cache_len"])


def test_the_length_and_the_slot_are_read_where_they_lie(loaded: Checkpoint) -> None:
    """One step object, the same tensors, other numbers in them: another past."""
    generator, profile, kernels = copy.deepcopy(loaded.generator), loaded.profile, plain()
    torch_cuda.settle(generator, torch.float32)
    cache = Tokens(profile, kernels, torch.float32, CPU)
    step, inputs = (
        Step(generator, wide_layers(generator, torch.float32), cache, kernels, torch.float32),
        noise_inputs(profile, 0, CPU),
    )
    text, frame = profile.text.tokens, profile.frame_tokens
    with torch.no_grad():
        inputs["cache_len"].fill_(text)
        first = step(inputs).clone()
        assert torch.equal(step(inputs), first)
        inputs["slot"].fill_(text)
        inputs["cache_len"].fill_(text + frame)
        after = step(inputs).clone()
        assert not torch.equal(after, first)
        held = [c.clone() for c in cache.caches]
        assert all(
            float(c[:, :, text : text + frame].abs().sum())
            > 0
            == float(c[:, :, text + frame : -frame].abs().sum())
            for c in held
        )
        inputs["slot"].fill_(-1)
        inputs["cache_len"].fill_(text)
        assert torch.equal(step(inputs), first)
        assert all(
            torch.equal(a[:, :, :-frame], b[:, :, :-frame])
            for a, b in zip(held, cache.caches, strict=True)
        )


def test_attention_goes_before_the_decoder_and_nothing_is_uploaded_below_a_zero_fill(
    loaded: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []

    class Told(torch_lane.Lane):
        def __init__(self, device: torch.device, priority: int = 0) -> None:
            super().__init__(device, priority)
            told.append(f"lane {priority}")

        def settle(self) -> None:
            told.append("settle")

    true_packed, true_upload = torch_lane.Packed.__init__, torch_lane.Packed.upload

    def packed(self: torch_lane.Packed, *given: object) -> None:
        told.append("zeros")
        true_packed(self, *given)  # type: ignore[arg-type]

    def upload(self: torch_lane.Packed, values: dict[str, object]) -> None:
        told.append("upload")
        true_upload(self, values)

    monkeypatch.setattr(torch_cuda, "Lane", Told)
    monkeypatch.setattr(torch_lane.Packed, "__init__", packed)
    monkeypatch.setattr(torch_lane.Packed, "upload", upload)
    over(loaded)
    assert told[:2] == ["lane -1", "lane 0"]
    assert "settle" in told[told.index("zeros") : told.index("upload")]


def test_a_lanes_priority_is_that_of_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: (str(device), priority))
    cuda = torch.device("cuda")
    lanes = [torch_lane.Lane(cuda, priority=-1), torch_lane.Lane(cuda)]
    assert [lane.stream for lane in lanes] == [("cuda", -1), ("cuda", 0)]


# --- what is refused ---


def test_machines_and_shapes_that_it_is_not_for(
    exported: Exported, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bundle.open(bundle)
    with pytest.raises(UsageError, match="has no FP8 scales"):
        torch_cuda.open_bundle(opened, "fp8")
    with pytest.raises(UsageError, match="precision 'fp32' does not exist for torch on a GPU"):
        torch_cuda.open_bundle(opened, "fp32")
    big = load("aapt-8b-736x416-h100")
    torch_cuda.check_fp8(big, (9, 0))
    for capability, named in (((8, 9), "8.9"), ((10, 0), "10.0")):
        with pytest.raises(MachineError, match=f"compute capability {named}") as caught:
            torch_cuda.check_fp8(big, capability)
        assert "--precision bf16" in caught.value.hint
    with pytest.raises(UsageError, match="heads of 16; the FP8 kernels want 64 or 128"):
        torch_cuda.check_fp8(load("tiny-cpu"), (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    with (
        pytest.raises(
            MachineError,
            match="aapt-8b-736x416-h100 does not fit into the memory of a GPU: "
            "Tried to allocate 9 GiB",
        ),
        torch_cuda.memory_for(big),
    ):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB. GPU 0 has a total of 1 GiB")
