"""The torch modules themselves behind the Engine protocol: the plain reference that every other backend is compared with.

Caches are token-major tensors that the graph only reads; a block is committed by copying its keys and values to its slot.

In bf16, what every linear layer and convolution reads, multiplies with and gives is rounded to bf16, sums and all the rest are float32: the
arithmetic that graph_bf16 asks of TensorRT, at no gain in speed. It is what FP8 is compared with; attention keeps float32.
"""

import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor, nn

from aapt_deploy.backends.cpu import cores
from aapt_deploy.backends.trial import Built, Options, Report, mean_psnr_db, median_step_ms
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
    """Make every product below `module` one in bf16, in place. A second time changes nothing."""
    for product in module.modules():
        if isinstance(product, PRODUCTS):
            product.weight.data = _bf16(product.weight.data)
            product.register_forward_pre_hook(lambda _, inputs: tuple(_bf16(x) for x in inputs))
            product.register_forward_hook(lambda _, inputs, output: _bf16(output))


def _run(module: nn.Module, signature: GraphSignature, values: dict[str, Tensor]) -> list[Tensor]:
    with torch.inference_mode():
        out = module(*(values[spec.name] for spec in (*signature.inputs, *signature.state)))
    return list(out) if isinstance(out, tuple) else [out]


class EagerEngine:
    """Encoder, prompt or decoder."""

    def __init__(self, module: nn.Module, signature: GraphSignature) -> None:
        self.module, self.signature = module, signature
        self.reset()

    def reset(self, **state: np.ndarray) -> None:
        self.state = {spec.name: torch.zeros(spec.shape) for spec in self.signature.state}

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        values = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
        out = _run(self.module, self.signature, values | self.state)
        count = len(self.signature.outputs)
        self.state = dict(zip(self.state, out[count:], strict=True))
        return {spec.name: tensor.numpy() for spec, tensor in zip(self.signature.outputs, out, strict=False)}

    def held(self) -> dict[str, Tensor]:
        """What the next run depends on."""
        return self.state

    def hold(self, state: dict[str, Tensor]) -> None:
        """Set what `held` returned."""
        self.state = state


class EagerGenerator:
    """The generator and its caches."""

    def __init__(self, module: nn.Module, signature: GraphSignature, profile: Profile) -> None:
        self.module, self.signature, self.profile = module, signature, profile
        self.ring = Ring.of(profile)
        self.caches = {spec.name: torch.zeros(spec.shape) for spec in signature.state}
        self.last: list[Tensor] = []

    def reset(self, **state: np.ndarray) -> None:
        if not state:
            for held in self.caches.values():
                held.zero_()
        for cache, text in text_pairs(self.profile, state):
            self.caches[cache][:, : self.profile.text.tokens] = torch.from_numpy(text)

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        place = self.ring.place(int(inputs.pop("block")))
        values = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
        values["cache_len"] = torch.tensor([place.cache_len], dtype=torch.int32)
        clean, *self.last = _run(self.module, self.signature, values | self.caches)
        return {"clean": clean.numpy()}

    def commit(self, block: int) -> None:
        slot = self.ring.place(block).slot
        for cache, kept in zip(self.caches.values(), self.last, strict=True):
            cache[:, slot : slot + self.profile.frame_tokens] = kept

    def held(self) -> dict[str, Tensor]:
        """What the next run depends on."""
        return self.caches

    def hold(self, state: dict[str, Tensor]) -> None:
        """Set what `held` returned."""
        self.caches = state


class EagerEngines:
    """All graphs as torch modules."""

    backend = BACKEND
    overlapped = False

    def __init__(self, loaded: Checkpoint, threads: int, precision: str) -> None:
        """In bf16 the networks of `loaded` are converted in place."""
        torch.set_num_threads(threads)
        self.precision = precision
        if precision == "bf16":
            round_products(loaded.generator)
            round_products(loaded.vae)
        self.profile = loaded.profile
        self.modules = family_of(self.profile).networks().graph_modules(self.profile, loaded.generator, loaded.vae)
        self._allocate()

    def _allocate(self) -> None:
        """State of one stream."""
        signatures = family_of(self.profile).signatures(self.profile)
        self.engines: dict[str, EagerEngine | EagerGenerator] = {
            name: EagerGenerator(self.modules[name], signature, self.profile) if name == "generator" else EagerEngine(self.modules[name], signature)
            for name, signature in signatures.items()
        }

    def fork(self) -> "EagerEngines":
        """A fresh state over the same networks."""
        fork = copy(self)
        fork._allocate()
        return fork

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        return {graph: {name: array.numpy().copy() for name, array in engine.held().items()} for graph, engine in self.engines.items()}

    def restore(self, state: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        for graph, arrays in state.items():
            self.engines[graph].hold({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})

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


def build(bundle: Bundle, precisions: Sequence[str], options: Options) -> list[Built]:
    """Measure the checkpoint itself in each of `precisions`, and compare bf16 with fp32: there is nothing to compile.

    Raises BusyError if another build holds the bundle, BundleError for a damaged bundle.
    """
    return [_build(bundle, precision, options.report) for precision in precisions]


def _build(bundle: Bundle, precision: str, report: Report) -> Built:
    key, began = f"{BACKEND}-{precision}", time.monotonic()
    with bundle.add_engine(key) as stage:
        starts = all_starts(bundle)
        engines, psnr = EagerEngines(checkpoint_of(bundle), cores(), precision), None
        step_ms = median_step_ms(engines, bundle.profile, starts[0])
        if precision != "fp32":
            report(f"{key}: comparing with fp32")
            psnr = mean_psnr_db(EagerEngines(checkpoint_of(bundle), cores(), "fp32"), engines, bundle.profile, starts)
        engines.close()
        built = Built(key, round(step_ms, 2), stage.size, cores(), False, psnr, round(time.monotonic() - began, 1))
        stage.entry |= {"backend": BACKEND, "precision": precision, "cache_layout": "token_major"} | asdict(built)
    return built


def open_bundle(bundle: Bundle, precision: str) -> EagerEngines:
    """The checkpoint inside `bundle`, run by torch."""
    entry = bundle.engines[f"{BACKEND}-{precision}"]
    return EagerEngines(checkpoint_of(bundle), int(entry["threads"]), precision)


def checkpoint_of(bundle: Bundle) -> Checkpoint:
    """The checkpoint inside `bundle`. Raises BundleError when its graphs are not those of the bundle's profile: a hash does not say whose it is."""
    loaded = checkpoint.load(bundle.checked(bundle.CHECKPOINT))
    ours, its = (family_of(profile).signatures(profile) for profile in (bundle.profile, loaded.profile))
    if wrong := sorted(name for name in ours.keys() | its.keys() if ours.get(name) != its.get(name)):
        raise BundleError(f"bundle {bundle.path}: profile.toml and checkpoint differ in {', '.join(wrong)}", export_again(bundle.path))
    return loaded
