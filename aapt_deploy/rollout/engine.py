"""Define the Protocols that the rollout needs from an engine. Nothing here runs a graph.

An engine is one compiled graph plus the state that stays on its device.
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

    `run` returns the engine's own arrays, which its next run overwrites.
    """

    def reset(self, **state: np.ndarray) -> None:
        """Empty the state, or set named parts of it."""
        ...

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        """Run the graph once on the signature's inputs."""
        ...


class Generator(Engine, Protocol):
    """The engine that generates blocks.

        generator.reset()                                                     # empty cache
        generator.reset(**prompt.run(text=ids))                               # new text, same past
        out = generator.run(noisy=noise, previous=latent, ..., block=block)   # not kept
        generator.commit(block)                                               # kept

    `run` takes the integer `block` in place of `cache_len`. `reset` with text_k.NN and text_v.NN
    replaces the text in the cache.
    """

    def commit(self, block: int) -> None:
        """Keep the last pass as block `block`. An uncommitted pass leaves the cache unchanged."""
        ...


@runtime_checkable
class Turning(Protocol):
    """A generator whose sink can follow the window (window.sink_follows)."""

    def turn(self, rope: np.ndarray) -> None:
        """Rotate the sink's keys, as they were committed, by rope [2, P_time]."""
        ...


class Engines(Protocol):
    """The open graphs of one bundle, with the state of one stream."""

    backend: str
    precision: str
    overlapped: bool  # the decoder has its own stream and runs beside the generator

    @property
    def generator(self) -> Generator: ...

    def __getitem__(self, graph: str) -> Engine: ...

    def fork(self) -> "Engines":
        """Return a fresh state over the same weights. Raises MachineError if unsupported."""
        ...

    def state(self) -> dict[str, State]:
        """Return copies of each graph's state. Raises MachineError if unsupported."""
        ...

    def restore(self, state: Mapping[str, State]) -> None:
        """Set the state that `state` returned."""
        ...

    def close(self) -> None: ...


class OneState:
    """Refuse `fork`, `state` and `restore` for a backend with a single state on a GPU."""

    backend: str

    def fork(self) -> Engines:
        raise self._refusal("a second stream over the same weights")

    def state(self) -> dict[str, State]:
        raise self._refusal("reading its state")

    def restore(self, state: Mapping[str, State]) -> None:
        raise self._refusal("setting its state")

    def _refusal(self, what: str) -> MachineError:
        hint = "open the bundle again, or use --backend onnxruntime"
        return MachineError(f"backend {self.backend} does not support {what}", hint)


@dataclass(frozen=True)
class LayerTime:
    """The time of one layer in a profiled run. Such a run is slower, so compare the shares."""

    name: str
    kind: str  # "" if the inspector lists no layer of that name
    tactic: str
    ms: float  # median
    share: float  # of the sum over all layers


@runtime_checkable
class Layered(Protocol):
    """Engines that time each layer of a graph."""

    def layer_times(self, runs: int) -> dict[str, list[LayerTime]]:
        """Run each graph `runs` times; return its layers by graph. Overwrites the state."""
        ...


# (graph, method, the engine's own method, its arguments) -> the result
Tap = Callable[[str, str, Callable[..., Any], dict[str, Any]], Any]


class Tapped:
    """Engines that pass every call through `tap`, which returns the result.

    tap = lambda graph, method, call, arguments: call(**arguments)   # changes nothing
    """

    def __init__(self, engines: Engines, tap: Tap) -> None:
        self.engines, self.tap = engines, tap
        self.backend, self.overlapped = engines.backend, engines.overlapped
        self.precision = engines.precision

    @property
    def generator(self) -> "TappedGenerator":
        kind = TappedTurning if isinstance(self.engines.generator, Turning) else TappedGenerator
        return kind("generator", self.engines.generator, self.tap)

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
    """One tapped graph."""

    def __init__(self, graph: str, engine: Engine, tap: Tap) -> None:
        self.graph, self.engine, self.tap = graph, engine, tap

    def reset(self, **state: np.ndarray) -> None:
        self.tap(self.graph, "reset", self.engine.reset, state)

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        result: dict[str, np.ndarray] = self.tap(self.graph, "run", self.engine.run, inputs)
        return result


class TappedGenerator(TappedEngine):
    """The tapped generator."""

    engine: Generator

    def commit(self, block: int) -> None:
        self.tap(self.graph, "commit", self.engine.commit, {"block": block})


class TappedTurning(TappedGenerator):
    """The tapped generator, if it can turn its sink."""

    def turn(self, rope: np.ndarray) -> None:
        assert isinstance(self.engine, Turning)
        self.tap(self.graph, "turn", self.engine.turn, {"rope": rope})
