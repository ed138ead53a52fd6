"""Where random numbers come from: each batch of each update has its own, and all batches of an update may toss one coin.

On a CPU torch starts from the low 32 bits of a seed alone. The high ones say which update it is, so that a coin can be found from there.
"""

import hashlib

import torch

UPDATES = 2**31


def numbers(seed: int, step: int, batch: int) -> torch.Generator:
    """The numbers of one batch of update `step`, under a run's or a stage's `seed`."""
    update = (seed * 1_000_003 + step) % UPDATES
    return torch.Generator().manual_seed(
        (1 + update) * 2**32 + (_mixed(update, batch) if batch else update)
    )


def coin(rng: torch.Generator, number: int) -> float:
    """Toss number `number`, in [0, 1), that all batches of an update share: processes that train together have to do the same things."""
    update = rng.initial_seed() >> 32 or rng.initial_seed()
    return float(
        torch.rand((), generator=torch.Generator().manual_seed(_mixed(update, -1 - number)))
    )


def _mixed(update: int, number: int) -> int:
    """32 bits that have nothing to do with those of other updates and numbers."""
    return int.from_bytes(
        hashlib.blake2s(f"{update} {number}".encode(), digest_size=4).digest(), "little"
    )
