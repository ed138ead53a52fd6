"""What a graph takes and gives: a GraphSignature of TensorSpecs. Families compute them from a Profile."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from aapt_deploy.ops.block_causal_attention import NEXT
from aapt_deploy.profiles import Profile

Array = TypeVar("Array")

Tensors = Mapping[str, tuple[str, Sequence[int | str | None]]]  # name -> dtype and shape, as found in a file


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * {"float32": 4, "int32": 4, "int64": 8, "uint8": 1}[self.dtype]


@dataclass(frozen=True)
class GraphSignature:
    """A graph as its callers see it. `inputs` and `outputs` change hands every run; `state` stays inside an engine."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[TensorSpec, ...] = ()  # read by every run; the decoder's memory leaves as NEXT, a cache is committed block by block

    def spec(self, name: str) -> TensorSpec:
        return next(spec for spec in (*self.inputs, *self.outputs, *self.state) if spec.name == name)

    def misfit(self, inputs: "Tensors", outputs: "Tensors", state_leaves: bool) -> str:
        """The first tensor, in words, in which a graph with these inputs and outputs is not this one; "" where it is. `state_leaves`: as NEXT."""
        leaving = [TensorSpec(spec.name + NEXT, spec.shape, spec.dtype) for spec in self.state if state_leaves]
        for side, specs, found in (("input", (*self.inputs, *self.state), inputs), ("output", (*self.outputs, *leaving), outputs)):
            wanted = {spec.name: f"{spec.dtype} {list(spec.shape)}" for spec in specs}
            there = {name: f"{dtype} {list(shape)}" for name, (dtype, shape) in found.items()}
            for name in sorted(wanted.keys() | there.keys()):
                if wanted.get(name) != there.get(name):
                    return f"{side} {name!r} is {there.get(name, 'missing')}, by the profile {wanted.get(name, 'none')}"
        return ""


def layer_names(prefix: str, profile: Profile) -> list[str]:
    """`prefix.00`, `prefix.01`, … one for each layer of the generator."""
    return [f"{prefix}.{layer:02d}" for layer in range(profile.model.depth)]


def text_pairs(profile: Profile, state: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """The text's keys and values in `state`, each with the name of the cache that it belongs to."""
    for kind in ("k", "v"):
        for text, cache in zip(layer_names(f"text_{kind}", profile), layer_names(f"{kind}_cache", profile), strict=True):
            if text in state:
                yield cache, state[text]
