"""What the rollout asks of an engine: Protocols, with the times that a layered backend reports.

An engine is one compiled graph plus the state that stays on its device. Backends implement them; nothing here runs anything.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np


class Engine(Protocol):
    """One graph with its state.

        generator.reset()
        out = generator.run(noisy=noise, previous=latent, ..., block=block)   # numpy in, numpy out
        generator.commit(block)                                               # keep this block's keys and values

    The arrays `run` returns are the engine's own and are overwritten by its next run.
    """

    def reset(self, **state: np.ndarray) -> None:
        """Empty the state, or set named parts of it: text_k.NN and text_v.NN of a prompt replace the cache's text."""
        ...

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        """One pass. `inputs` are the signature's, except that the generator takes the integer `block` in place of `cache_len`."""
        ...

    def commit(self, block: int) -> None:
        """Keep the last pass as block `block` of the stream; a pass that is not committed leaves no trace. Only generators have blocks."""
        ...


class Engines(Protocol):
    """The open graphs of one bundle."""

    backend: str
    precision: str
    overlapped: bool  # the decoder has a stream of its own: the rollout makes the next latent while this one is decoded

    def __getitem__(self, graph: str) -> Engine: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class LayerTime:
    """How long one layer took in a profiled run, which is slower than a real one: shares mean more than sums."""

    name: str
    kind: str  # "" where the inspector does not know a layer of that name
    tactic: str
    ms: float  # median
    share: float  # of the sum over all layers


@runtime_checkable
class Layered(Protocol):
    """Engines that can tell what each layer of a graph takes."""

    def layer_times(self, runs: int) -> dict[str, list[LayerTime]]:
        """By graph, from `runs` runs of each. State is used up by it: for the end of a measurement."""
        ...


Tap = Callable[[str, str, Callable[..., Any], dict[str, Any]], Any]  # graph, method, the engine's own method, its arguments -> the answer


class Tapped:
    """Engines that pass every call through `tap`, which makes it, or something else, and returns the answer.

    tap = lambda graph, method, call, arguments: call(**arguments)   # changes nothing
    """

    def __init__(self, engines: Engines, tap: Tap) -> None:
        self.engines, self.tap = engines, tap
        self.backend, self.precision, self.overlapped = engines.backend, engines.precision, engines.overlapped

    def __getitem__(self, graph: str) -> "TappedEngine":
        return TappedEngine(graph, self.engines[graph], self.tap)

    def close(self) -> None:
        self.engines.close()


class TappedEngine:
    """One graph of `Tapped`."""

    def __init__(self, graph: str, engine: Engine, tap: Tap) -> None:
        self.graph, self.engine, self.tap = graph, engine, tap

    def reset(self, **state: np.ndarray) -> None:
        self.tap(self.graph, "reset", self.engine.reset, state)

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        answer: dict[str, np.ndarray] = self.tap(self.graph, "run", self.engine.run, inputs)
        return answer

    def commit(self, block: int) -> None:
        self.tap(self.graph, "commit", self.engine.commit, {"block": block})
