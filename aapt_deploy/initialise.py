"""`aapt init`: a checkpoint of random weights in any profile's shape, to size an engine before anything is trained.

Tensors are drawn one by one straight into float16 from the shapes on the meta device, so the networks never exist in float32.
"""

import math
import os
from pathlib import Path

import torch

from aapt_deploy.errors import MachineError, OutputError
from aapt_deploy.models import checkpoint
from aapt_deploy.profiles import Profile

SPARE = 0.85  # share of the free memory that weights may take
UNMEASURED = 0.5  # what a checkpoint keeps of its training data are deviations; there is no data here


def random_checkpoint(profile: Profile, path: Path, seed: int) -> int:
    """Write random weights of realistic scale for `profile` to `path`. Returns the parameter count.

    Raises MachineError when they do not fit into memory, OutputError when the file cannot be written.
    """
    with torch.device("meta"):
        generator, vae = checkpoint.build(profile)
    count = sum(p.numel() for module in (generator, vae) for p in module.parameters())
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 2 * count > SPARE * free:
        raise MachineError(
            f"{profile.name} has {count / 1e9:.1f}e9 parameters, {2 * count / 1e9:.0f} GB in float16; {free / 1e9:.0f} GB of memory are free",
            "use a machine with more memory, or a smaller profile",
        )
    rng = torch.Generator().manual_seed(seed)
    for module in (generator, vae):
        for path_inside, owner in module.named_modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                # The linear predictor feeds a latent back into itself: random, it would double it block by block. Training starts it at zero.
                drawn = torch.zeros(parameter.shape, dtype=torch.float16) if path_inside == "skip" else _drawn(name, parameter.shape, rng)
                owner.register_parameter(name, torch.nn.Parameter(drawn, requires_grad=False))
            for name, buffer in list(owner.named_buffers(recurse=False)):
                setattr(owner, name, torch.full(buffer.shape, UNMEASURED))
    try:
        checkpoint.save(path, profile, generator, vae, {"stage": "random", "seed": seed}, {})
    except OSError as error:
        raise OutputError(f"checkpoint {path} cannot be written: {error.strerror}", "choose another output path") from None
    return count


def _drawn(name: str, shape: torch.Size, rng: torch.Generator) -> torch.Tensor:
    """Norm weights stay at one, biases and modulation small, matrices at 1 / sqrt(fan-in)."""
    if name.startswith("norm"):
        return torch.ones(shape, dtype=torch.float16)
    scale = 0.02 if len(shape) < 2 or name == "modulation" else 1 / math.sqrt(math.prod(shape[1:]))
    return torch.randn(shape, generator=rng, dtype=torch.float16) * scale
