"""Where random numbers come from: each batch of each update has its own, and all batches of an update may toss one coin."""

import torch

UPDATES = 2**40  # seeds of updates lie below, those of their batches above
COINS = 2**20  # batches of an update, at most


def numbers(seed: int, step: int, batch: int) -> torch.Generator:
    """The numbers of one batch of update `step`, under a run's or a stage's `seed`."""
    assert batch < COINS, f"{batch=}"
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % UPDATES + batch * UPDATES)


def coin(rng: torch.Generator, number: int) -> float:
    """Toss number `number`, in [0, 1), that all batches of an update share: processes that train together have to do the same things."""
    return float(torch.rand((), generator=torch.Generator().manual_seed(rng.initial_seed() % UPDATES + (COINS + number) * UPDATES)))
