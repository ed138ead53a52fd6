"""TensorRT on an NVIDIA GPU: the engine of production. It imports neither torch nor onnx.

    stream 1   encoder, prompt, generator, commit        caches stay on the device; a block is committed where the ring has its place
    stream 2   decoder                                   memory alternates between two sets of buffers

A pass is one captured graph: inputs up, plan, `clean` down; a commit of FP8 caches is another. The ring's two numbers, `cache_len` and the slot, are
uploaded inside and read by the kernels on the device, so the same graphs serve every block. The decoder has two, one for each direction of its
memory. Latents go from graph to graph by the host, 0.3 MB each way at 736x416, because the sampler is the host's; frames arrive in pinned memory.
The rollout makes the next latent while this one is decoded (Engines.overlapped), which is what the second stream is for. Everything is allocated
when the bundle is opened.

A plan is refused before one byte of it is deserialised when its receipt names another TensorRT, GPU, kernel or graph, or its hash differs.

Not run on TensorRT or on a GPU by us. What was done instead: every call is checked against the real bindings of 10.16 and 11.4 with golden logs, and
the wiring is executed over an emulated device with ONNX Runtime in the place of the plans, where the frames must be the onnxruntime engine's.
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
from aapt_deploy.bundle.signature import GraphSignature, TensorSpec
from aapt_deploy.errors import BundleError
from aapt_deploy.models.aapt.signature import layer_names, signatures
from aapt_deploy.ops.block_causal_attention import NEXT, Ring, hopper_fp8
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.engine import LayerTime

if TYPE_CHECKING:
    from aapt_deploy.backends.trt.api import Plan, Tensor

BACKEND = "tensorrt"
FITTING = {  # type in the signature -> in the plan
    "float32": ("FLOAT", "HALF", "BF16"), "int32": ("INT32",), "int64": ("INT64", "INT32"), "uint8": ("UINT8",),
}  # fmt: skip
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
        self.state = [
            {name: device.memory(size) for name, size in self.sizes.items()}
            for _ in range(2 if self.sizes else 1)
        ]
        self.raw = (
            signature.name == "prompt"
        )  # its only reader, the generator, takes the plan's own types
        self.reset()
        self.steps = [
            self._prepare(self.state[i], self.state[i - 1], captured)
            for i in range(len(self.state))
        ]
        self.reset()

    def _prepare(
        self, read: dict[str, int], write: dict[str, int], captured: bool
    ) -> Callable[[], None]:
        addresses = (
            self.inputs.addresses
            | self.outputs.addresses
            | read
            | {name + NEXT: address for name, address in write.items()}
        )

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

    def commit(self, block: int) -> None:
        raise TypeError("only a generator has blocks to commit")


class TrtGenerator:
    """The generator and its caches."""

    def __init__(
        self,
        plan: "Plan",
        signature: GraphSignature,
        profile: Profile,
        device: Device,
        stream: Stream,
        options: "RunOptions",
    ) -> None:
        given = {tensor.name: tensor for tensor in plan.tensors}
        self.profile, self.ring, self.stream, self.context = (
            profile,
            Ring.of(profile),
            stream,
            plan.context(),
        )
        self.inputs = StagingBuffer(device, [given[spec.name] for spec in signature.inputs])
        self.clean = StagingBuffer(device, [given["clean"]])
        kept = [
            spec.name for spec in (*signature.state, *signature.outputs) if spec.name != "clean"
        ]
        self.sizes = {name: size_of(given[name]) for name in kept}
        self.held = {name: device.memory(size) for name, size in self.sizes.items()}
        names = (layer_names(prefix, profile) for prefix in CacheLayer._fields)
        self.layers = [
            CacheLayer(*(self.held[name] for name in layer)) for layer in zip(*names, strict=True)
        ]
        self.reset()  # before the first run: whatever lay there might be no number
        for name, address in (self.inputs.addresses | self.clean.addresses | self.held).items():
            self.context.bind(name, address)
        self.step = stream.prepare(self._step, options.captured)
        cache = given[signature.state[0].name]
        if len(cache.shape) == 4:
            row = size_of(cache) // self.ring.tokens
            self.cache: TokenMajor | HopperTiles = TokenMajor(
                stream, self.layers, cache.dtype, row, self.ring.frame_tokens
            )
        else:
            self.cache = HopperTiles(
                device,
                stream,
                options.launch(profile.head_dim),
                self.layers,
                options.scales,
                self.ring,
                options.captured,
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
    """How plans are run."""

    captured: bool = True  # into CUDA graphs
    scales: list[hopper_fp8.Scales] = field(default_factory=list)  # of every layer; FP8 caches only
    launch: Callable[[int], Launch] = _kernels  # head_dim -> our kernels


class TrtEngines:
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
        """Raises BundleError when a plan's tensors are not the profile's, MachineError when the GPU is full. `device` is closed then, too."""
        self.precision, self.device, self.plans = precision, device, dict(plans)
        self.engines: dict[str, TrtEngine | TrtGenerator] = {}
        try:
            main, beside = device.stream(), device.stream()
            for name, signature in signatures(profile).items():
                check_tensors(name, self.plans[name].tensors, signature, profile)
                if name == "generator":
                    self.engines[name] = TrtGenerator(
                        self.plans[name], signature, profile, device, main, options
                    )
                else:
                    stream = beside if name == "decoder" else main
                    self.engines[name] = TrtEngine(
                        self.plans[name], signature, device, stream, options.captured
                    )
            device.seal()
        except BaseException:
            self.close()
            raise

    def _let_go(self) -> None:
        self.engines.clear()  # contexts before their plans
        self.plans.clear()

    def __getitem__(self, graph: str) -> TrtEngine | TrtGenerator:
        return self.engines[graph]

    def close(self) -> None:
        """Wait for what runs, in whichever thread; a later call of an engine raises RuntimeError."""
        self.device.undo(self._let_go)  # what is noted last is done first
        self.device.close()

    def layer_times(self, runs: int) -> dict[str, list[LayerTime]]:
        """Times of every layer of generator and decoder, from `runs` runs outside any graph. Slower than real steps; state is used up by it."""
        found = {}
        for name in ("generator", "decoder"):
            engine = self.engines[name]
            with engine.stream.mine():
                found[name] = join(
                    self.plans[name].layers(),
                    engine.context.timed(engine.stream.handle, engine.stream.wait, runs),
                )
        return found


def check_tensors(
    graph: str, tensors: "Sequence[Tensor]", signature: GraphSignature, profile: Profile
) -> None:
    """Insist that a plan reads and writes what the profile's graph does. Raises BundleError naming every tensor that does not fit."""
    given = {tensor.name: tensor for tensor in tensors}
    wanted: dict[str, tuple[TensorSpec, bool]] = {}
    for spec in (*signature.inputs, *signature.state):
        wanted[spec.name] = (spec, True)
    for spec in signature.outputs:
        wanted[spec.name] = (spec, False)
    if graph != "generator":
        wanted |= {spec.name + NEXT: (spec, False) for spec in signature.state}
    wrong = [f"no {name}" for name in wanted.keys() - given.keys()] + [
        f"unknown {name}" for name in given.keys() - wanted.keys()
    ]
    for name in sorted(wanted.keys() & given.keys()):
        spec, is_input = wanted[name]
        found = given[name]
        cached = graph == "generator" and name.startswith(
            ("k_cache", "v_cache", "k_block", "v_block")
        )
        fits = (found.dtype in FITTING[spec.dtype] and tuple(found.shape) == spec.shape) or (
            cached and _is_tiled(found, spec, profile)
        )
        if found.is_input is not is_input or not fits:
            wrong.append(
                f"{name} is {found.dtype} {list(found.shape)}, not {spec.dtype} {list(spec.shape)}"
            )
    if (
        graph == "generator"
        and len({given[spec.name].dtype for spec in signature.state if spec.name in given}) > 1
    ):
        wrong.append("caches of different types")
    if wrong:
        raise BundleError(
            f"the plan of {graph} does not fit profile {profile.name}: {'; '.join(sorted(wrong))}",
            AGAIN,
        )


def _is_tiled(found: "Tensor", spec: TensorSpec, profile: Profile) -> bool:
    if profile.head_dim not in hopper_fp8.HEAD_DIMS:
        return False
    *outer, tile = hopper_fp8.image_shape(profile.model.heads, spec.shape[1], profile.head_dim)
    return (found.dtype, tuple(found.shape)) in (
        ("FP8", (*outer, tile)),
        ("INT32", (*outer, tile // 4)),
    )


# Opening


@dataclass(frozen=True)
class Entry:
    """What the manifest says of one TensorRT engine."""

    graphs: dict[str, str]  # graph -> plan file
    receipts: dict[str, Receipt]
    plugin: str  # "python": our plugin runs as Python inside TensorRT; "aot": compiled into the plan; "native": TensorRT's own attention
    scales: str | None  # file with the scales of FP8 caches
    captured: bool

    @classmethod
    def of(cls, bundle: Bundle, precision: str) -> "Entry":
        """Raises BundleError when it is not whole."""
        raw = bundle.engines[f"{BACKEND}-{precision}"]
        files, receipts, wanted = (
            raw.get("graphs"),
            raw.get("receipts"),
            signatures(bundle.profile).keys(),
        )
        plugin, scales, captured = raw.get("plugin"), raw.get("scales"), raw.get("cuda_graph", True)
        named = (
            isinstance(files, dict)
            and isinstance(receipts, dict)
            and files.keys() == receipts.keys() == wanted
        )
        if not (
            named and files and receipts and all(isinstance(file, str) for file in files.values())
            and plugin in PLUGINS and isinstance(scales, str | None) and isinstance(captured, bool)
        ):  # fmt: skip
            raise BundleError(
                f"bundle {bundle.path}: what its manifest says of its {BACKEND} engine in {precision} is not whole",
                AGAIN,
            )
        return cls(
            files,
            {name: Receipt.of(receipts[name], files[name]) for name in files},
            str(plugin),
            scales,
            captured,
        )


def open_bundle(bundle: Bundle, precision: str) -> TrtEngines:
    """The engines of `bundle` in `precision`, ready to run: graphs captured, everything allocated.

    Raises MachineError without TensorRT, driver or GPU, or with another TensorRT or GPU than the plans were built for; BundleError for plans that are
    stale, changed or not whole; InputError for damaged scales. No plan is deserialised before all of them have passed.
    """
    entry = Entry.of(bundle, precision)
    device = with_driver()
    try:
        from aapt_deploy.backends.trt import api
        from aapt_deploy.ops.block_causal_attention import kernels

        version = api.version()
        for name, receipt in entry.receipts.items():
            here = device.gpu(version, kernels.source_hash() if receipt.kernels else "")
            plan_file.check(
                receipt,
                here,
                plan_file.graph_sha256(bundle.manifest["files"], name),
                entry.graphs[name],
            )
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
