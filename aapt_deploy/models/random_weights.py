"""`aapt init`: write a checkpoint of random weights, to size an engine before training.

The networks are built on the meta device and drawn in float16, so they never exist in float32.
"""

import os
from pathlib import Path

import torch

from aapt_deploy.bundle.files import free_memory_bytes, refuse_irregular
from aapt_deploy.errors import MachineError, OutputError, UsageError
from aapt_deploy.models import checkpoint
from aapt_deploy.profiles import Profile

SPARE = 0.85  # share of the free memory that weights may take
LARGEST_SEED = 2**64 - 1  # PyTorch's


def random_checkpoint(
    profile: Profile, path: Path, seed: int, device: str = "cpu", overwrite: bool = False
) -> int:
    """Write random weights of realistic scale for `profile` to `path`; return their number.

    A GPU draws in seconds, and other numbers. Raises UsageError for an unknown device or a seed
    above LARGEST_SEED. Raises MachineError if they do not fit into memory. Raises OutputError if
    the file cannot be written, or exists and `overwrite` is off.
    """
    refuse_irregular(path)
    if os.path.exists(path) and not overwrite:  # now, not after minutes of drawing
        raise OutputError(f"checkpoint {path} exists", "add --force to replace it")
    with torch.device("meta"):
        generator, vae = checkpoint.build(profile)
    count = sum(p.numel() for module in (generator, vae) for p in module.parameters())
    free = free_memory_bytes()
    if seed > LARGEST_SEED:
        raise UsageError(f"--seed {seed} is above {LARGEST_SEED}", "take a smaller one")
    if device not in ("cpu", "cuda"):
        raise UsageError(f"weights cannot be drawn on device {device!r}", "devices: cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        hint = "leave out --device cuda; aapt doctor tells what is missing"
        raise MachineError("weights cannot be drawn on a GPU: PyTorch finds none", hint)
    if 2 * count > SPARE * free:
        size = f"{count / 1e9:.1f}e9 parameters, {2 * count / 1e9:.0f} GB in float16"
        raise MachineError(
            f"{profile.name} has {size}; {free / 1e9:.0f} GB of memory are free",
            "use a machine with more memory, or a smaller profile",
        )
    checkpoint.draw(generator, vae, seed, torch.device(device), torch.float16)
    checkpoint.save(path, profile, generator, vae, {"stage": "random", "seed": seed}, {})
    return count
