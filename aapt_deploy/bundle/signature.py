"""Describe what a graph takes and returns. Families compute signatures from a Profile."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from aapt_deploy.ops.block_causal_attention import NEXT
from aapt_deploy.profiles import Profile

Array = TypeVar("Array")

# Name -> dtype and shape, as found in a file.
Tensors = Mapping[str, tuple[str, Sequence[int | str | None]]]
ITEM_BYTES = {"float32": 4, "int32": 4, "int64": 8, "uint8": 1}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class GraphSignature:
    """Graph as its callers see it.

    `inputs` and `outputs` are passed every run; `state` stays inside an engine. Every run reads
    it. The decoder's memory is also returned, as NEXT; a cache is committed block by block.
    `conditioning` stays inside as well, and only `reset` writes it.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[TensorSpec, ...] = ()
    conditioning: tuple[TensorSpec, ...] = ()  # the text's keys and values for cross-attention

    @property
    def read(self) -> tuple[TensorSpec, ...]:
        """Return everything that a run reads, in the graph's order."""
        return (*self.inputs, *self.state, *self.conditioning)

    def spec(self, name: str) -> TensorSpec:
        specs = (*self.read, *self.outputs)
        return next(spec for spec in specs if spec.name == name)

    def misfit(self, inputs: "Tensors", outputs: "Tensors", state_leaves: bool) -> str:
        """Return, in words, the first tensor that differs in a graph with these; "" if none.

        `state_leaves` if the graph returns its state as NEXT.
        """
        state = self.state if state_leaves else ()
        leaving = [TensorSpec(spec.name + NEXT, spec.shape, spec.dtype) for spec in state]
        sides = (
            ("input", self.read, inputs),
            ("output", (*self.outputs, *leaving), outputs),
        )
        for side, specs, found in sides:
            wanted = {spec.name: f"{spec.dtype} {list(spec.shape)}" for spec in specs}
            there = {name: f"{dtype} {list(shape)}" for name, (dtype, shape) in found.items()}
            for name in sorted(wanted.keys() | there.keys()):
                if wanted.get(name) != there.get(name):
                    is_, by = there.get(name, "missing"), wanted.get(name, "none")
                    return f"{side} {name!r} is {is_}, by the profile {by}"
        return ""


def layer_names(prefix: str, profile: Profile) -> list[str]:
    """`prefix.00`, `prefix.01`, … one for each layer of the generator."""
    return [f"{prefix}.{layer:02d}" for layer in range(profile.model.depth)]


def text_pairs(profile: Profile, state: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """Yield the text's keys and values in `state`, each with the name of what it belongs to.

    That is the front of a cache, or the conditioning of a generator with cross-attention.
    """
    joint = profile.text.attention == "joint"
    for kind in ("k", "v"):
        names = layer_names(f"text_{kind}", profile)
        owners = layer_names(f"{kind}_cache", profile) if joint else names
        for text, owner in zip(names, owners, strict=True):
            if text in state:
                yield owner, state[text]
