"""Read, write and check checkpoints.

A checkpoint is one safetensors file that describes itself. It has tensors `generator.*` and
`vae.*`, the profile in its metadata, and start frames. Weights are stored in float16 or float32 and
run in float32. Nothing is unpickled, and nothing is loaded before the file's hash is checked.
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
UNMEASURED = 0.5  # a buffer of random networks, in place of a deviation of the training data
LISTED = 8  # names shown of each kind of problem, after their count


class StartFrame(NamedTuple):
    """A picture to start a stream from."""

    image: Tensor  # uint8 [H, W, 3]
    prompt: str  # describes it


@dataclass(frozen=True)
class Stored:
    """A checkpoint on the disk that has been checked. Weights are read one by one, on demand."""

    profile: Profile
    sha256: str
    path: Path
    start_frames: dict[str, StartFrame]

    def tensor(self, name: str) -> Tensor:
        """Read one weight in float32. Raises CheckpointError if the file is gone."""
        try:
            with safe_open(self.path, framework="pt") as file:
                value: Tensor = file.get_tensor(name)
                return value.float()
        except (SafetensorError, OSError) as error:
            gone = f"checkpoint {self.path} cannot be read any more: {error}"
            raise CheckpointError(gone, "leave the file alone while it is in use") from None


@dataclass(frozen=True)
class Checkpoint(Stored):
    """The networks of one checkpoint, in evaluation mode, and their source."""

    generator: Generator
    vae: Vae


def save(
    path: Path, profile: Profile, generator: Generator, vae: Vae,
    training: dict[str, object], start_frames: dict[str, StartFrame],
) -> None:  # fmt: skip
    """Write a checkpoint in float16, whole or not at all. `path` is replaced.

    `training` is written as JSON into the metadata.
    Raises OutputError if it cannot be written or `path` is a folder, a pipe or a device.
    """
    networks = _weights(generator, vae).items()
    tensors = {name: tensor.to(torch.float16).contiguous() for name, tensor in networks}
    tensors |= {START + name: frame.image.contiguous() for name, frame in start_frames.items()}
    prompts = json.dumps({name: frame.prompt for name, frame in start_frames.items()})
    metadata = {"format": FORMAT, "profile": profile.dumps(), "training": json.dumps(training)}
    metadata["start"] = prompts
    hint = "name a file in a folder that exists, with room for it"
    with writing(f"checkpoint {path}", hint, SafetensorError), whole(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _weights(generator: Generator, vae: Vae) -> dict[str, Tensor]:
    """Return all weights by their names in a checkpoint."""
    parts = {"generator": generator.state_dict(), "vae": vae.state_dict()}
    return {f"{part}.{name}": t for part, state in parts.items() for name, t in state.items()}


def load(path: Path, sha256: str | None = None) -> Checkpoint:
    """Read a checkpoint with its networks. Raises as `stored` does."""
    found = stored(path, sha256)
    generator, vae = build(found.profile)
    for part, module in (("generator", generator), ("vae", vae)):
        names = module.state_dict()
        module.load_state_dict({name: found.tensor(f"{part}.{name}") for name in names})
    return Checkpoint(**vars(found), generator=generator, vae=vae)


def stored(path: Path, sha256: str | None = None) -> Stored:
    """Check a checkpoint, one tensor at a time, and keep no weight in memory.

    Raises CheckpointError if the file is missing or damaged, or has another format or hash.
    Raises CheckpointError if tensors are missing, surplus, misshapen, mistyped or not finite,
    with all of them in one message.
    Raises ProfileError if the profile inside is invalid.
    """
    digest = _digest(path)
    if sha256 is not None and digest != sha256:
        other = f"checkpoint {path} has sha256 {digest}, expected {sha256}"
        raise CheckpointError(other, "the file is damaged or not the one meant; fetch it again")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            starts = {name: file.get_tensor(name) for name in names if name.startswith(START)}
            if metadata.get("format") != FORMAT or "profile" not in metadata:
                found = metadata.get("format", "no format entry")
                wrong = f"checkpoint {path} is not of format {FORMAT}: {found}"
                raise CheckpointError(wrong, "write it with `aapt train` or `aapt init`")
            profile = profiles.loads(metadata["profile"], f"inside {path}")
            start_frames = _start_frames(profile, metadata, starts, path)
            networks = sorted(names - {START + name for name in start_frames})
            _refuse_unfit(profile, ((name, file.get_tensor(name)) for name in networks), path)
    except (SafetensorError, OSError, ValueError) as error:
        unreadable = f"checkpoint {path} is not a readable safetensors file: {error}"
        raise CheckpointError(unreadable, "fetch it again, or convert it") from None
    return Stored(profile, digest, path, start_frames)


def hollow(profile: Profile) -> tuple[Generator, Vae]:
    """Build the networks for tracing, with one expanded zero as each weight, in no memory."""
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
    """Build generator and VAE of a profile with fresh weights, in evaluation mode."""
    return family_of(profile).networks().build(profile)


def draw(
    generator: Generator, vae: Vae, seed: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Draw random weights of realistic scale, on `device`, for networks on the meta device."""
    networks, rng = family_of(generator.profile).networks(), torch.Generator(device)
    computed = networks.computed(generator.profile)
    rng.manual_seed(seed)
    for inside, owner in (*generator.named_modules(), *vae.named_modules()):
        zero = networks.zero_at_first(inside)
        for name, parameter in list(owner.named_parameters(recurse=False)):
            put(owner, name, _drawn(name, parameter.shape, rng, dtype, zero))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            value = computed.get(name, torch.full(buffer.shape, UNMEASURED, device=device))
            setattr(owner, name, value.to(device))


def _drawn(
    name: str, shape: torch.Size, rng: torch.Generator, dtype: torch.dtype, zero: bool
) -> Tensor:
    """Draw one parameter: norms one, biases and modulation small, matrices 1 / sqrt(fan-in)."""
    if zero or name.startswith("norm"):
        return torch.full(shape, float(not zero), dtype=dtype, device=rng.device)
    scale = 0.02 if len(shape) < 2 or name == "modulation" else 1 / math.sqrt(math.prod(shape[1:]))
    return torch.randn(shape, generator=rng, dtype=dtype, device=rng.device) * scale


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        unreadable = f"checkpoint {path} cannot be read: {error.strerror}"
        raise CheckpointError(unreadable, "give the path of a .safetensors checkpoint") from None


def _start_frames(
    profile: Profile, metadata: dict[str, str], tensors: dict[str, Tensor], path: Path
) -> dict[str, StartFrame]:
    """Take the start frames out of `tensors`."""
    try:
        frames = {
            str(name): StartFrame(tensors.pop(START + name), str(prompt))
            for name, prompt in json.loads(metadata.get("start", "{}")).items()
        }
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        damaged = f"checkpoint {path} has a damaged list of start frames: {error}"
        raise CheckpointError(damaged, "fetch it again") from None
    wanted = [profile.video.height, profile.video.width, PIXEL_CHANNELS]
    for name, frame in frames.items():
        dtype, shape = frame.image.dtype, list(frame.image.shape)
        known = re.fullmatch(r"[a-z0-9-]{1,40}", name)
        if not known or dtype != torch.uint8 or shape != wanted:
            found = f"{dtype} {shape}"
            other = f"checkpoint {path}: start frame {name!r} is {found}, not uint8 {list(wanted)}"
            raise CheckpointError(other, "write it again with `aapt train`")
    return frames


def _refuse_unfit(profile: Profile, weights: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Raise CheckpointError if the file's weights are not those of the profile."""
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in _weights(*build(profile)).items()}
    kinds = ("missing", "surplus", "misshapen", "mistyped", "not finite")
    problems: dict[str, list[str]] = {kind: [] for kind in kinds}
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
    found = []
    for kind, names in problems.items():
        listed = ", ".join(names[:LISTED] + ["…"] * (len(names) > LISTED))
        if names:
            found.append(f"{len(names)} {kind}: {listed}")
    if found:
        unfit = f"checkpoint {path} does not fit its profile: {'; '.join(found)}"
        raise CheckpointError(unfit, "export it with the version that trained it")
