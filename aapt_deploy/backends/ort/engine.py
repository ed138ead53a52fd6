"""ONNX Runtime on a CPU: the engine of laptops. It imports neither torch nor onnx.

The generator's caches are one buffer each, bound as input and as output of the same run: the graph writes its block in place and nothing else
moves. So `commit` has no work left: the ring has one place more than the window, a pass writes only its own block's place, and a block that is
run again overwrites itself. Decoder memory alternates between two sets of buffers.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from aapt_deploy.bundle.bundle import Bundle, build_again
from aapt_deploy.bundle.signature import GraphSignature, TensorSpec, text_pairs
from aapt_deploy.errors import BundleError
from aapt_deploy.models.family import family_of
from aapt_deploy.ops.block_causal_attention import NEXT, SLOT, VALID, Ring
from aapt_deploy.profiles import Profile

BACKEND = "onnxruntime"
EXPORT = "export the checkpoint again"  # hint where a graph was lowered a moment ago, so that the exported one is to blame


@dataclass(frozen=True)
class Threads:
    """How a session uses the cores. Two sessions that both spin on two cores double each other's time (docs/log.md)."""

    count: int
    spinning: bool


def open_session(path: Path, threads: Threads, profiling: Path | None = None, fuse: bool = True, hint: str = EXPORT) -> onnxruntime.InferenceSession:
    """A session on the CPU. Without `fuse`, Q/DQ pairs stay where they are: FP8 has no fused operators here.

    Raises BundleError, with `hint`, when ONNX Runtime refuses the graph.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads.count
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads.spinning else "0")
    if not fuse:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if profiling is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profiling)
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exception types are private
        raise BundleError(f"ONNX Runtime cannot load {path}: {str(error).splitlines()[0]}", hint) from None


def refuse_other(session: onnxruntime.InferenceSession, signature: GraphSignature, path: Path, hint: str) -> None:
    """Raise BundleError, with `hint`, unless the graph at `path` takes and gives what `signature` says: a hash does not say whose graph it is."""
    inputs, outputs = (
        {node.name: (node.type.removeprefix("tensor(").removesuffix(")").replace("float", "float32"), node.shape) for node in nodes}
        for nodes in (session.get_inputs(), session.get_outputs())
    )
    if wrong := signature.misfit(inputs, outputs, state_leaves=True):
        raise BundleError(f"graph {path} is not the {signature.name} of its bundle: {wrong}", hint)


def _value(array: np.ndarray) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)  # shares the array's memory


class OrtEngine:
    """One graph without blocks: encoder, prompt or decoder. Inputs, outputs and state live in fixed buffers that are bound once."""

    def __init__(self, session: onnxruntime.InferenceSession, signature: GraphSignature) -> None:
        self.session = session
        self.inputs = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in signature.inputs}
        self.outputs = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in signature.outputs}
        # State is read from one set and written to the other; with no state both bindings are the same.
        self.state = [{spec.name: np.zeros(spec.shape, spec.dtype) for spec in signature.state} for _ in range(2)]
        self.bindings = [self._bind(self.state[i], self.state[1 - i]) for i in range(2)]
        self.turn = 0

    @property
    def memory(self) -> dict[str, np.ndarray]:
        """The state that the next run will read, by name."""
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
        for held in self.state:
            for array in held.values():
                array.fill(0)

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        for name, value in inputs.items():
            self.inputs[name][...] = value
        self.session.run_with_iobinding(self.bindings[self.turn])
        self.turn = 1 - self.turn
        return self.outputs

    def held(self) -> dict[str, np.ndarray]:
        """What the next run depends on."""
        return self.memory


def in_place(profile: Profile) -> GraphSignature:
    """The generator's, as `lower_in_place` leaves it: caches of the ring that is written where it lies, a slot and a count for their length."""
    portable = family_of(profile).generator(profile, Ring.of(profile, in_place=True).tokens)
    inputs = (*(spec for spec in portable.inputs if spec.name != "cache_len"), *(TensorSpec(name, (1,), "int64") for name in (SLOT, VALID)))
    return GraphSignature(portable.name, inputs, (portable.spec("clean"),), portable.state)


class OrtGenerator:
    """The generator with its caches written in place."""

    def __init__(self, session: onnxruntime.InferenceSession, profile: Profile) -> None:
        self.session, self.profile = session, profile
        self.ring, signature = Ring.of(profile, in_place=True), in_place(profile)
        self.inputs = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in signature.inputs}
        self.outputs = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in signature.outputs}
        self.caches = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in signature.state}
        self.binding = session.io_binding()
        for name, array in self.inputs.items():
            self.binding.bind_ortvalue_input(name, _value(array))
        self.binding.bind_ortvalue_output("clean", _value(self.outputs["clean"]))
        for name, array in self.caches.items():
            value = _value(array)
            self.binding.bind_ortvalue_input(name, value)
            self.binding.bind_ortvalue_output(name + NEXT, value)

    def reset(self, **state: np.ndarray) -> None:
        if not state:
            for held in self.caches.values():
                held.fill(0)
        for cache, text in text_pairs(self.profile, state):
            self.caches[cache][:, : self.profile.text.tokens] = text

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        place = self.ring.place(int(inputs.pop("block")))
        for name, value in {**inputs, SLOT: place.slot, VALID: place.valid}.items():
            self.inputs[name][...] = value
        self.session.run_with_iobinding(self.binding)
        return self.outputs

    def commit(self, block: int) -> None:
        """Nothing to move: the last pass over `block` already lies in its slot."""

    def held(self) -> dict[str, np.ndarray]:
        """What the next run depends on."""
        return self.caches


class OrtEngines:
    """All graphs of a bundle, as `build` prepared them for one precision."""

    backend = BACKEND
    overlapped = False

    def __init__(self, profile: Profile, graphs: dict[str, Path], threads: Threads, precision: str, hint: str = EXPORT) -> None:
        """Raises BundleError, with `hint`, for a graph that ONNX Runtime refuses or that is not what the profile says."""
        self.precision, self.profile = precision, profile
        self.sessions = {}
        for name, signature in family_of(profile).signatures(profile).items():
            session = open_session(graphs[name], threads, fuse=precision != "fp8", hint=hint)
            refuse_other(session, in_place(profile) if name == "generator" else signature, graphs[name], hint)
            self.sessions[name] = session
        self._allocate()

    def _allocate(self) -> None:
        """State of one stream: caches, memory, and the buffers that runs are bound to."""
        signatures = family_of(self.profile).signatures(self.profile)
        self.engines: dict[str, OrtEngine | OrtGenerator] = {
            name: OrtGenerator(session, self.profile) if name == "generator" else OrtEngine(session, signatures[name])
            for name, session in self.sessions.items()
        }

    def fork(self) -> "OrtEngines":
        """A fresh state over the same sessions, which hold the weights."""
        fork = copy(self)
        fork._allocate()
        return fork

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        return {graph: {name: array.copy() for name, array in engine.held().items()} for graph, engine in self.engines.items()}

    def restore(self, state: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        for graph, arrays in state.items():
            for name, array in self.engines[graph].held().items():
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
    """The engines of `bundle` in `precision`, with the threads that the build found best. Raises BundleError when they are damaged or another's."""
    entry, hint = bundle.engines[f"{BACKEND}-{precision}"], build_again(bundle.path, BACKEND, precision)
    files = entry.get("graphs")
    if (
        not isinstance(files, dict)
        or files.keys() != family_of(bundle.profile).signatures(bundle.profile).keys()
        or not all(isinstance(file, str) for file in files.values())
    ):
        raise BundleError(f"bundle {bundle.path}: its {BACKEND} engine in {precision} lacks graphs", hint)
    graphs = {name: bundle.checked(file) for name, file in files.items()}
    for weights in {f"{file}.data" for file in files.values()} & bundle.manifest["files"].keys():
        bundle.checked(weights)
    return OrtEngines(bundle.profile, graphs, Threads(int(entry["threads"]), bool(entry["spinning"])), precision, hint)
