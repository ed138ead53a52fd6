"""Generators that answer by rule: what a loss is made of shows."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tests.support.toys import TINY

SPREAD = torch.tensor([0.2, 0.5, 0.9, 1.1])[:, None, None]


class ConstantGenerator(nn.Module):
    """Predicts a constant, and remembers what it was asked."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.tensor(constant))
        self.calls: list[tuple[Tensor, ...]] = []
        self.step_spread = SPREAD

    def forward(self, *inputs: Tensor) -> Tensor:
        self.calls.append(inputs)
        return self.constant.expand(inputs[0].shape)


CHANNELS = TINY.video.latent_channels
TIMES = (1.0, 0.6, 0.2)


class AnsweringGenerator(nn.Module):
    """Answers by a function of what it is given, and remembers that."""

    def __init__(self, answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.answer, self.gain = answer, nn.Parameter(torch.ones(()))
        self.step_spread = torch.full((CHANNELS, 1, 1), 0.5)
        self.profile = SimpleNamespace(sampler=SimpleNamespace(timesteps=TIMES))
        self.calls: list[tuple[Tensor, ...]] = []

    def forward(
        self,
        noisy: Tensor,
        previous: Tensor,
        condition: Tensor,
        t: Tensor,
        text: Tensor,
        rope: Tensor,
    ) -> Tensor:
        self.calls.append((noisy, previous, t))
        return self.gain * self.answer(noisy, previous, t)
