"""Draw random numbers that a resumed run draws again.

Each batch of each update has its own numbers; all batches of an update may share coins. On a CPU
torch seeds from the low 32 bits alone. The high ones name the update, so that a coin needs no more.
"""

import hashlib

import torch

UPDATES = 2**31


def numbers(seed: int, step: int, batch: int) -> torch.Generator:
    """Return the numbers of one batch of update `step`, under the seed of a run or stage."""
    update = (seed * 1_000_003 + step) % UPDATES
    low = _mixed(update, batch) if batch else update
    return torch.Generator().manual_seed((1 + update) * 2**32 + low)


def coin(rng: torch.Generator, number: int) -> float:
    """Toss a coin in [0, 1) that all batches of an update share.

    Processes that train together have to do the same things.
    """
    update = rng.initial_seed() >> 32 or rng.initial_seed()
    own = torch.Generator().manual_seed(_mixed(update, -1 - number))
    return float(torch.rand((), generator=own))


def _mixed(update: int, number: int) -> int:
    """Return 32 bits that are independent of other updates and numbers."""
    return int.from_bytes(
        hashlib.blake2s(f"{update} {number}".encode(), digest_size=4).digest(), "little"
    )
