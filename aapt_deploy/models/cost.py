"""`aapt plan`: what a profile needs of its target's memory, and how fast the hardware lets each stage be. Nothing is measured here.

The networks are built on the meta device and run once on shapes alone; their operations are counted as they pass. So the figures follow the modules,
and an 8B profile is planned in seconds on any machine. Activations are those of eager PyTorch, every tensor freed as soon as nothing refers to it:
engines that fuse need less. Floors are arithmetic: operations over the peak rate of dense tensor cores, or bytes over memory bandwidth, whichever is
longer. No kernel reaches them; 60 to 75 % is very good.
"""

import json
import math
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from aapt_deploy.bundle.signature import GraphSignature
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.graphs import graph_modules
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.models.aapt.vae import Vae
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import TILE_KEYS
from aapt_deploy.profiles import Profile

BYTES = {"fp32": 4, "bf16": 2, "fp8_e4m3": 1, "int8": 1}
RUNTIME_GB = 1.0  # CUDA context, cuBLAS and TensorRT's own, outside every pool: an allowance, not a measurement
WORKSPACE_GB = 2.0  # limit of the builder's tactic workspace


class Rates(NamedTuple):
    """Peak rates from the maker's data sheet, dense, SXM form."""

    flops: dict[str, float]  # by precision, per second
    bandwidth: float  # bytes per second


GPUS = {"H100": Rates({"fp8_e4m3": 1979e12, "bf16": 989e12, "fp32": 67e12}, 3.35e12)}


@dataclass(frozen=True)
class StageCost:
    """One graph, once."""

    name: str
    products_gflop: float  # linear layers and convolutions
    attention_gflop: float
    weights_gb: float
    activations_gb: float  # most at any moment
    floor_ms: float | None  # None where the target's rates are not known
    bound: str  # "compute" or "memory"; "" without a floor


@dataclass(frozen=True)
class Cost:
    """What a profile needs."""

    profile: str
    target: str
    stages: list[StageCost]
    cache_gb: float
    memory_gb: dict[str, float]  # what is resident while streaming, by what it is
    limit_gb: int  # of the target; 0: not known
    passes: int
    budget_ms: float
    floor_ms: float | None  # of one step: generator passes, then decoder

    @property
    def total_gb(self) -> float:
        return round(sum(self.memory_gb.values()), 2)

    @property
    def fits(self) -> bool:
        return not self.limit_gb or self.total_gb <= self.limit_gb

    @property
    def floors_ms(self) -> dict[str, float]:
        """Floors of a block's stages, as `aapt profile` names them; empty where the target's rates are not known."""
        by_name = {stage.name: stage.floor_ms for stage in self.stages}
        generator, decoder = by_name["generator"], by_name["decoder"]
        if self.floor_ms is None or generator is None or decoder is None:
            return {}
        return {"step": self.floor_ms, "generator": round(self.passes * generator, 3), "decoder": decoder}

    def json(self) -> str:
        return json.dumps({**asdict(self), "total_gb": self.total_gb, "fits": self.fits})


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors made inside, and the most that were alive at once. `given` and their views do not count."""

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.most = 0
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in given)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tree_iter(found):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.most = max(self.most, self.live)
        return found

    def _freed(self, size: int) -> None:
        self.live -= size


def cost_of(profile: Profile) -> Cost:
    """Compute what `profile` costs on its target."""
    with torch.device("meta"):
        modules = graph_modules(profile, Generator(profile), Vae(profile))
    gpu = GPUS.get(profile.target.name)
    stages = [_stage(profile, signature, modules[name], gpu) for name, signature in signatures(profile).items()]
    by_name = {stage.name: stage for stage in stages}
    cache = _cache_bytes(profile) / 1e9
    passes, working = len(profile.sampler.timesteps), ("generator", "decoder")
    resident = {
        "weights": sum(s.weights_gb for s in stages),
        "kv cache": cache,
        "decoder memory": 2 * sum(math.prod(spec.shape) for spec in signatures(profile)["decoder"].state) * BYTES[profile.precision.compute] / 1e9,
        "activations": sum(by_name[name].activations_gb for name in working),  # the two overlap
        "workspace": WORKSPACE_GB if gpu else 0.0,
        "runtime": RUNTIME_GB if gpu else 0.0,
    }
    floors = {name: by_name[name].floor_ms for name in working}
    floor = None if None in floors.values() else passes * (floors["generator"] or 0) + (floors["decoder"] or 0)
    return Cost(
        profile.name, profile.target.name, stages, round(cache, 3), {name: round(gb, 3) for name, gb in resident.items()}, profile.target.memory_gb,
        passes, round(profile.step_budget_ms, 1), None if floor is None else round(floor, 2),
    )  # fmt: skip


def _cache_bytes(profile: Profile) -> int:
    """All layers' caches; the FP8 layout holds whole tiles."""
    if profile.precision.kv_cache != "fp8_e4m3":
        return profile.kv_cache_bytes
    return profile.kv_cache_bytes // profile.cache_tokens * (math.ceil(profile.cache_tokens / TILE_KEYS) * TILE_KEYS)


def _stage(profile: Profile, signature: GraphSignature, module: nn.Module, gpu: Rates | None) -> StageCost:
    specs = (*signature.inputs, *signature.state)
    inputs = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in specs]
    counter, bytes_ = (
        FlopCounterMode(display=False, custom_mapping={torch.ops.aapt.block_causal_attention: _attention_flops}),
        LiveBytes([*inputs, *module.state_dict().values(), *module.buffers()]),
    )
    with torch.no_grad(), counter, bytes_:
        module(*inputs)
    by_op = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in by_op.items() if "attention" in str(op))
    products = sum(by_op.values()) - attention
    p = profile.precision
    stored = p.weights if signature.name in ("prompt", "generator") else p.compute  # the VAE stays in the compute precision
    weights = sum(math.prod(parameter.shape) for parameter in _used(signature.name, module)) * BYTES[stored]
    read = weights + (_cache_bytes(profile) if signature.name == "generator" else 0)
    floor, bound = None, ""
    if gpu:
        compute = products / gpu.flops[stored] + attention / gpu.flops[p.kv_cache]
        memory = read / gpu.bandwidth
        floor, bound = round(1000 * max(compute, memory), 3), "compute" if compute >= memory else "memory"
    return StageCost(
        signature.name, round(products / 1e9, 2), round(attention / 1e9, 2), round(weights / 1e9, 3), round(bytes_.most / 1e9, 3), floor, bound
    )


def _used(graph: str, module: Any) -> list[nn.Parameter]:
    """The parameters that a graph reads: generator and prompt share a network, encoder and decoder another."""
    if graph in ("encoder", "decoder"):
        return list(getattr(module.vae, graph).parameters())
    text = [name for name, _ in module.generator.named_parameters() if name.startswith(("text", "vocabulary"))]
    return [parameter for name, parameter in module.generator.named_parameters() if (name in text) == (graph == "prompt")]


def _attention_flops(q: Any, k: Any, v: Any, k_cache: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    """Two products of [T, D] with every key of the block and of a full cache, per head."""
    b, t, heads, dim = q
    return int(4 * b * t * (t + k_cache[1]) * heads * dim)
