"""Run a bundle with ONNX Runtime on a CPU. Imports neither torch nor onnx.

Each cache of the generator is one buffer, bound as input and output of the same run. The graph
writes its block in place, so `commit` copies nothing. The ring has one slot more than the window. A
pass writes only its own block's slot, and a second pass over a block overwrites the first. Decoder
memory alternates between two sets of buffers.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from aapt_deploy.backends.sink import Sink
from aapt_deploy.bundle.bundle import Bundle, build_again
from aapt_deploy.bundle.signature import GraphSignature, TensorSpec, text_pairs
from aapt_deploy.errors import BundleError
from aapt_deploy.models.family import family_of
from aapt_deploy.ops.block_causal_attention import NEXT, SLOT, VALID, Ring
from aapt_deploy.profiles import Profile

Graphs = dict[str, Path]  # files by the name of their graph
BACKEND = "onnxruntime"
EXPORT = "export the checkpoint again"  # hint if a new engine fails: the exported graph is wrong


@dataclass(frozen=True)
class Threads:
    """Threads of a session. Two sessions that spin on the same two cores take twice as long."""

    count: int
    spinning: bool


def open_session(
    path: Path,
    threads: Threads,
    profiling: Path | None = None,
    fuse: bool = True,
    hint: str = EXPORT,
) -> onnxruntime.InferenceSession:
    """Open a session on the CPU. `fuse` joins Q/DQ pairs with operators, which FP8 lacks.

    Raises BundleError, with `hint`, if ONNX Runtime refuses the graph.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads.count
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(threads.spinning)))
    if not fuse:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if profiling is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profiling)
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exception types are private
        first_line = str(error).splitlines()[0]
        raise BundleError(f"ONNX Runtime cannot load {path}: {first_line}", hint) from None


def refuse_other(
    session: onnxruntime.InferenceSession, signature: GraphSignature, path: Path, hint: str
) -> None:
    """Raise BundleError, with `hint`, if the graph at `path` does not have this signature.

    The bundle's hashes detect damage, but not a graph of another profile.
    """

    def found(nodes: Any) -> dict[str, tuple[str, list[int | str]]]:
        kinds = [(node, node.type.removeprefix("tensor(").removesuffix(")")) for node in nodes]
        return {node.name: (kind.replace("float", "float32"), node.shape) for node, kind in kinds}

    inputs, outputs = found(session.get_inputs()), found(session.get_outputs())
    if wrong := signature.misfit(inputs, outputs, state_leaves=True):
        raise BundleError(f"graph {path} is not the {signature.name} of its bundle: {wrong}", hint)


def _value(array: np.ndarray) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)  # shares the array's memory


def _zeros(specs: tuple[TensorSpec, ...]) -> dict[str, np.ndarray]:
    return {spec.name: np.zeros(spec.shape, spec.dtype) for spec in specs}


class OrtEngine:
    """The encoder, prompt or decoder graph. Inputs, outputs and state are buffers, bound once."""

    def __init__(self, session: onnxruntime.InferenceSession, signature: GraphSignature) -> None:
        self.session = session
        self.inputs, self.outputs = _zeros(signature.inputs), _zeros(signature.outputs)
        # A run reads one set of state and writes the other. Without state both bindings are equal.
        self.state = [_zeros(signature.state), _zeros(signature.state)]
        self.bindings = [self._bind(self.state[i], self.state[1 - i]) for i in range(2)]
        self.turn = 0

    @property
    def memory(self) -> dict[str, np.ndarray]:
        """The state that the next run reads, by name."""
        return self.state[self.turn]

    def _bind(self, read: dict[str, np.ndarray], write: dict[str, np.ndarray]) -> Any:
        binding = self.session.io_binding()
        for name, array in (self.inputs | read).items():
            binding.bind_ortvalue_input(name, _value(array))
        for name, array in self.outputs.items():
            binding.bind_ortvalue_output(name, _value(array))
        for name, array in write.items():
            binding.bind_ortvalue_output(name + NEXT, _value(array))
        return binding

    def reset(self, **state: np.ndarray) -> None:
        for array in (*self.state[0].values(), *self.state[1].values()):
            array.fill(0)

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        for name, value in inputs.items():
            self.inputs[name][...] = value
        self.session.run_with_iobinding(self.bindings[self.turn])
        self.turn = 1 - self.turn
        return self.outputs


def in_place(profile: Profile) -> GraphSignature:
    """Return the signature of a generator that `lower_in_place` lowered.

    Its caches have the size of the in-place ring; a slot and a count replace `cache_len`.
    """
    portable = family_of(profile).generator(profile, Ring.of(profile, in_place=True).tokens)
    inputs = [spec for spec in portable.inputs if spec.name != "cache_len"]
    inputs += [TensorSpec(name, (1,), "int64") for name in (SLOT, VALID)]
    outputs = (portable.spec("clean"),)
    return GraphSignature(
        portable.name, tuple(inputs), outputs, portable.state, portable.conditioning
    )


class OrtGenerator:
    """The generator with its caches written in place."""

    def __init__(self, session: onnxruntime.InferenceSession, profile: Profile) -> None:
        self.session, self.profile = session, profile
        self.ring, signature = Ring.of(profile, in_place=True), in_place(profile)
        self.inputs, self.outputs = _zeros(signature.inputs), _zeros(signature.outputs)
        self.caches, text = _zeros(signature.state), _zeros(signature.conditioning)
        self.sink = Sink(profile, self.caches)
        self.memory = self.caches | text | self.sink.keys  # a stream's state, by name
        self.binding = session.io_binding()
        for name, array in (self.inputs | text).items():
            self.binding.bind_ortvalue_input(name, _value(array))
        self.binding.bind_ortvalue_output("clean", _value(self.outputs["clean"]))
        for name, array in self.caches.items():
            value = _value(array)
            self.binding.bind_ortvalue_input(name, value)
            self.binding.bind_ortvalue_output(name + NEXT, value)

    def reset(self, **state: np.ndarray) -> None:
        if not state:
            for array in self.memory.values():
                array.fill(0)
        for name, text in text_pairs(self.profile, state):
            self.memory[name][:, : self.profile.text.tokens] = text

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        place = self.ring.place(int(inputs.pop("block")))
        for name, value in {**inputs, SLOT: place.slot, VALID: place.valid}.items():
            self.inputs[name][...] = value
        self.session.run_with_iobinding(self.binding)
        return self.outputs

    def commit(self, block: int) -> None:
        """Keep what the last pass wrote into the slot of `block`."""
        self.sink.keep(block)

    def turn(self, rope: np.ndarray) -> None:
        self.sink.turn(rope)


class OrtEngines:
    """All graphs of a bundle, as they were built for one precision."""

    backend = BACKEND
    overlapped = False

    def __init__(
        self, profile: Profile, graphs: Graphs, threads: Threads, precision: str, hint: str = EXPORT
    ) -> None:
        """Raises BundleError, with `hint`, if ONNX Runtime or the profile refuses a graph."""
        self.precision, self.profile = precision, profile
        self.signatures = family_of(profile).signatures(profile)
        self.signatures["generator"] = in_place(profile)
        self.sessions = {}
        for name, signature in self.signatures.items():
            session = open_session(graphs[name], threads, fuse=precision != "fp8", hint=hint)
            refuse_other(session, signature, graphs[name], hint)
            self.sessions[name] = session
        self._allocate()

    def _allocate(self) -> None:
        """Make the state of one stream: caches, memory, and the buffers of every run."""
        self.engines: dict[str, OrtEngine | OrtGenerator] = {}
        for name, session in self.sessions.items():
            self.engines[name] = (
                OrtGenerator(session, self.profile)
                if name == "generator"
                else OrtEngine(session, self.signatures[name])
            )

    def fork(self) -> "OrtEngines":
        """Return a fresh state over the same sessions, which own the weights."""
        fork = copy(self)
        fork._allocate()
        return fork

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        return {
            graph: {name: array.copy() for name, array in engine.memory.items()}
            for graph, engine in self.engines.items()
        }

    def restore(self, state: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        for graph, arrays in state.items():
            for name, array in self.engines[graph].memory.items():
                array[...] = arrays[name]

    @property
    def generator(self) -> OrtGenerator:
        generator = self.engines["generator"]
        assert isinstance(generator, OrtGenerator)
        return generator

    def __getitem__(self, graph: str) -> OrtEngine | OrtGenerator:
        return self.engines[graph]

    def close(self) -> None:
        self.engines.clear()
        self.sessions = {}


def open_bundle(bundle: Bundle, precision: str) -> OrtEngines:
    """Open the engines of `bundle` in `precision`, with the threads that the build chose.

    Raises BundleError if a file is missing, damaged or of another profile.
    """
    entry, profile = bundle.engines[f"{BACKEND}-{precision}"], bundle.profile
    hint = build_again(bundle.path, BACKEND, precision)
    files: Any = entry.get("graphs")
    sound = isinstance(files, dict) and all(isinstance(file, str) for file in files.values())
    if not sound or files.keys() != family_of(profile).signatures(profile).keys():
        lacking = f"bundle {bundle.path}: its {BACKEND} engine in {precision} lacks graphs"
        raise BundleError(lacking, hint)
    graphs = {name: bundle.checked(file) for name, file in files.items()}
    for weights in {f"{file}.data" for file in files.values()} & bundle.manifest["files"].keys():
        bundle.checked(weights)
    threads = Threads(int(entry["threads"]), bool(entry["spinning"]))
    return OrtEngines(profile, graphs, threads, precision, hint)
