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

A plan's receipt (TensorRT, GPU, kernels, graph) and its hash are checked before it is deserialised.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from aapt_deploy.backends.trt import plan_file
from aapt_deploy.backends.trt.cuda import Device, Stream, with_driver
from aapt_deploy.backends.trt.plan_file import AGAIN, Receipt, join
from aapt_deploy.backends.trt.state import (
    CacheLayer,
    HopperTiles,
    Launch,
    StagingBuffer,
    TokenMajor,
    size_of,
)
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.bundle.signature import GraphSignature, TensorSpec, layer_names
from aapt_deploy.errors import BundleError
from aapt_deploy.models.family import family_of
from aapt_deploy.ops.block_causal_attention import NEXT, Ring, hopper_fp8
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.engine import LayerTime, OneState

if TYPE_CHECKING:
    from aapt_deploy.backends.trt.api import Plan, Tensor

BACKEND = "tensorrt"
FITTING = {  # type in the signature -> in the plan
    "float32": ("FLOAT", "HALF", "BF16"),
    "int32": ("INT32",),
    "int64": ("INT64", "INT32"),
    "uint8": ("UINT8",),
}
PLUGINS = ("python", "aot", "native")


class TrtEngine:
    """One graph without blocks: encoder, prompt or decoder."""

    def __init__(
        self,
        plan: "Plan",
        signature: GraphSignature,
        device: Device,
        stream: Stream,
        captured: bool,
    ) -> None:
        given = {tensor.name: tensor for tensor in plan.tensors}
        self.stream, self.context = stream, plan.context()
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
        self.stream, self.context = stream, plan.context()
        self.inputs = StagingBuffer(device, [given[spec.name] for spec in signature.inputs])
        self.clean = StagingBuffer(device, [given["clean"]])
        specs = (*signature.state, *signature.outputs)
        self.sizes = {s.name: size_of(given[s.name]) for s in specs if s.name != "clean"}
        self.held = {name: device.memory(size) for name, size in self.sizes.items()}
        names = (layer_names(prefix, profile) for prefix in CacheLayer._fields)
        rows = zip(*names, strict=True)
        self.layers = [CacheLayer(*(self.held[name] for name in row)) for row in rows]
        self.reset()  # before the first run: new memory may have NaN
        for name, address in (self.inputs.addresses | self.clean.addresses | self.held).items():
            self.context.bind(name, address)
        self.step = stream.prepare(self._step, options.captured)
        cache = given[signature.state[0].name]
        if len(cache.shape) == 4:
            row = size_of(cache) // self.ring.tokens
            tokens = self.ring.block_tokens
            self.cache: TokenMajor | HopperTiles
            self.cache = TokenMajor(stream, self.layers, cache.dtype, row, tokens)
        else:
            launch, scales = options.launch(profile.head_dim), options.scales
            captured = options.captured
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
                if k in state:
                    self.cache.write_text(layer, state[k], state[v])

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


class TrtEngines(OneState):
    """All graphs of a bundle on one GPU. Closing it closes the device."""

    backend = BACKEND
    overlapped = True

    def __init__(
        self,
        profile: Profile,
        plans: "Mapping[str, Plan]",
        device: Device,
        precision: str,
        options: RunOptions,
    ) -> None:
        """Open all engines. `device` is closed if that fails.

        Raises BundleError if a plan's tensors are not the profile's.
        Raises MachineError if the GPU is full.
        """
        self.precision, self.device, self.plans = precision, device, dict(plans)
        self.engines: dict[str, TrtEngine | TrtGenerator] = {}
        try:
            main, beside = device.stream(), device.stream()
            for name, signature in family_of(profile).signatures(profile).items():
                plan, stream = self.plans[name], beside if name == "decoder" else main
                check_tensors(name, plan.tensors, signature, profile)
                self.engines[name] = (
                    TrtGenerator(plan, signature, profile, device, main, options)
                    if name == "generator"
                    else TrtEngine(plan, signature, device, stream, options.captured)
                )
            device.seal()
        except BaseException:
            self.close()
            raise

    def _let_go(self) -> None:
        self.engines.clear()  # contexts before their plans
        self.plans.clear()

    @property
    def generator(self) -> TrtGenerator:
        generator = self.engines["generator"]
        assert isinstance(generator, TrtGenerator)
        return generator

    def __getitem__(self, graph: str) -> TrtEngine | TrtGenerator:
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
    graph: str, tensors: "Sequence[Tensor]", signature: GraphSignature, profile: Profile
) -> None:
    """Check that a plan reads and writes what the profile's graph does.

    Raises BundleError naming every tensor that does not fit.
    """
    given = {tensor.name: tensor for tensor in tensors}
    wanted = {spec.name: (spec, True) for spec in (*signature.inputs, *signature.state)}
    wanted |= {spec.name: (spec, False) for spec in signature.outputs}
    if graph != "generator":
        wanted |= {spec.name + NEXT: (spec, False) for spec in signature.state}
    wrong = [f"no {name}" for name in wanted.keys() - given.keys()]
    wrong += [f"unknown {name}" for name in given.keys() - wanted.keys()]
    caches = ("k_cache", "v_cache", "k_block", "v_block") if graph == "generator" else ()
    for name in sorted(wanted.keys() & given.keys()):
        (spec, is_input), found = wanted[name], given[name]
        fits = found.dtype in FITTING[spec.dtype] and tuple(found.shape) == spec.shape
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


def _is_tiled(found: "Tensor", spec: TensorSpec, profile: Profile) -> bool:
    if profile.head_dim not in hopper_fp8.HEAD_DIMS:
        return False
    *outer, tile = hopper_fp8.image_shape(profile.model.heads, spec.shape[1], profile.head_dim)
    forms = (("FP8", (*outer, tile)), ("INT32", (*outer, tile // 4)))
    return (found.dtype, tuple(found.shape)) in forms


# Opening


@dataclass(frozen=True)
class Entry:
    """One TensorRT engine, as the manifest describes it."""

    graphs: dict[str, str]  # graph -> plan file
    receipts: dict[str, Receipt]
    # "python": our plugin in Python; "aot": compiled into the plan; "native": TensorRT's attention
    plugin: str
    scales: str | None  # file with the scales of FP8 caches
    captured: bool

    @classmethod
    def of(cls, bundle: Bundle, precision: str) -> "Entry":
        """Read the manifest. Raises BundleError if its entry is not whole."""
        raw = bundle.engines[f"{BACKEND}-{precision}"]
        files, receipts = raw.get("graphs"), raw.get("receipts")
        plugin, scales, captured = raw.get("plugin"), raw.get("scales"), raw.get("cuda_graph", True)
        wanted, named = family_of(bundle.profile).signatures(bundle.profile).keys(), False
        if isinstance(files, dict) and isinstance(receipts, dict):
            named = files.keys() == receipts.keys() == wanted
        if not (
            named and files and receipts and all(isinstance(file, str) for file in files.values())
            and plugin in PLUGINS and isinstance(scales, str | None) and isinstance(captured, bool)
        ):  # fmt: skip
            entry = f"what its manifest says of its {BACKEND} engine in {precision}"
            raise BundleError(f"bundle {bundle.path}: {entry} is not whole", AGAIN)
        parsed = {name: Receipt.of(receipts[name], files[name]) for name in files}
        return cls(files, parsed, str(plugin), scales, captured)


def open_bundle(bundle: Bundle, precision: str) -> TrtEngines:
    """Open the engines of `bundle` in `precision`: graphs captured, everything allocated.

    No plan is deserialised before all of them have been checked. Raises MachineError without
    TensorRT, driver or GPU, or with another than the plans' own. Raises BundleError for plans
    that are stale, changed or not whole. Raises InputError for damaged scales.
    """
    entry = Entry.of(bundle, precision)
    device = with_driver()
    try:
        from aapt_deploy.backends.trt import api
        from aapt_deploy.ops.block_causal_attention import kernels

        version = api.version()
        for name, receipt in entry.receipts.items():
            here = device.gpu(version, kernels.source_hash() if receipt.kernels else "")
            sha256 = plan_file.graph_sha256(bundle.manifest["files"], name)
            plan_file.check(receipt, here, sha256, entry.graphs[name])
        files = {name: bundle.checked(file) for name, file in entry.graphs.items()}
        caches = _scales(bundle, entry.scales) if entry.scales else []
        if entry.plugin == "python":
            from aapt_deploy.backends.trt.plugin import python as python_plugin

            python_plugin.register(kernels.launcher)
        plans = {name: api.open_plan(file) for name, file in files.items()}
    except BaseException:
        device.close()
        raise
    return TrtEngines(bundle.profile, plans, device, precision, RunOptions(entry.captured, caches))


def _scales(bundle: Bundle, file: str) -> list[hopper_fp8.Scales]:
    from aapt_deploy.bundle.scales import load

    return load(bundle.checked(file), bundle.profile).attention
