"""Wrap a generator's prompt as a graph of a bundle; every family's is the same."""

from typing import Any

from torch import Tensor, nn


class PromptGraph(nn.Module):
    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, text: Tensor) -> tuple[Tensor, ...]:
        """Return every layer's text keys, then every layer's values, each [1, L, H, D]."""
        keys, values = self.generator.prompt(text)
        return (*keys, *values)
