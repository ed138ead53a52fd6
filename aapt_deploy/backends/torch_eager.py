"""Run the torch modules as engines: the plain reference for every other backend.

Caches are token-major tensors that the graph only reads. `commit` copies a block's keys and values
to its slot.

In bf16, inputs, weights and outputs of linear layers and convolutions are rounded to bf16. Sums,
attention and all else stay float32, as in TensorRT engines (trt/lower.py). It is no
faster, but FP8 is compared with it.
"""

import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor, nn

from aapt_deploy.backends.cpu import cores
from aapt_deploy.backends.sink import Sink
from aapt_deploy.backends.trial import BuildOptions, Built, Report, mean_psnr_db, median_step_ms
from aapt_deploy.bundle.bundle import Bundle, export_again
from aapt_deploy.bundle.signature import GraphSignature, text_pairs
from aapt_deploy.errors import BundleError
from aapt_deploy.models import checkpoint
from aapt_deploy.models.checkpoint import Checkpoint
from aapt_deploy.models.family import family_of
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.starts import all_starts

BACKEND = "torch"
PRODUCTS = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


def round_products(module: nn.Module) -> None:
    """Round every product below `module` to bf16, in place. A second call changes nothing."""
    for product in module.modules():
        if isinstance(product, PRODUCTS):
            product.weight.data = _bf16(product.weight.data)
            product.register_forward_pre_hook(lambda _, inputs: tuple(_bf16(x) for x in inputs))
            product.register_forward_hook(lambda _, inputs, output: _bf16(output))


def _run(module: nn.Module, signature: GraphSignature, values: dict[str, Tensor]) -> list[Tensor]:
    with torch.inference_mode():
        out = module(*(values[spec.name] for spec in signature.read))
    return list(out) if isinstance(out, tuple) else [out]


class EagerEngine:
    """The encoder, prompt or decoder graph with its state."""

    def __init__(self, module: nn.Module, signature: GraphSignature) -> None:
        self.module, self.signature = module, signature
        self.reset()

    def reset(self, **state: np.ndarray) -> None:
        self.state = {spec.name: torch.zeros(spec.shape) for spec in self.signature.state}

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        values = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
        out, specs = _run(self.module, self.signature, values | self.state), self.signature.outputs
        self.state = dict(zip(self.state, out[len(specs) :], strict=True))
        return {spec.name: tensor.numpy() for spec, tensor in zip(specs, out, strict=False)}


class EagerGenerator:
    """The generator with its caches."""

    def __init__(self, module: nn.Module, signature: GraphSignature, profile: Profile) -> None:
        self.module, self.signature, self.profile = module, signature, profile
        self.ring = Ring.of(profile)
        specs = (*signature.state, *signature.conditioning)  # caches first
        self.state = {spec.name: torch.zeros(spec.shape) for spec in specs}
        self.last: list[Tensor] = []
        caches = {name: tensor.numpy() for name, tensor in self.caches.items()}
        self.sink = Sink(profile, caches)
        self.state |= {name: torch.from_numpy(array) for name, array in self.sink.keys.items()}

    @property
    def caches(self) -> dict[str, Tensor]:
        return {spec.name: self.state[spec.name] for spec in self.signature.state}

    def reset(self, **state: np.ndarray) -> None:
        if not state:
            for tensor in self.state.values():
                tensor.zero_()
        for name, text in text_pairs(self.profile, state):
            self.state[name][:, : self.profile.text.tokens] = torch.from_numpy(text)

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        place = self.ring.place(int(inputs.pop("block")))
        values = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
        values["cache_len"] = torch.tensor([place.cache_len], dtype=torch.int32)
        clean, *self.last = _run(self.module, self.signature, values | self.state)
        return {"clean": clean.numpy()}

    def commit(self, block: int) -> None:
        slot = self.ring.place(block).slot
        for spec, kept in zip(self.signature.state, self.last, strict=True):
            self.state[spec.name][:, slot : slot + self.profile.block_tokens] = kept
        self.sink.keep(block)

    def turn(self, rope: np.ndarray) -> None:
        self.sink.turn(rope)


class EagerEngines:
    """All graphs of a checkpoint as torch modules."""

    backend = BACKEND
    overlapped = False

    def __init__(self, loaded: Checkpoint, threads: int, precision: str) -> None:
        """Convert the networks of `loaded` in place if `precision` is bf16."""
        torch.set_num_threads(threads)
        self.precision = precision
        if precision == "bf16":
            round_products(loaded.generator)
            round_products(loaded.vae)
        self.profile = loaded.profile
        networks = family_of(self.profile).networks()
        self.modules = networks.graph_modules(self.profile, loaded.generator, loaded.vae)
        self._allocate()

    def _allocate(self) -> None:
        """Make the state of one stream."""
        self.engines: dict[str, EagerEngine | EagerGenerator] = {}
        for name, signature in family_of(self.profile).signatures(self.profile).items():
            self.engines[name] = (
                EagerGenerator(self.modules[name], signature, self.profile)
                if name == "generator"
                else EagerEngine(self.modules[name], signature)
            )

    def fork(self) -> "EagerEngines":
        """Return a fresh state over the same networks."""
        fork = copy(self)
        fork._allocate()
        return fork

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        return {
            graph: {name: tensor.numpy().copy() for name, tensor in engine.state.items()}
            for graph, engine in self.engines.items()
        }

    def restore(self, state: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        with torch.inference_mode():  # a decoder's memory was made in it
            for graph, arrays in state.items():
                for name, array in arrays.items():
                    self.engines[graph].state[name].copy_(torch.from_numpy(array))

    @property
    def generator(self) -> EagerGenerator:
        generator = self.engines["generator"]
        assert isinstance(generator, EagerGenerator)
        return generator

    def __getitem__(self, graph: str) -> EagerEngine | EagerGenerator:
        return self.engines[graph]

    def close(self) -> None:
        self.engines.clear()
        self.modules = {}


def build(bundle: Bundle, precisions: Sequence[str], options: BuildOptions) -> list[Built]:
    """Measure the checkpoint in each of `precisions`, and compare bf16 with fp32.

    Nothing is compiled.
    Raises BusyError if another build uses the bundle.
    Raises BundleError if the bundle is damaged.
    """
    return [_build(bundle, precision, options.report) for precision in precisions]


def _build(bundle: Bundle, precision: str, report: Report) -> Built:
    key, began = f"{BACKEND}-{precision}", time.monotonic()
    with bundle.add_engine(key) as stage:
        profile, starts = bundle.profile, all_starts(bundle)
        engines, psnr = EagerEngines(checkpoint_of(bundle), cores(), precision), None
        step_ms = round(median_step_ms(engines, profile, starts[0]), 2)
        if precision != "fp32":
            report(f"{key}: comparing with fp32")
            reference = EagerEngines(checkpoint_of(bundle), cores(), "fp32")
            psnr = mean_psnr_db(reference, engines, profile, starts)
        engines.close()
        seconds = round(time.monotonic() - began, 1)
        built = Built(key, step_ms, stage.size, cores(), False, psnr, seconds)
        stage.entry |= {"backend": BACKEND, "precision": precision, "cache_layout": "token_major"}
        stage.entry |= asdict(built)
    return built


def open_bundle(bundle: Bundle, precision: str) -> EagerEngines:
    """Open the checkpoint inside `bundle`."""
    entry = bundle.engines[f"{BACKEND}-{precision}"]
    return EagerEngines(checkpoint_of(bundle), int(entry["threads"]), precision)


def checkpoint_of(bundle: Bundle) -> Checkpoint:
    """Load the checkpoint inside `bundle`. Raises BundleError if its graphs are others.

    The bundle's hashes detect damage, but not a checkpoint of another profile.
    """
    loaded = checkpoint.load(bundle.checked(bundle.CHECKPOINT))
    profiles = (bundle.profile, loaded.profile)
    ours, its = (family_of(profile).signatures(profile) for profile in profiles)
    names = sorted(ours.keys() | its.keys())
    if wrong := [name for name in names if ours.get(name) != its.get(name)]:
        differ = f"profile.toml and checkpoint differ in {', '.join(wrong)}"
        raise BundleError(f"bundle {bundle.path}: {differ}", export_again(bundle.path))
    return loaded
