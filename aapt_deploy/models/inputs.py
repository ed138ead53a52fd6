"""Random inputs of realistic scale, for tracing and for parity."""

import math

import torch
from torch import Tensor


def random_inputs(
    shapes: list[tuple[str, tuple[int, ...], str]], seed: int, cache_len: int
) -> list[Tensor]:
    """Draw inputs of realistic scale for (name, shape, dtype) triples, to trace or compare."""
    rng = torch.Generator().manual_seed(seed)
    values = []
    for name, shape, dtype in shapes:
        if name == "cache_len":
            values.append(torch.tensor([cache_len], dtype=torch.int32))
        elif dtype == "float32" and math.prod(shape) == 1 and name != "time":
            values.append(torch.ones(shape))  # a flag of the state
        elif name == "time":
            values.append(torch.rand(shape, generator=rng) * 0.9 + 0.1)
        elif dtype == "uint8":
            values.append(torch.randint(256, shape, generator=rng, dtype=torch.uint8))
        elif dtype == "int64":
            values.append(torch.randint(4, shape, generator=rng))
        else:
            values.append(torch.randn(shape, generator=rng))
    return values
