"""`aapt init`: a checkpoint of random weights in any profile's shape, to size an engine before anything is trained.

The networks are built on the meta device and drawn straight into float16, so they never exist in float32.
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


def random_checkpoint(profile: Profile, path: Path, seed: int, device: str = "cpu", overwrite: bool = False) -> int:
    """Write random weights of realistic scale for `profile` to `path`. Returns the parameter count. A GPU draws them in seconds, and others.

    Raises UsageError for an unknown device or a seed above LARGEST_SEED, MachineError when they do not fit into memory, OutputError when the file
    cannot be written, or exists and `overwrite` is off.
    """
    refuse_irregular(path)
    if os.path.exists(path) and not overwrite:  # now, and not after minutes of drawing: it may be hours of somebody's training
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
        raise MachineError("weights cannot be drawn on a GPU: PyTorch finds none", "leave out --device cuda; aapt doctor tells what is missing")
    if 2 * count > SPARE * free:
        raise MachineError(
            f"{profile.name} has {count / 1e9:.1f}e9 parameters, {2 * count / 1e9:.0f} GB in float16; {free / 1e9:.0f} GB of memory are free",
            "use a machine with more memory, or a smaller profile",
        )
    checkpoint.draw(generator, vae, seed, torch.device(device), torch.float16)
    checkpoint.save(path, profile, generator, vae, {"stage": "random", "seed": seed}, {})
    return count
