"""backends/trt/engine over an emulated device.

The plans are run by ONNX Runtime or torch; everything around them is the engine's own. The
emulated driver does nothing before it is waited for. So a wait, a copy or a commit that is
missing, or of the wrong place, shows in the frames. What TensorRT and a GPU do with these calls
is not tested here.
"""

import dataclasses
import inspect
import itertools
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from aapt_deploy.backends.torch_eager import EagerEngines, EagerGenerator
from aapt_deploy.backends.trt import cuda, engine, state
from aapt_deploy.backends.trt.state import from_bf16, to_bf16
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.bundle.signature import GraphSignature, layer_names
from aapt_deploy.errors import MachineError
from aapt_deploy.models.aapt import graphs
from aapt_deploy.models.aapt.prompts import parse, token_ids
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.models.checkpoint import Checkpoint
from aapt_deploy.ops.block_causal_attention import NEXT, hopper_fp8
from aapt_deploy.profiles import Model, Profile
from aapt_deploy.rollout.loop import Steering, rollout
from aapt_deploy.rollout.starts import start
from tests.support import cuda_emulator
from tests.support.cuda_emulator import Compute, Driver
from tests.support.opening import open_engines
from tests.support.tiny import frames_of, make_checkpoint, turning
from tests.support.trt_plans import (
    assert_same,
    by_onnx,
    differ,
    emulated_kernels,
    opened_over,
    stored_as,
    tensors_of,
    toy_scales,
)

BLOCKS = 9  # the window holds 3 and a sink: the ring wraps at 4 and 7
FEW = 6  # enough to see a mistake: block 5 attends to what block 4 wrote over block 1
DAY, NIGHT = (token_ids(parse(text)) for text in ("desert at noon", "islands at night, foggy"))


def changing(block: int) -> np.ndarray:
    """A prompt that changes while the ring is full, and back."""
    return NIGHT if 3 <= block < 5 else DAY


@pytest.fixture(scope="module")
def computes(bundle: Path, tiny: Profile) -> dict[str, Compute]:
    return {name: by_onnx(bundle / f"{name}.onnx") for name in signatures(tiny)}


@pytest.fixture(scope="module")
def wanted(bundle: Path) -> list[np.ndarray]:
    """The onnxruntime engine's frames."""
    opened = Bundle.open(bundle)
    engines = open_engines(opened, "onnxruntime", "fp32")
    frames = frames_of(engines, opened, BLOCKS, 3, changing)
    engines.close()
    return frames


# --- the same frames ---


@pytest.mark.parametrize(("eager", "captured"), [(False, True), (True, True), (False, False)])
def test_frames_are_those_of_the_onnxruntime_engine(
    bundle: Path,
    tiny: Profile,
    computes: dict[str, Compute],
    wanted: list[np.ndarray],
    eager: bool,
    captured: bool,
) -> None:
    driver, opened = Driver(eager=eager), Bundle.open(bundle)
    engines = opened_over(driver, tiny, computes, captured=captured)
    assert np.concatenate(wanted[1:]).std() > 10, "a flat picture proves nothing"
    assert_same(frames_of(engines, opened, BLOCKS, 3, changing), wanted)
    assert_same(
        frames_of(engines, opened, BLOCKS, 3, changing), wanted
    )  # a second rollout finds nothing of the first
    engines.close()
    launched = sum(call.startswith("cuGraphLaunch") for call in driver.journal)
    assert (launched > 2 * BLOCKS) is captured


@pytest.mark.parametrize("kind", ["BF16", "HALF"])
def test_half_precision_tensors_are_converted_where_the_host_reads_them(
    bundle: Path, tiny: Profile, computes: dict[str, Compute], wanted: list[np.ndarray], kind: str
) -> None:
    """Everything that is float32 in the signature, caches and decoder memory included."""
    half = lambda graph, name: None if name in ("image", "text", "cache_len", "frames") else kind
    opened = Bundle.open(bundle)
    engines = opened_over(Driver(), tiny, computes, kinds=half)
    highest, share = differ(frames_of(engines, opened, BLOCKS, 3, changing), wanted)
    engines.close()
    assert share > 0 and highest <= (60 if kind == "BF16" else 10)


def test_text_of_another_type_than_the_cache_is_converted(
    bundle: Path, tiny: Profile, computes: dict[str, Compute], wanted: list[np.ndarray]
) -> None:
    """The prompt's plan leaves bf16 and the caches are float32: bits are not taken for numbers."""
    opened = Bundle.open(bundle)
    engines = opened_over(
        Driver(),
        tiny,
        computes,
        kinds=lambda graph, name: "BF16" if graph == "prompt" and name != "text" else None,
    )
    frames = frames_of(engines, opened, BLOCKS, 3, changing)
    engines.close()
    assert (
        differ(frames, wanted)[0] <= 10
        and np.abs(np.concatenate(frames).astype(int) - np.concatenate(wanted)).mean() < 0.2
    )


def test_bf16_rounds_to_nearest_even() -> None:
    odd = np.array([0, -0.0, 1e-30, 3e38, 1.00390625, 1.01171875], np.float32)
    values = np.concatenate(
        [np.random.default_rng(0).standard_normal(4096).astype(np.float32), odd]
    )
    assert np.array_equal(
        to_bf16(values),
        torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16),
    )
    assert np.array_equal(
        from_bf16(to_bf16(values)), torch.from_numpy(values).bfloat16().float().numpy()
    )


def test_nothing_is_allocated_or_captured_after_opening(
    bundle: Path, tiny: Profile, computes: dict[str, Compute]
) -> None:
    driver, opened = Driver(), Bundle.open(bundle)
    engines = opened_over(driver, tiny, computes)
    begun = len(driver.journal)
    frames_of(engines, opened, BLOCKS, 0, changing)
    later = {call.split("(")[0] for call in driver.journal[begun:]}
    assert later == {
        "cuCtxSetCurrent", "cuGraphLaunch", "cuEventRecord", "cuEventQuery", "cuMemcpyHtoDAsync",
        "cuMemcpyDtoDAsync", "cuMemsetD8Async",
    }  # fmt: skip
    with pytest.raises(AssertionError, match="sealed"):
        engines.device.memory(1)
    launched = {call for call in driver.journal[begun:] if call.startswith("cuGraphLaunch")}
    assert (
        len(launched) == 5
    )  # encoder, prompt, one generator for every slot, the decoder's two directions
    engines.close()
    assert not driver.held and not driver.pinned and not driver.graphs and not driver.streams


# --- overlap ---


def test_the_next_block_is_generated_while_this_one_is_decoded(
    bundle: Path, tiny: Profile, computes: dict[str, Compute]
) -> None:
    """Each decoding waits until the generator has begun another block; it needs the overlap."""
    passes, met, opened = 0, list[bool](), Bundle.open(bundle)
    grown = threading.Condition()

    def generator(given: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        nonlocal passes
        with grown:
            passes += 1
            grown.notify()
        return computes["generator"](given)

    def decoder(given: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        if passes >= first:
            with grown:
                done = first + per_block * (
                    1 + len(met)
                )  # passes of all blocks up to the decoded one
                met.append(grown.wait_for(lambda: passes > done, timeout=10))
        return computes["decoder"](given)

    per_block, first = len(tiny.sampler.timesteps), 1 << 30
    engines = opened_over(Driver(), tiny, {**computes, "generator": generator, "decoder": decoder})
    made = rollout(
        engines,
        tiny,
        start(opened, "dunes", None).image,
        lambda block: Steering(turning(block), DAY),
        0,
    )
    next(made)
    first = passes
    for _ in range(4):
        next(made)
    made.close()
    engines.close()
    assert met == [True] * 4


def test_closing_waits_for_the_block_under_way_and_ends_it(
    bundle: Path, tiny: Profile, computes: dict[str, Compute]
) -> None:
    driver = Driver()
    engines = opened_over(driver, tiny, computes)
    frames = rollout(
        engines,
        tiny,
        np.zeros((tiny.video.height, tiny.video.width, 3), np.uint8),
        lambda block: Steering(turning(block), DAY),
        0,
    )
    for _ in range(3):
        next(frames)
    generator = engines["generator"]
    engines.close()  # while the thread is at the next block, perhaps
    engines.close()
    assert not driver.held
    with pytest.raises(RuntimeError, match="closed"):
        generator.commit(0)
    with pytest.raises(RuntimeError, match="closed"):
        engines["decoder"]
    with pytest.raises(RuntimeError, match="closed"):
        list(itertools.islice(frames, 3))


# --- FP8 caches ---


class Rounded(EagerGenerator):
    """The torch generator with everything in its caches rounded as the FP8 layout rounds it."""

    scales: list[hopper_fp8.Scales]

    def commit(self, block: int) -> None:
        depth = len(self.last) // 2
        for layer, (k, v) in enumerate(zip(self.last[:depth], self.last[depth:], strict=True)):
            got = self._rounded(layer, k[0].numpy(), v[0].numpy())
            self.last[layer], self.last[layer + depth] = (
                torch.from_numpy(array)[None] for array in got
            )
        super().commit(block)

    def reset(self, **state: np.ndarray) -> None:
        for layer, names in enumerate(
            zip(*(layer_names(f"text_{kind}", self.profile) for kind in ("k", "v")), strict=True)
        ):
            if names[0] in state:
                got = self._rounded(layer, *(from_bf16(to_bf16(state[name][0])) for name in names))
                state |= {name: array[None] for name, array in zip(names, got, strict=True)}
        super().reset(**state)

    def _rounded(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return hopper_fp8.unpack(
            *hopper_fp8.pack(k, v, self.scales[layer]), len(k), self.scales[layer]
        )


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tiny: Profile) -> Checkpoint:
    """A checkpoint with heads of 64 channels, for FP8; 8x4 latents: 8 tokens a block, 4 of text."""
    shape = dataclasses.replace(tiny, name="wide", model=Model(dim=128, depth=2, heads=2, patch=2))
    return make_checkpoint(tmp_path_factory.mktemp("wide") / "wide.safetensors", shape)


def by_torch(module: torch.nn.Module, signature: GraphSignature) -> Compute:
    names = [spec.name for spec in signature.outputs] + (
        [] if signature.name == "generator" else [spec.name + NEXT for spec in signature.state]
    )

    def run(given: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        with torch.inference_mode():
            out = module(
                *(
                    torch.from_numpy(given[spec.name])
                    for spec in (*signature.inputs, *signature.state)
                )
            )
        return {
            name: tensor.numpy()
            for name, tensor in zip(names, out if isinstance(out, tuple) else [out], strict=True)
        }

    return run


def tiled(
    compute: Compute, profile: Profile, scales: list[hopper_fp8.Scales], packed: bool
) -> Compute:
    """A generator's plan with FP8 caches: unpack them, run the float32 graph, pack its blocks."""
    pairs = list(
        zip(
            *(
                layer_names(prefix, profile)
                for prefix in ("k_cache", "v_cache", "k_block", "v_block")
            ),
            strict=True,
        )
    )

    def run(given: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        floats = dict(given)
        for (k, v, _, _), scale in zip(pairs, scales, strict=True):
            images = [given[name].view(np.uint8) for name in (k, v)]
            tokens = profile.cache_tokens
            floats |= {
                name: array[None]
                for name, array in zip(
                    (k, v), hopper_fp8.unpack(*images, tokens, scale), strict=True
                )
            }
        found = dict(compute(floats))
        for (_, _, k, v), scale in zip(pairs, scales, strict=True):
            images = hopper_fp8.pack(found[k][0], found[v][0], scale)
            found |= {
                name: image.view(np.int32) if packed else image
                for name, image in zip((k, v), images, strict=True)
            }
        return found

    return run


def tiled_plans(
    driver: Driver, loaded: Checkpoint, scales: list[hopper_fp8.Scales], packed: bool
) -> Any:
    profile = loaded.profile
    modules = graphs.graph_modules(profile, loaded.generator, loaded.vae)
    made = {}
    for name, signature in signatures(profile).items():
        tensors, compute = tensors_of(signature), by_torch(modules[name], signature)
        if name == "generator":
            compute = tiled(compute, profile, scales, packed)
            for index, tensor in enumerate(tensors):
                if tensor.name.startswith(("k_cache", "v_cache", "k_block", "v_block")):
                    *outer, tile = hopper_fp8.image_shape(
                        profile.model.heads, tensor.shape[1], profile.head_dim
                    )
                    tensors[index] = tensor._replace(
                        dtype="INT32" if packed else "FP8",
                        shape=(*outer, tile // 4 if packed else tile),
                    )
        if name == "prompt":
            compute = stored_as(
                "BF16", compute, {tensor.name for tensor in tensors if not tensor.is_input}
            )
            tensors = [
                tensor if tensor.is_input else tensor._replace(dtype="BF16") for tensor in tensors
            ]
        made[name] = cuda_emulator.Plan(driver, tensors, compute)
    return made


def tiled_frames(
    loaded: Checkpoint, opened: Any, packed: bool, module: ModuleType = engine, blocks: int = BLOCKS
) -> list[np.ndarray]:
    driver, scales = Driver(), toy_scales(loaded.profile)
    device = getattr(module, "cuda_module", cuda).Device(driver)
    options = module.RunOptions(scales=scales, launch=emulated_kernels(driver, loaded.profile))
    engines = module.TrtEngines(
        loaded.profile, tiled_plans(driver, loaded, scales, packed), device, "fp8_e4m3", options
    )
    frames = frames_of(engines, opened, blocks, 3, changing)
    engines.close()
    return frames


class Opened:
    """As much of a bundle as `frames_of` reads: the profile and a start frame."""

    def __init__(self, loaded: Checkpoint, bundle: Path) -> None:
        self.profile, self.shared = loaded.profile, Bundle.open(bundle)
        self.manifest, self.checked, self.path = (
            self.shared.manifest,
            self.shared.checked,
            self.shared.path,
        )


@pytest.fixture(scope="module")
def rounded(wide: Checkpoint, bundle: Path) -> list[np.ndarray]:
    """Frames of torch with caches rounded to FP8, and proof that the rounding shows."""
    opened: Any = Opened(wide, bundle)
    exact = EagerEngines(wide, 1, "fp32")
    reference = EagerEngines(wide, 1, "fp32")
    plain = reference.engines["generator"]
    assert isinstance(plain, EagerGenerator)
    generator = Rounded(plain.module, plain.signature, plain.profile)
    generator.scales = toy_scales(wide.profile)
    reference.engines["generator"] = generator
    frames = frames_of(reference, opened, BLOCKS, 3, changing)
    assert differ(frames, frames_of(exact, opened, BLOCKS, 3, changing))[1] > 0.05
    return frames


@pytest.mark.parametrize("packed", [False, True])
def test_fp8_caches_are_committed_and_given_their_text_by_our_kernels(
    wide: Checkpoint, bundle: Path, rounded: list[np.ndarray], packed: bool
) -> None:
    opened: Any = Opened(wide, bundle)
    assert_same(tiled_frames(wide, opened, packed), rounded)


# --- planted mistakes ---

OTHER = "cuEventRecord, self._done, self._device._streams[0]._stream"
SUM = "{name: self.address + offset"
FRAMES = "self.stream.wait()\n            return self.outputs"
CLEAN = "self.stream.wait()\n            return self.clean"
PLANTED = {  # module, what is written instead of what
    "a wrong slot": ("engine", "self.ring.place(block).slot", "self.ring.place(block + 1).slot"),
    "a missing commit": ("engine", "self.cache.commit(self", "str(self"),
    "a stale length": ("engine", ": place.cache_len", ": self.ring.text_tokens"),
    "an old block's place": ("engine", 'int(inputs.pop("block"))', 'int(inputs.pop("block")) // 2'),
    "no wait before the frames are read": ("engine", FRAMES, "return self.outputs"),
    "no wait before the latent is read": ("engine", CLEAN, "return self.clean"),
    "a wait for the other stream": ("cuda", "cuEventRecord, self._done, self._stream", OTHER),
    "memory that does not alternate": ("engine", "(self.turn + 1) % len(self.steps)", "0"),
    "memory written over itself": ("engine", "self.state[i - 1]", "self.state[i]"),
    "memory that is not emptied": ("engine", "for held in self.state:", "for held in []:"),
    "inputs that stay on the host": ("state", "[name][...] = to_bf16", "[name] = to_bf16"),
    "text that is not written": ("engine", "if k in state", "if k in state and not self.cache"),
    "text of another layer": ("engine", "write_text(layer,", "write_text(self.layers[0],"),
    "half a block committed": ("state", "block, self.tokens *", "block, self.tokens // 2 *"),
    "memory from nowhere": ("state", SUM, f"{SUM} + self.host.nbytes"),
}
KEYS, VALUES = "(layer.k_block, layer.v_block), self", "(layer.v_block, layer.k_block), self"
PLANTED_TILES = {
    "a slot that is not uploaded": ("state", "self.stream.upload(self.slot_address,", "str("),
    "text behind the block": ("state", "self.images, self.front", "self.images, self.slot_address"),
    "scales of another layer": ("state", "self.scales[self.layers.index(layer)]", "self.scales[0]"),
    "keys for values": ("state", KEYS, VALUES),
    "text packed before it is there": ("state", "zip(self.values, halves", "zip([], []"),
    "a missing commit": ("state", "        self.committing()", "        pass"),
}


def planted(mistake: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """backends/trt/engine with one mistake in it or in what it is made of."""
    where, old, new = mistake
    for real in (cuda, state, engine):
        source, name = inspect.getsource(real), real.__name__.rsplit(".", 1)[1]
        if name == where:
            assert source.count(old) == 1, f"{source.count(old)} times {old!r}"
            source = source.replace(old, new)
        mutant = ModuleType(real.__name__)
        monkeypatch.setitem(sys.modules, real.__name__, mutant)
        code = compile(source, f"planted {name}", "exec")
        exec(code, mutant.__dict__)  # noqa: S102  our own source with one mistake planted
        if name == "cuda":
            made = mutant
    mutant.__dict__["cuda_module"] = made
    return mutant


def caught(run: Callable[[], list[np.ndarray]], wanted: list[np.ndarray]) -> bool:
    """Whether frames differ, or the emulated device refuses."""
    try:
        frames = run()
    except (AssertionError, AttributeError, MachineError):
        return True
    return differ(frames, wanted[: len(frames)])[1] > 1 / 500


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_caught(
    bundle: Path,
    tiny: Profile,
    computes: dict[str, Compute],
    wanted: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    mistake: str,
) -> None:
    module, opened = planted(PLANTED[mistake], monkeypatch), Bundle.open(bundle)

    def run() -> list[np.ndarray]:
        engines = opened_over(Driver(), tiny, computes, module)
        if mistake == "memory that is not emptied":
            frames_of(engines, opened, 1, 3, changing)
        return frames_of(engines, opened, FEW, 3, changing)

    assert caught(run, wanted)


@pytest.mark.parametrize("mistake", PLANTED_TILES)
def test_a_planted_mistake_with_fp8_caches_is_caught(
    wide: Checkpoint,
    bundle: Path,
    rounded: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    mistake: str,
) -> None:
    module = planted(PLANTED_TILES[mistake], monkeypatch)
    opened: Any = Opened(wide, bundle)
    assert caught(lambda: tiled_frames(wide, opened, False, module, FEW), rounded)


def test_without_a_mistake_nothing_is_caught(
    bundle: Path,
    tiny: Profile,
    computes: dict[str, Compute],
    wanted: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, opened = planted(("trt", "AGAIN = ", "AGAIN = "), monkeypatch), Bundle.open(bundle)
    assert not caught(
        lambda: frames_of(opened_over(Driver(), tiny, computes, module), opened, FEW, 3, changing),
        wanted,
    )
