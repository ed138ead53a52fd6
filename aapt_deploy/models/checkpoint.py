"""A checkpoint is one safetensors file that describes itself: tensors `generator.*` and `vae.*`, the profile in its metadata, and start frames.

Weights are stored in float16 or float32 and run in float32. Nothing is unpickled, and nothing is loaded before the file's hash is known.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from aapt_deploy import profiles
from aapt_deploy.bundle.files import whole, writing
from aapt_deploy.errors import CheckpointError
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.vae import Vae
from aapt_deploy.models.family import family_of
from aapt_deploy.profiles import PIXEL_CHANNELS, Profile

FORMAT = "aapt-checkpoint-1"
START = "start."  # prefix of start frames among the tensors
STORED = (torch.float16, torch.bfloat16, torch.float32)  # what a weight may be stored as
UNMEASURED = 0.5  # a buffer of random networks: what a checkpoint keeps of its training data are deviations, and there is no data
LISTED = 8  # names shown of each kind of problem; the count is always whole


class StartFrame(NamedTuple):
    """A picture to start a stream from."""

    image: Tensor  # uint8 [H, W, 3]
    prompt: str  # what it shows


@dataclass(frozen=True)
class Stored:
    """A checkpoint on the disk that was found whole. Weights are read one by one, when they are asked for."""

    profile: Profile
    sha256: str
    path: Path
    start_frames: dict[str, StartFrame]

    def tensor(self, name: str) -> Tensor:
        """One weight, `generator.*` or `vae.*`, in float32. Raises CheckpointError when the file has gone."""
        try:
            with safe_open(self.path, framework="pt") as file:
                value: Tensor = file.get_tensor(name)
                return value.float()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"checkpoint {self.path} cannot be read any more: {error}", "leave the file alone while it is in use") from None


@dataclass(frozen=True)
class Checkpoint(Stored):
    """The networks of one checkpoint, in evaluation mode, and where they came from."""

    generator: Generator
    vae: Vae


def save(path: Path, profile: Profile, generator: Generator, vae: Vae, training: dict[str, object], start_frames: dict[str, StartFrame]) -> None:
    """Write a checkpoint in float16, in place of an older file at `path`. `training` is kept as JSON in the metadata.

    It is there whole or not at all. Raises OutputError, also where `path` is a folder, a pipe or a device.
    """
    tensors = {f"generator.{name}": t for name, t in generator.state_dict().items()}
    tensors |= {f"vae.{name}": t for name, t in vae.state_dict().items()}
    tensors = {name: t.to(torch.float16).contiguous() for name, t in tensors.items()}
    tensors |= {START + name: frame.image.contiguous() for name, frame in start_frames.items()}
    prompts = json.dumps({name: frame.prompt for name, frame in start_frames.items()})
    metadata = {"format": FORMAT, "profile": profile.dumps(), "training": json.dumps(training), "start": prompts}
    with writing(f"checkpoint {path}", "name a file in a folder that exists, with room for it", SafetensorError), whole(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load(path: Path, sha256: str | None = None) -> Checkpoint:
    """Read a checkpoint with its networks. Raises as `stored` does."""
    found = stored(path, sha256)
    generator, vae = build(found.profile)
    for part, module in (("generator", generator), ("vae", vae)):
        module.load_state_dict({name: found.tensor(f"{part}.{name}") for name in module.state_dict()})
    return Checkpoint(**vars(found), generator=generator, vae=vae)


def stored(path: Path, sha256: str | None = None) -> Stored:
    """Check a checkpoint, one tensor at a time, and keep no weight; with `sha256`, only if the file has that hash.

    Raises CheckpointError for a file that is missing, damaged or another format, and for tensors that are missing, surplus, misshapen, mistyped or
    not finite (all of them in one message), and ProfileError for the profile inside.
    """
    digest = _digest(path)
    if sha256 is not None and digest != sha256:
        raise CheckpointError(f"checkpoint {path} has sha256 {digest}, expected {sha256}", "the file is damaged or not the one meant; fetch it again")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            starts = {name: file.get_tensor(name) for name in names if name.startswith(START)}
            if metadata.get("format") != FORMAT or "profile" not in metadata:
                found = metadata.get("format", "no format entry")
                raise CheckpointError(f"checkpoint {path} is not of format {FORMAT}: {found}", "write it with `aapt train` or `aapt init`")
            profile = profiles.loads(metadata["profile"], f"inside {path}")
            start_frames = _start_frames(profile, metadata, starts, path)
            weights = ((name, file.get_tensor(name)) for name in sorted(names - {START + name for name in start_frames}))
            _refuse_unfit(profile, weights, path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is not a readable safetensors file: {error}", "fetch it again, or convert it") from None
    return Stored(profile, digest, path, start_frames)


def hollow(profile: Profile) -> tuple[Generator, Vae]:
    """The networks as `build` makes them, but every weight is a single zero seen as its full shape: for tracing, in no memory."""
    with torch.device("meta"):
        generator, vae = build(profile)
    for module in (generator, vae):
        for name, value in module.state_dict().items():
            put(module, name, torch.zeros(()).expand(value.shape))
    for name, value in family_of(profile).networks().computed(profile).items():
        put(generator, name, value)
    return generator, vae


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Set one parameter or buffer of `module` by its path."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if leaf in owner._parameters:
        owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    else:
        setattr(owner, leaf, value)


def build(profile: Profile) -> tuple[Generator, Vae]:
    """Generator and VAE of a profile with fresh weights, in evaluation mode."""
    return family_of(profile).networks().build(profile)


def draw(generator: Generator, vae: Vae, seed: int, device: torch.device, dtype: torch.dtype) -> None:
    """Give networks that were built on the meta device random weights of realistic scale, tensor by tensor, on `device` in `dtype`."""
    rng, networks = torch.Generator(device).manual_seed(seed), family_of(generator.profile).networks()
    computed = networks.computed(generator.profile)
    for module in (generator, vae):
        for inside, owner in module.named_modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                zero = networks.zero_at_first(inside)
                drawn = torch.zeros(parameter.shape, dtype=dtype, device=device) if zero else _drawn(name, parameter.shape, rng, dtype)
                owner.register_parameter(name, nn.Parameter(drawn, requires_grad=False))
            for name, buffer in list(owner.named_buffers(recurse=False)):
                setattr(owner, name, computed[name].to(device) if name in computed else torch.full(buffer.shape, UNMEASURED, device=device))


def _drawn(name: str, shape: torch.Size, rng: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Norm weights stay at one, biases and modulation small, matrices at 1 / sqrt(fan-in)."""
    if name.startswith("norm"):
        return torch.ones(shape, dtype=dtype, device=rng.device)
    scale = 0.02 if len(shape) < 2 or name == "modulation" else 1 / math.sqrt(math.prod(shape[1:]))
    return torch.randn(shape, generator=rng, dtype=dtype, device=rng.device) * scale


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}", "give the path of a .safetensors checkpoint") from None


def _start_frames(profile: Profile, metadata: dict[str, str], tensors: dict[str, Tensor], path: Path) -> dict[str, StartFrame]:
    """Take the start frames out of `tensors`."""
    try:
        frames = {str(name): StartFrame(tensors.pop(START + name), str(prompt)) for name, prompt in json.loads(metadata.get("start", "{}")).items()}
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path} has a damaged list of start frames: {error}", "fetch it again") from None
    shape = (profile.video.height, profile.video.width, PIXEL_CHANNELS)
    for name, frame in frames.items():
        if not re.fullmatch(r"[a-z0-9-]{1,40}", name) or frame.image.dtype != torch.uint8 or tuple(frame.image.shape) != shape:
            found = f"{frame.image.dtype} {list(frame.image.shape)}"
            raise CheckpointError(f"checkpoint {path}: start frame {name!r} is {found}, not uint8 {list(shape)}", "write it again with `aapt train`")
    return frames


def _refuse_unfit(profile: Profile, weights: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Compare the file's weights with what the profile asks for, one after the other."""
    with torch.device("meta"):
        generator, vae = build(profile)
    wanted = {f"{part}.{name}": t.shape for part, module in (("generator", generator), ("vae", vae)) for name, t in module.state_dict().items()}
    problems: dict[str, list[str]] = {kind: [] for kind in ("missing", "surplus", "misshapen", "mistyped", "not finite")}
    for name, tensor in weights:
        shape = wanted.pop(name, None)
        if shape is None:
            problems["surplus"].append(name)
            continue
        if shape != tensor.shape:
            problems["misshapen"].append(f"{name} {list(tensor.shape)} instead of {list(shape)}")
        if tensor.dtype not in STORED:
            problems["mistyped"].append(f"{name} {tensor.dtype}")
        elif not torch.isfinite(tensor).all():
            problems["not finite"].append(name)
    problems["missing"] = sorted(wanted)
    found = [f"{len(names)} {kind}: {', '.join(names[:LISTED])}{', …' if len(names) > LISTED else ''}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(f"checkpoint {path} does not fit its profile: {'; '.join(found)}", "export it with the version that trained it")
