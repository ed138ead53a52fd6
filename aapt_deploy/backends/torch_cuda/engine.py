"""PyTorch on an NVIDIA GPU, without TensorRT: our attention kernels, FP8 products, fused small operations, one captured CUDA graph for a pass.

    lane 1   encoder, prompt, generator     inputs up, graph, `clean` down; the block before is committed inside the graph (step.py)
    lane 2   decoder                        latent up, graph, uint8 frames down to pinned memory (decoder.py)

Length and slot travel with the other inputs and are read on the device, so one graph serves every block. The text's keys and values are computed
once per prompt and lie in front of every cache; a pass runs the visual stream alone. Everything is allocated when the engines are opened.

Precisions: `fp8` takes the bundle's static scales for linear layers and caches and needs a Hopper GPU; `bf16` runs on any. `fp32` is for tests: the
same step and the same engines on a CPU, with plain kernels. Not run on a GPU by us yet; bench/headline.py does it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aapt_deploy.backends.table import refuse_unknown
from aapt_deploy.backends.torch_cuda.calibrate import calibrate
from aapt_deploy.backends.torch_cuda.decoder import StreamDecoder
from aapt_deploy.backends.torch_cuda.kernels import Kernels, on_gpu, plain
from aapt_deploy.backends.torch_cuda.lane import Lane, Packed
from aapt_deploy.backends.torch_cuda.step import (
    LINEARS,
    NOWHERE,
    Cache,
    Step,
    Tiles,
    Tokens,
    fp8_layers,
    wide_layers,
)
from aapt_deploy.backends.torch_eager import checkpoint_of
from aapt_deploy.bundle import scales as scale_files
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.bundle.scales import Scales
from aapt_deploy.bundle.signature import TensorSpec, layer_names
from aapt_deploy.errors import MachineError, UsageError
from aapt_deploy.models import checkpoint
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.graphs import EncoderGraph
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.models.aapt.vae import Vae
from aapt_deploy.ops.block_causal_attention import Ring, hopper_fp8
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.engine import OneState

BACKEND = "torch-cuda"
PRECISIONS = {
    "fp8": torch.bfloat16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}  # -> type of the activations
PULL = -0.8  # of random networks, in units of a step's deviation


class GpuGenerator:
    """The generator and its caches."""

    def __init__(self, step: Step, profile: Profile, lane: Lane) -> None:
        self.profile, self.ring, self.lane, self.cache = profile, Ring.of(profile), lane, step.cache
        self.inputs = Packed(
            [*signatures(profile)["generator"].inputs, TensorSpec("slot", (1,), "int32")],
            lane.device,
        )
        self.clean = torch.zeros(self.inputs.tensors["noisy"].shape, device=lane.device)
        self.shown = torch.zeros(self.clean.shape, pin_memory=lane.stream is not None)
        self.names = [layer_names(f"text_{kind}", profile) for kind in ("k", "v")]
        lane.settle()  # the zeros above were queued elsewhere: they would land on what is uploaded
        self.reset()
        with lane.mine():
            self.inputs.upload({"time": 1.0, "slot": NOWHERE})
        self.step = lane.prepare(lambda: self.clean.copy_(step(self.inputs.tensors)))
        self.reset()

    def reset(self, **state: np.ndarray) -> None:
        """Text arrives as float32, or as the bits of bf16, which is how `GpuPrompt` hands it out."""
        with self.lane.mine():
            if not state:
                self.cache.clear()
                self.pending = NOWHERE
            for layer, (k, v) in enumerate(zip(*self.names, strict=True)):
                if k in state:
                    self.cache.write_text(layer, *(self._text(state[name]) for name in (k, v)))
            self.lane.wait()

    def _text(self, values: np.ndarray) -> Tensor:
        kind = (
            PRECISIONS["bf16"] if self.lane.stream or values.dtype == np.uint16 else torch.float32
        )
        tensor = (
            torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
            if values.dtype == np.uint16
            else torch.from_numpy(values)
        )
        return tensor.to(self.lane.device, kind)

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        place = self.ring.place(int(inputs.pop("block")))
        with self.lane.mine():
            self.inputs.upload({**inputs, "cache_len": place.cache_len, "slot": self.pending})
            self.pending = NOWHERE
            self.step()
            self.shown.copy_(self.clean, non_blocking=True)
            self.lane.wait()
        return {"clean": self.shown.numpy()}

    def commit(self, block: int) -> None:
        self.pending = self.ring.place(block).slot  # the next pass begins with it


class GpuPrompt:
    """Text -> every layer's keys and values, in the activations' type; bf16 as its bits."""

    def __init__(self, generator: Generator, dtype: torch.dtype, lane: Lane) -> None:
        self.generator, self.dtype, self.lane = generator, dtype, lane
        self.names = [layer_names(f"text_{kind}", generator.profile) for kind in ("k", "v")]

    def reset(self, **state: np.ndarray) -> None:
        pass

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        text = torch.from_numpy(np.asarray(inputs["text"])).to(self.lane.device)
        with self.lane.mine():
            self.lane.settle()
            kept = [
                torch.stack(group).cpu()
                for group in self.generator.prompt(
                    text.to(self.dtype) if text.is_floating_point() else text
                )
            ]
        arrays = [
            x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()
            for x in kept
        ]
        return {
            name: array
            for names, group in zip(self.names, arrays, strict=True)
            for name, array in zip(names, group, strict=True)
        }


class GpuEncoder:
    """First image -> latent 0, in float32: it is run once."""

    def __init__(self, vae: Vae, lane: Lane) -> None:
        self.graph, self.lane = EncoderGraph(vae), lane

    def reset(self, **state: np.ndarray) -> None:
        pass

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        image = torch.from_numpy(np.asarray(inputs["image"])).to(self.lane.device)
        with self.lane.mine():
            self.lane.settle()
            return {"latent": self.graph(image).cpu().numpy()}


class GpuDecoder:
    """One latent frame -> four frames in pinned memory."""

    def __init__(self, decoder: StreamDecoder, profile: Profile, lane: Lane) -> None:
        signature = signatures(profile)["decoder"]
        self.lane, self.decoder, frames = lane, decoder, signature.outputs[0].shape
        self.inputs = Packed(list(signature.inputs), lane.device)
        self.frames = torch.zeros(frames, dtype=torch.uint8, device=lane.device)
        self.shown = torch.zeros(frames, dtype=torch.uint8, pin_memory=lane.stream is not None)
        if lane.stream:
            with lane.mine():
                decoder.choose(lane.seconds)
        self.step = lane.prepare(lambda: self.frames.copy_(decoder(self.inputs.tensors["latent"])))
        self.reset()

    def reset(self, **state: np.ndarray) -> None:
        with self.lane.mine():
            self.decoder.clear()
            self.lane.wait()

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        with self.lane.mine():
            self.inputs.upload(inputs)
            self.step()
            self.shown.copy_(self.frames, non_blocking=True)
            self.lane.wait()
        return {"frames": self.shown.numpy()}


GpuEngine = GpuGenerator | GpuPrompt | GpuEncoder | GpuDecoder


@dataclass(frozen=True)
class Options:
    """How the engines compute."""

    precision: str  # of PRECISIONS
    kernels: Kernels
    by_row: bool = True  # FP8 weights have a scale for each output channel; False: one for all

    @classmethod
    def of(cls, precision: str, device: torch.device, by_row: bool = True) -> "Options":
        return cls(precision, on_gpu() if device.type == "cuda" else plain(), by_row)


class GpuEngines(OneState):
    """All graphs of one generator and VAE on one device."""

    backend = BACKEND
    overlapped = True

    def __init__(
        self,
        generator: Generator,
        vae: Vae,
        scales: Scales | None,
        options: Options,
        decoder: bool = True,
    ) -> None:
        """Take over the networks, which lie on the device in any floating-point type.

        `fp8` needs `scales`. Without `decoder` there are no frames, and nothing waits until the
        forms of its convolutions are timed.
        """
        profile, device, dtype = (
            generator.profile,
            generator.step_spread.device,
            PRECISIONS[options.precision],
        )
        assert (options.precision == "fp8") == (scales is not None), f"{options.precision=}"
        self.precision = options.precision
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # shapes never change
        settle(generator, dtype)
        vae.requires_grad_(False)
        vae.encoder.float()
        # A thread block of attention takes a whole multiprocessor, so it would wait for those that
        # the decoder keeps busy with its smaller ones.
        main, beside = Lane(device, priority=-1), Lane(device)
        cache: Cache
        if scales is None:
            layers, cache = (
                wide_layers(generator, dtype),
                Tokens(profile, options.kernels, dtype, device),
            )
        else:
            layers = fp8_layers(generator, scales, options.kernels, dtype, device, options.by_row)
            cache = Tiles(profile, options.kernels, scales.attention, device)
        for block in generator.step_blocks:
            for name in LINEARS:
                delattr(block, name)  # the step has them in its own form
        latent = (profile.latent_height, profile.latent_width)
        self.engines: dict[str, GpuEngine] = {
            "encoder": GpuEncoder(vae, main),
            "prompt": GpuPrompt(generator, dtype, main),
            "generator": GpuGenerator(
                Step(generator, layers, cache, options.kernels, dtype), profile, main
            ),
        }
        if decoder:
            streaming = StreamDecoder(vae.decoder, *latent, dtype)
            self.engines["decoder"] = GpuDecoder(streaming, profile, beside)
        if not profile.text.tokens:
            del self.engines["prompt"]
        if device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def generator(self) -> GpuGenerator:
        generator = self.engines["generator"]
        assert isinstance(generator, GpuGenerator)
        return generator

    def __getitem__(self, graph: str) -> GpuEngine:
        return self.engines[graph]

    def close(self) -> None:
        self.engines.clear()


def settle(generator: Generator, dtype: torch.dtype) -> None:
    """Give every weight but the visual stream's products the type it runs in: the text `dtype`; embeddings, modulation and head float32."""
    blocks, text = range(len(generator.step_blocks)), generator.prompt_parameters()
    products = {
        f"{generator.STEP}.{i}.{name}.{kind}"
        for i in blocks
        for name in LINEARS
        for kind in ("weight", "bias")
    }
    for name, parameter in generator.named_parameters():
        parameter.requires_grad_(False)
        if name not in products:
            parameter.data = parameter.data.to(dtype if name in text else torch.float32)


# Opening


def open_bundle(bundle: Bundle, precision: str) -> GpuEngines:
    """The checkpoint inside `bundle` on the GPU. Raises MachineError without one or where its memory is too small, UsageError for a precision that
    does not exist or that the bundle has no scales for."""
    if precision == "fp8" and bundle.manifest.get("precision") != "fp8":
        raise UsageError(
            f"bundle {bundle.path} has no FP8 scales",
            "export it with: aapt export CKPT -o BUNDLE --precision fp8",
        )
    device = the_gpu(bundle.profile, precision)
    scales = (
        scale_files.load(bundle.checked(scale_files.FILE), bundle.profile)
        if precision == "fp8"
        else None
    )
    loaded = checkpoint_of(bundle)
    with memory_for(bundle.profile):
        return GpuEngines(
            loaded.generator.to(device),
            loaded.vae.to(device),
            scales,
            Options.of(precision, device),
        )


def open_random(profile: Profile, precision: str | None) -> GpuEngines:
    """Random weights in the shape of `profile` on the GPU; None is the profile's own precision. Raises as `open_bundle`."""
    precision = precision or ("fp8" if profile.precision.weights.startswith("fp8") else "bf16")
    device = the_gpu(profile, precision)
    with memory_for(profile):
        return random_engines(profile, precision, 0, device)


def the_gpu(profile: Profile, precision: str) -> torch.device:
    """Raises UsageError for a precision or a profile, and MachineError for a machine, that this engine is not for."""
    refuse_unknown("torch-cuda", precision)  # fp32 is for tests
    if not torch.cuda.is_available():
        raise MachineError(
            "PyTorch finds no CUDA GPU",
            "aapt doctor tells what is missing; --device cpu runs a bundle on the CPU",
        )
    if precision == "fp8":
        check_fp8(profile, torch.cuda.get_device_capability())
    return torch.device("cuda")


@contextlib.contextmanager
def memory_for(profile: Profile) -> Iterator[None]:
    """Turns the GPU's full memory into an error that says what would help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        wanted = str(error).partition(".")[0]
        raise MachineError(
            f"profile {profile.name} does not fit into the memory of {torch.cuda.get_device_name()}: {wanted}",
            f"aapt plan {profile.name} tells what it needs; see what else runs with nvidia-smi",
        ) from None


def check_fp8(profile: Profile, capability: tuple[int, int]) -> None:
    """Raises MachineError for a GPU, and UsageError for a shape, that the FP8 kernels are not for."""
    if capability != (9, 0):
        found = ".".join(map(str, capability))
        raise MachineError(
            f"the FP8 kernels are for Hopper GPUs (9.0: H100, H200), this one has compute capability {found}",
            "take --precision bf16",
        )
    if profile.head_dim not in hopper_fp8.HEAD_DIMS:
        dims = " or ".join(map(str, hopper_fp8.HEAD_DIMS))
        raise UsageError(
            f"profile {profile.name} has heads of {profile.head_dim}; the FP8 kernels want {dims}",
            "take --precision bf16",
        )


def random_engines(
    profile: Profile,
    precision: str,
    seed: int,
    device: torch.device,
    by_row: bool = True,
    decoder: bool = True,
) -> GpuEngines:
    """Engines of random weights of realistic scale, drawn on `device` in seconds: an 8B profile can be timed without a file."""
    options, dtype = Options.of(precision, device, by_row), PRECISIONS[precision]
    generator, vae = random_networks(profile, dtype, seed, device)
    scales = noise_scales(generator, options, seed) if precision == "fp8" else None
    return GpuEngines(generator, vae, scales, options, decoder)


def random_networks(
    profile: Profile, dtype: torch.dtype, seed: int, device: torch.device
) -> tuple[Generator, Vae]:
    """Networks with random weights of `dtype` on `device`."""
    with torch.device("meta"):
        generator, vae = checkpoint.build(profile)
    checkpoint.draw(generator, vae, seed, device, dtype)
    channels, patch = profile.video.latent_channels, profile.model.patch
    size, halo, skip = generator.skip.kernel_size[0], profile.model.halo, generator.skip.weight.data
    for channel in range(
        channels
    ):  # a pull of the latent before towards zero, or a stream of noise would wander off
        for pixel in range(patch * patch):
            at = (halo + pixel // patch) * size + halo + pixel % patch
            skip[channel * patch * patch + pixel, channels + channel].view(-1)[at] = PULL
    return generator, vae


def random_text(profile: Profile, seed: int) -> np.ndarray | None:
    """One prompt for networks that never saw a word; None for a generator without text."""
    if not profile.text.tokens:
        return None
    rng, spec = np.random.default_rng(seed), signatures(profile)["prompt"].inputs[0]
    return (
        rng.standard_normal(spec.shape, np.float32)
        if spec.dtype == "float32"
        else rng.integers(0, 4, spec.shape)
    )


def noise_scales(generator: Generator, options: Options, seed: int) -> Scales:
    """FP8 scales seen in passes over noise and one random prompt; the generator's types are settled."""
    device, dtype = generator.step_spread.device, PRECISIONS[options.precision]
    settle(generator, dtype)
    with torch.no_grad():
        words = random_text(generator.profile, seed)
        text = None
        if words is not None:
            given = torch.from_numpy(words).to(device)
            text = generator.prompt(given.to(dtype) if given.is_floating_point() else given)
        return calibrate(generator, wide_layers(generator, dtype), options.kernels, dtype, text)
