"""TensorRT on an NVIDIA GPU: the engine of production. It imports neither torch nor onnx.

    stream 1   encoder, prompt, generator, commit   caches stay on the device; a block is committed
                                                    to its place in the ring
    stream 2   decoder                              memory alternates between two sets of buffers

A pass is one captured graph: upload inputs, run the plan, download `clean`. A commit of FP8 caches
is another. The ring's two numbers, `cache_len` and the slot, are uploaded inside and read by
kernels on the device, so the same graphs serve every block. The decoder has two graphs, one for
each direction of its memory. Latents pass through the host, 0.3 MB each way at 736x416, because the
sampler runs there. Frames arrive in pinned memory. The second stream lets the rollout make the next
latent while this one is decoded (Engines.overlapped). Everything is allocated when the bundle is
opened.

opening.py checks plans and opens them.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aapt_deploy.backends.trt.cuda import Device, Stream
from aapt_deploy.backends.trt.flavour import PROPER
from aapt_deploy.backends.trt.plan_file import AGAIN, join
from aapt_deploy.backends.trt.plans import Tensor
from aapt_deploy.backends.trt.state import (
    CacheLayer,
    HopperTiles,
    Launch,
    StagingBuffer,
    TokenMajor,
    size_of,
    stored,
)
from aapt_deploy.bundle.signature import GraphSignature, TensorSpec, layer_names
from aapt_deploy.errors import BundleError
from aapt_deploy.models.family import family_of
from aapt_deploy.ops.block_causal_attention import NEXT, Ring, hopper_fp8
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.engine import LayerTime, OneState

if TYPE_CHECKING:
    from aapt_deploy.backends.trt.api import Context, Plan

FITTING = {  # type in the signature -> in the plan
    "float32": ("FLOAT", "HALF", "BF16"),
    "int32": ("INT32",),
    "int64": ("INT64", "INT32"),
    "uint8": ("UINT8",),
}


class TrtEngine:
    """One graph without blocks: encoder, prompt or decoder."""

    def __init__(
        self,
        plan: "Plan",
        signature: GraphSignature,
        device: Device,
        stream: Stream,
        options: "RunOptions",
    ) -> None:
        given = {tensor.name: tensor for tensor in plan.tensors}
        self.stream = stream
        self.context, captured = _context(plan, signature.name, stream, options)
        self.inputs = StagingBuffer(device, [given[spec.name] for spec in signature.inputs])
        self.outputs = StagingBuffer(device, [given[spec.name] for spec in signature.outputs])
        # State is read from one set and written to the other; with no state one graph is enough.
        self.sizes = {spec.name: size_of(given[spec.name]) for spec in signature.state}
        count, sizes = 2 if self.sizes else 1, self.sizes.items()
        self.state = [{name: device.memory(size) for name, size in sizes} for _ in range(count)]
        self.raw = signature.name == "prompt"  # the generator takes the plan's own types
        self.reset()
        pairs = [(self.state[i], self.state[i - 1]) for i in range(count)]
        self.steps = [self._prepare(read, write, captured) for read, write in pairs]
        self.reset()

    def _prepare(
        self, read: dict[str, int], write: dict[str, int], captured: bool
    ) -> Callable[[], None]:
        addresses = self.inputs.addresses | self.outputs.addresses | read
        addresses |= {name + NEXT: address for name, address in write.items()}

        def bind() -> None:
            for name, address in addresses.items():
                self.context.bind(name, address)

        def uncaptured() -> None:  # a graph remembers its addresses, a context only the last ones
            bind()
            self._step()

        bind()
        step = self.stream.prepare(self._step, captured)
        return step if captured else uncaptured

    def _step(self) -> None:
        self.stream.upload(self.inputs.address, self.inputs.host)
        self.context.enqueue(self.stream.handle)
        self.stream.download(self.outputs.host, self.outputs.address)

    def reset(self, **state: np.ndarray) -> None:
        with self.stream.mine():
            for held in self.state:
                for name, address in held.items():
                    self.stream.zero(address, self.sizes[name])
            self.turn = 0

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        with self.stream.mine():
            self.inputs.write(inputs)
            self.steps[self.turn]()
            self.turn = (self.turn + 1) % len(self.steps)
            self.stream.wait()
            return self.outputs.arrays if self.raw else self.outputs.read()


class TrtGenerator:
    """Generator with its caches."""

    def __init__(
        self, plan: "Plan", signature: GraphSignature, profile: Profile, device: Device,
        stream: Stream, options: "RunOptions",
    ) -> None:  # fmt: skip
        given = {tensor.name: tensor for tensor in plan.tensors}
        self.profile, self.ring = profile, Ring.of(profile)
        self.stream = stream
        self.context, captured = _context(plan, signature.name, stream, options)
        self.inputs = StagingBuffer(device, [given[spec.name] for spec in signature.inputs])
        self.clean = StagingBuffer(device, [given["clean"]])
        specs = (*signature.state, *signature.conditioning, *signature.outputs)
        self.sizes = {s.name: size_of(given[s.name]) for s in specs if s.name != "clean"}
        self.held = {name: device.memory(size) for name, size in self.sizes.items()}
        self.conditioning = {spec.name: given[spec.name].dtype for spec in signature.conditioning}
        names = (layer_names(prefix, profile) for prefix in CacheLayer._fields)
        rows = zip(*names, strict=True)
        self.layers = [CacheLayer(*(self.held[name] for name in row)) for row in rows]
        self.reset()  # before the first run: new memory may have NaN
        for name, address in (self.inputs.addresses | self.clean.addresses | self.held).items():
            self.context.bind(name, address)
        self.step = stream.prepare(self._step, captured)
        cache = given[signature.state[0].name]
        if len(cache.shape) == 4:
            row = size_of(cache) // self.ring.tokens
            tokens = self.ring.block_tokens
            self.cache: TokenMajor | HopperTiles
            self.cache = TokenMajor(stream, self.layers, cache.dtype, row, tokens)
        else:
            launch, scales = options.launch(profile.head_dim), options.scales
            self.cache = HopperTiles(
                device, stream, launch, self.layers, scales, self.ring, captured
            )
        self.reset()

    def _step(self) -> None:
        self.stream.upload(self.inputs.address, self.inputs.host)
        self.context.enqueue(self.stream.handle)
        self.stream.download(self.clean.host, self.clean.address)

    def reset(self, **state: np.ndarray) -> None:
        with self.stream.mine():
            if not state:
                for name, address in self.held.items():
                    self.stream.zero(address, self.sizes[name])
            keys, values = (layer_names(f"text_{kind}", self.profile) for kind in ("k", "v"))
            for layer, k, v in zip(self.layers, keys, values, strict=True):
                if k in state and k not in self.conditioning:
                    self.cache.write_text(layer, state[k], state[v])
            for name in self.conditioning.keys() & state.keys():
                self.stream.upload(self.held[name], stored(state[name], self.conditioning[name]))
                self.stream.wait()  # before what was converted goes away

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        with self.stream.mine():
            place = self.ring.place(int(inputs.pop("block")))
            self.inputs.write({**inputs, "cache_len": place.cache_len})
            self.step()
            self.stream.wait()
            return self.clean.read()

    def commit(self, block: int) -> None:
        with self.stream.mine():
            self.cache.commit(self.ring.place(block).slot)  # queued; the next pass comes behind it


def _kernels(head_dim: int) -> Launch:
    from aapt_deploy.ops.block_causal_attention import kernels

    return kernels.load(head_dim)


@dataclass(frozen=True)
class RunOptions:
    """How to run plans."""

    captured: bool = True  # into CUDA graphs
    scales: list[hopper_fp8.Scales] = field(default_factory=list)  # of every layer; FP8 caches only
    launch: Callable[[int], Launch] = _kernels  # head_dim -> our kernels
    # Graph -> the file that keeps what TensorRT-RTX compiles for this GPU.
    compiled: Mapping[str, Path] = field(default_factory=dict)


def _context(
    plan: "Plan", graph: str, stream: Stream, options: RunOptions
) -> tuple["Context", bool]:
    """Return a context of `plan`, and whether its runs are to be captured into CUDA graphs."""
    file = options.compiled.get(graph)
    context = plan.context(options.captured, file)
    if options.captured and not context.capturable(stream.handle):
        return plan.context(False, file), False
    return context, options.captured


class TrtEngines(OneState):
    """All graphs of a bundle on one GPU. Closing it closes the device."""

    backend = PROPER.backend  # or another flavour's
    overlapped = True

    def __init__(
        self,
        profile: Profile,
        plans: "Mapping[str, Plan]",
        device: Device,
        precision: str,
        options: RunOptions,
        backend: str = PROPER.backend,
    ) -> None:
        """Open all engines. `device` is closed if that fails.

        Raises BundleError if a plan's tensors are not the profile's.
        Raises MachineError if the GPU is full.
        """
        self.backend, self.precision = backend, precision
        self.device, self.plans = device, dict(plans)
        self.engines: dict[str, TrtEngine | TrtGenerator] = {}
        try:
            main, beside = device.stream(), device.stream()
            for name, signature in family_of(profile).signatures(profile).items():
                plan, stream = self.plans[name], beside if name == "decoder" else main
                check_tensors(name, plan.tensors, signature, profile)
                self.engines[name] = (
                    TrtGenerator(plan, signature, profile, device, main, options)
                    if name == "generator"
                    else TrtEngine(plan, signature, device, stream, options)
                )
                if name in options.compiled:
                    with contextlib.suppress(OSError):  # it is compiled again at the next start
                        plan.keep_compiled(options.compiled[name])
            self._check_text()
            device.seal()
        except BaseException:
            self.close()
            raise

    def _let_go(self) -> None:
        self.engines.clear()  # contexts before their plans
        self.plans.clear()

    def _check_text(self) -> None:
        """Raise BundleError if a prompt's text is in other codes than the generator's caches."""
        if self.generator.conditioning:  # the text is not in the cache
            return
        prompt, cache = self.engines.get("prompt"), self.generator.cache
        kinds = prompt.outputs.kinds.values() if isinstance(prompt, TrtEngine) else ()
        held = cache.kind if isinstance(cache, TokenMajor) else "BF16"  # tiles pack the text
        if any((kind == "FP8") != (held == "FP8") for kind in kinds):
            text = "the plans of prompt and generator hold keys and values in different codes"
            raise BundleError(text, AGAIN)

    @property
    def generator(self) -> TrtGenerator:
        generator = self.engines["generator"]
        assert isinstance(generator, TrtGenerator)
        return generator

    def __getitem__(self, graph: str) -> TrtEngine | TrtGenerator:
        if self.device.closed:  # a rollout's thread may still ask
            raise RuntimeError("these engines are closed")
        return self.engines[graph]

    def close(self) -> None:
        """Wait for what runs, in any thread. Engines raise RuntimeError afterwards."""
        self.device.undo(self._let_go)  # the last entry is done first
        self.device.close()

    def layer_times(self, runs: int) -> dict[str, list[LayerTime]]:
        """Return the times of generator and decoder layers, from `runs` runs without graphs.

        They are slower than real steps, and change the state.
        """
        found = {}
        for name in ("generator", "decoder"):
            engine = self.engines[name]
            stream, context = engine.stream, engine.context
            with stream.mine():
                layers = self.plans[name].layers()
                found[name] = join(layers, context.timed(stream.handle, stream.wait, runs))
        return found


def check_tensors(
    graph: str, tensors: Sequence[Tensor], signature: GraphSignature, profile: Profile
) -> None:
    """Check that a plan reads and writes what the profile's graph does.

    Raises BundleError naming every tensor that does not fit.
    """
    given = {tensor.name: tensor for tensor in tensors}
    wanted = {spec.name: (spec, True) for spec in signature.read}
    wanted |= {spec.name: (spec, False) for spec in signature.outputs}
    if graph != "generator":
        wanted |= {spec.name + NEXT: (spec, False) for spec in signature.state}
    wrong = [f"no {name}" for name in wanted.keys() - given.keys()]
    wrong += [f"unknown {name}" for name in given.keys() - wanted.keys()]
    caches = ("k_cache", "v_cache", "k_block", "v_block") if graph == "generator" else ()
    for name in sorted(wanted.keys() & given.keys()):
        (spec, is_input), found = wanted[name], given[name]
        in_cache = name.startswith(caches) or (graph == "prompt" and not is_input)
        fp8 = found.dtype == "FP8" and in_cache
        fits = (fp8 or found.dtype in FITTING[spec.dtype]) and tuple(found.shape) == spec.shape
        fits |= name.startswith(caches) and _is_tiled(found, spec, profile)
        if found.is_input is not is_input or not fits:
            text = f"{name} is {found.dtype} {list(found.shape)}"
            wrong.append(f"{text}, not {spec.dtype} {list(spec.shape)}")
    types = {given[spec.name].dtype for spec in signature.state if spec.name in given}
    if graph == "generator" and len(types) > 1:
        wrong.append("caches of different types")
    if wrong:
        misfit = f"the plan of {graph} does not fit profile {profile.name}"
        raise BundleError(f"{misfit}: {'; '.join(sorted(wrong))}", AGAIN)


def _is_tiled(found: Tensor, spec: TensorSpec, profile: Profile) -> bool:
    if profile.head_dim not in hopper_fp8.HEAD_DIMS:
        return False
    *outer, tile = hopper_fp8.image_shape(profile.model.heads, spec.shape[1], profile.head_dim)
    forms = (("FP8", (*outer, tile)), ("INT32", (*outer, tile // 4)))
    return (found.dtype, tuple(found.shape)) in forms
