"""PyTorch on an NVIDIA GPU without TensorRT: one captured CUDA graph for a pass.

Attention runs in our kernels, linear layers in FP8, and small operations are fused.

    lane 1   encoder, prompt, generator   inputs up, graph, `clean` down; the graph begins with the
                                          commit of the block before (step.py)
    lane 2   decoder                      latent up, graph, uint8 frames down to pinned memory
                                          (decoder.py)

Length and slot travel with the other inputs and are read on the device, so one graph serves every
block. The text's keys and values are computed once per prompt and written in front of every cache.
A pass runs the visual stream alone. All memory is allocated when the engines are opened.

    fp8    the bundle's static scales, for linear layers and caches; Hopper GPUs only
    bf16   any CUDA GPU
    fp32   for tests: the same step and the same engines on a CPU, with plain kernels
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from aapt_deploy.backends.table import refuse_unknown
from aapt_deploy.backends.torch_cuda.calibrate import calibrate
from aapt_deploy.backends.torch_cuda.decoder import StreamDecoder
from aapt_deploy.backends.torch_cuda.graphs import (
    GpuDecoder,
    GpuEncoder,
    GpuEngine,
    GpuGenerator,
    GpuPrompt,
)
from aapt_deploy.backends.torch_cuda.kernels import Kernels, on_gpu, plain
from aapt_deploy.backends.torch_cuda.lane import Lane
from aapt_deploy.backends.torch_cuda.step import (
    LINEARS,
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
from aapt_deploy.errors import MachineError, UsageError
from aapt_deploy.models import checkpoint
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.models.aapt.vae import Vae
from aapt_deploy.ops.block_causal_attention import hopper_fp8
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.engine import OneState

BACKEND = "torch-cuda"
# Precision -> type of the activations.
PRECISIONS = {"fp8": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}
PULL = -0.8  # of random networks, in units of a step's deviation


@dataclass(frozen=True)
class Options:
    """Precision and kernels of the engines."""

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
        self, generator: Generator, vae: Vae, scales: Scales | None, options: Options,
        decoder: bool = True,
    ) -> None:  # fmt: skip
        """Take over the networks, on the device in any floating-point type.

        `fp8` needs `scales`. Without `decoder` there are no frames, and the forms of its
        convolutions are not timed.
        """
        profile, kernels = generator.profile, options.kernels
        device, dtype = generator.step_spread.device, PRECISIONS[options.precision]
        assert (options.precision == "fp8") == (scales is not None), f"{options.precision=}"
        self.precision = options.precision
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # shapes never change
        settle(generator, dtype)
        vae.requires_grad_(False)
        vae.encoder.float()
        # A thread block of attention takes a whole multiprocessor, so without priority it would
        # wait for those that run the decoder's smaller ones.
        main, beside = Lane(device, priority=-1), Lane(device)
        cache: Cache
        if scales is None:
            layers = wide_layers(generator, dtype)
            cache = Tokens(profile, kernels, dtype, device)
        else:
            layers = fp8_layers(generator, scales, kernels, dtype, device, options.by_row)
            cache = Tiles(profile, kernels, scales.attention, device)
        for block in generator.step_blocks:
            for name in LINEARS:
                delattr(block, name)  # `layers` has them in the step's form
        latent = (profile.latent_height, profile.latent_width)
        step = Step(generator, layers, cache, kernels, dtype)
        self.engines: dict[str, GpuEngine] = {
            "encoder": GpuEncoder(vae, main),
            "prompt": GpuPrompt(generator, dtype, main),
            "generator": GpuGenerator(step, profile, main),
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
    """Convert every weight but those of the visual stream's products to its type.

    The text has `dtype`; embeddings, modulation and head have float32.
    """
    blocks, text = range(len(generator.step_blocks)), generator.prompt_parameters()
    layers = [f"{generator.STEP}.{i}.{name}" for i in blocks for name in LINEARS]
    products = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    for name, parameter in generator.named_parameters():
        parameter.requires_grad_(False)
        if name not in products:
            parameter.data = parameter.data.to(dtype if name in text else torch.float32)


# Opening


def open_bundle(bundle: Bundle, precision: str) -> GpuEngines:
    """Open the checkpoint inside `bundle` on the GPU.

    Raises MachineError if there is no GPU, or if its memory is too small.
    Raises UsageError if the precision does not exist, or if the bundle has no scales for it.
    """
    fp8 = precision == "fp8"
    if fp8 and bundle.manifest.get("precision") != "fp8":
        hint = "export it with: aapt export CKPT -o BUNDLE --precision fp8"
        raise UsageError(f"bundle {bundle.path} has no FP8 scales", hint)
    device = the_gpu(bundle.profile, precision)
    path = bundle.checked(scale_files.FILE) if fp8 else None
    scales = scale_files.load(path, bundle.profile) if path else None
    loaded = checkpoint_of(bundle)
    with memory_for(bundle.profile):
        networks = loaded.generator.to(device), loaded.vae.to(device)
        return GpuEngines(*networks, scales, Options.of(precision, device))


def open_random(profile: Profile, precision: str | None) -> GpuEngines:
    """Open random weights in the shape of `profile` on the GPU.

    Without `precision` it is the profile's own. Raises as `open_bundle`.
    """
    precision = precision or ("fp8" if profile.precision.weights.startswith("fp8") else "bf16")
    device = the_gpu(profile, precision)
    with memory_for(profile):
        return random_engines(profile, precision, 0, device)


def the_gpu(profile: Profile, precision: str) -> torch.device:
    """Return the GPU.

    Raises UsageError if the precision or the profile is not for this engine.
    Raises MachineError if the machine is not.
    """
    refuse_unknown("torch-cuda", precision)  # fp32 is for tests
    if not torch.cuda.is_available():
        hint = "aapt doctor tells what is missing; --device cpu runs a bundle on the CPU"
        raise MachineError("PyTorch finds no CUDA GPU", hint)
    if precision == "fp8":
        check_fp8(profile, torch.cuda.get_device_capability())
    return torch.device("cuda")


@contextlib.contextmanager
def memory_for(profile: Profile) -> Iterator[None]:
    """Raise MachineError, with a hint, if the GPU's memory is full."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        wanted = str(error).partition(".")[0]
        raise MachineError(
            f"profile {profile.name} does not fit into the memory of "
            f"{torch.cuda.get_device_name()}: {wanted}",
            f"aapt plan {profile.name} tells what it needs; see what else runs with nvidia-smi",
        ) from None


def check_fp8(profile: Profile, capability: tuple[int, int]) -> None:
    """Refuse a GPU or a shape that the FP8 kernels are not for.

    Raises MachineError if the GPU is not a Hopper, UsageError if the heads have another size.
    """
    if capability != (9, 0):
        found = ".".join(map(str, capability))
        raise MachineError(
            "the FP8 kernels are for Hopper GPUs (9.0: H100, H200), "
            f"this one has compute capability {found}",
            "take --precision bf16",
        )
    if profile.head_dim not in hopper_fp8.HEAD_DIMS:
        dims = " or ".join(map(str, hopper_fp8.HEAD_DIMS))
        raise UsageError(
            f"profile {profile.name} has heads of {profile.head_dim}; the FP8 kernels want {dims}",
            "take --precision bf16",
        )


def random_engines(
    profile: Profile, precision: str, seed: int, device: torch.device,
    by_row: bool = True, decoder: bool = True,
) -> GpuEngines:  # fmt: skip
    """Open engines of random weights of realistic scale, drawn on `device`.

    They take seconds, so an 8B profile can be timed without a file.
    """
    options, dtype = Options.of(precision, device, by_row), PRECISIONS[precision]
    generator, vae = random_networks(profile, dtype, seed, device)
    scales = noise_scales(generator, options, seed) if precision == "fp8" else None
    return GpuEngines(generator, vae, scales, options, decoder)


def random_networks(
    profile: Profile, dtype: torch.dtype, seed: int, device: torch.device
) -> tuple[Generator, Vae]:
    """Draw networks with random weights of `dtype` on `device`."""
    with torch.device("meta"):
        generator, vae = checkpoint.build(profile)
    checkpoint.draw(generator, vae, seed, device, dtype)
    channels, patch = profile.video.latent_channels, profile.model.patch
    size, halo, skip = generator.skip.kernel_size[0], profile.model.halo, generator.skip.weight.data
    # Pull the latent before towards zero, or a stream of noise would drift without bound.
    for channel in range(channels):
        for pixel in range(patch * patch):
            at = (halo + pixel // patch) * size + halo + pixel % patch
            skip[channel * patch * patch + pixel, channels + channel].view(-1)[at] = PULL
    return generator, vae


def random_text(profile: Profile, seed: int) -> np.ndarray | None:
    """Return a random prompt; None if the generator has no text."""
    if not profile.text.tokens:
        return None
    rng, spec = np.random.default_rng(seed), signatures(profile)["prompt"].inputs[0]
    if spec.dtype == "float32":
        return rng.standard_normal(spec.shape, np.float32)
    return rng.integers(0, 4, spec.shape)


def noise_scales(generator: Generator, options: Options, seed: int) -> Scales:
    """Calibrate FP8 scales by passes over noise and one random prompt.

    It converts the generator's weights, as `settle` does.
    """
    device, dtype = generator.step_spread.device, PRECISIONS[options.precision]
    settle(generator, dtype)
    with torch.no_grad():
        words = random_text(generator.profile, seed)
        text = None
        if words is not None:
            given = torch.from_numpy(words).to(device)
            text = generator.prompt(given.to(dtype) if given.is_floating_point() else given)
        return calibrate(generator, wide_layers(generator, dtype), options.kernels, dtype, text)
