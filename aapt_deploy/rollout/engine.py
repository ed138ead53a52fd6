"""What the rollout asks of an engine: Protocols, with the times that a layered backend reports.

An engine is one compiled graph plus the state that stays on its device. Backends implement them;
nothing here runs anything.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from aapt_deploy.errors import MachineError

State = dict[str, np.ndarray]  # named arrays


class Engine(Protocol):
    """One graph with its state.

        frames = decoder.run(latent=latent)["frames"]      # numpy in, numpy out

    The arrays `run` returns are the engine's own and are overwritten by its next run.
    """

    def reset(self, **state: np.ndarray) -> None:
        """Empty the state, or set named parts of it."""
        ...

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        """Run the graph once. `inputs` are the signature's."""
        ...


class Generator(Engine, Protocol):
    """The engine that generates blocks.

        generator.reset()                                                     # empty cache
        generator.reset(**prompt.run(text=ids))                               # new text, same past
        out = generator.run(noisy=noise, previous=latent, ..., block=block)   # not kept
        generator.commit(block)                                               # kept

    `run` takes the integer `block` in place of `cache_len`. `reset` with text_k.NN and text_v.NN
    replaces the cache's text.
    """

    def commit(self, block: int) -> None:
        """Keep the last pass as block `block`. A pass that is not committed leaves no trace."""
        ...


class Engines(Protocol):
    """The open graphs of one bundle, with the state of one stream."""

    backend: str
    precision: str
    overlapped: bool  # the decoder has a stream of its own and works beside the generator

    @property
    def generator(self) -> Generator: ...

    def __getitem__(self, graph: str) -> Engine: ...

    def fork(self) -> "Engines":
        """A fresh state over the same weights. Raises MachineError if the backend has one state only."""
        ...

    def state(self) -> dict[str, State]:
        """The state of each graph as copies. Raises MachineError if the backend cannot tell."""
        ...

    def restore(self, state: Mapping[str, State]) -> None:
        """Set what `state` returned."""
        ...

    def close(self) -> None: ...


class OneState:
    """The part of `Engines` that a backend with one state of its own on a GPU has to refuse."""

    backend: str

    def fork(self) -> Engines:
        raise self._refusal("a second stream over the same weights")

    def state(self) -> dict[str, State]:
        raise self._refusal("reading its state")

    def restore(self, state: Mapping[str, State]) -> None:
        raise self._refusal("setting its state")

    def _refusal(self, what: str) -> MachineError:
        return MachineError(f"backend {self.backend} does not support {what}", "open the bundle again, or use --backend onnxruntime")


@dataclass(frozen=True)
class LayerTime:
    """How long one layer took in a profiled run, which is slower than a real one: shares mean more than sums."""

    name: str
    kind: str  # "" if the inspector does not know a layer of that name
    tactic: str
    ms: float  # median
    share: float  # of the sum over all layers


@runtime_checkable
class Layered(Protocol):
    """Engines that can time each layer of a graph."""

    def layer_times(self, runs: int) -> dict[str, list[LayerTime]]:
        """By graph, from `runs` runs of each. Uses up the state: for the end of a measurement."""
        ...


Tap = Callable[[str, str, Callable[..., Any], dict[str, Any]], Any]  # graph, method, the engine's own method, its arguments -> the answer


class Tapped:
    """Engines that pass every call through `tap`, which makes it, or something else, and returns the answer.

    tap = lambda graph, method, call, arguments: call(**arguments)   # changes nothing
    """

    def __init__(self, engines: Engines, tap: Tap) -> None:
        self.engines, self.tap = engines, tap
        self.backend, self.precision, self.overlapped = engines.backend, engines.precision, engines.overlapped

    @property
    def generator(self) -> "TappedGenerator":
        return TappedGenerator("generator", self.engines.generator, self.tap)

    def __getitem__(self, graph: str) -> "TappedEngine":
        return TappedEngine(graph, self.engines[graph], self.tap)

    def fork(self) -> "Tapped":
        return Tapped(self.engines.fork(), self.tap)

    def state(self) -> dict[str, State]:
        return self.engines.state()

    def restore(self, state: Mapping[str, State]) -> None:
        self.engines.restore(state)

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


class TappedGenerator(TappedEngine):
    """The generator of `Tapped`."""

    engine: Generator

    def commit(self, block: int) -> None:
        self.tap(self.graph, "commit", self.engine.commit, {"block": block})
