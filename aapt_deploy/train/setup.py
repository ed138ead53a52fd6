"""How training runs on this machine: what no loss and no recipe has to know."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Setup:
    """One process by default, in float32, keeping every activation."""

    device: str = "cpu"
    bf16: bool = False  # mixed precision: weights and optimiser stay float32
    checkpointing: bool = False  # recompute each visual block in the backward pass

    @contextmanager
    def autocast(self) -> Iterator[None]:
        with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=self.bf16):
            yield


ALONE = Setup()
