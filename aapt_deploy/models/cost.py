"""`aapt plan`: compute the memory that a profile needs and the least time of each stage.

The networks are built on the meta device and run once on shapes alone; their operations are
counted. So the figures follow the modules, and an 8B profile takes seconds on any machine.
Activations are those of eager PyTorch, where a tensor is freed once nothing refers to it.
Engines that fuse need less. Floors are arithmetic: operations over the peak rate of dense tensor
cores, or bytes over memory bandwidth, whichever is longer. No kernel reaches them; 60 to 75 % is
very good.
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
from aapt_deploy.errors import UsageError
from aapt_deploy.models.family import family_of
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import TILE_KEYS
from aapt_deploy.profiles import Profile, Target

BYTES = {"fp32": 4, "bf16": 2, "fp8_e4m3": 1, "int8": 1}
RUNTIME_GB = 1.0  # CUDA context, cuBLAS, TensorRT: outside every pool; assumed, not measured
WORKSPACE_GB = 2.0  # limit of the builder's tactic workspace


class Rates(NamedTuple):
    """Peak rates that NVIDIA states: dense products on tensor cores, summed in FP32."""

    flops: dict[str, float]  # by precision, per second
    bandwidth: float  # bytes per second
    sm: int
    memory_gb: int


# H100: data sheet, SXM form. Others: tables of the cards in the appendices of NVIDIA's whitepapers
# "Ada GPU Architecture", "RTX Blackwell GPU Architecture" and "RTX Blackwell PRO GPU Architecture";
# the last is of the Workstation Edition, 600 W. A GeForce sums in FP32 at half the rate of FP16,
# in FP8 and in bf16; an RTX PRO does not. If TensorRT-RTX sums in FP16, floors are too high there.
# RTX 4060: 24 of the RTX 4090's 128 SMs, at 2.46 instead of 2.52 GHz.
GPUS = {
    "H100": Rates({"fp8_e4m3": 1979e12, "bf16": 989e12, "fp32": 67e12}, 3.35e12, 90, 80),
    "RTX 4060": Rates({"fp8_e4m3": 60.5e12, "bf16": 30.2e12, "fp32": 15.1e12}, 0.272e12, 89, 8),
    "RTX 4090": Rates({"fp8_e4m3": 330.3e12, "bf16": 165.2e12, "fp32": 82.6e12}, 1.008e12, 89, 24),
    "RTX 5090": Rates({"fp8_e4m3": 419e12, "bf16": 209.5e12, "fp32": 104.8e12}, 1.792e12, 120, 32),
    "RTX PRO 6000": Rates(
        {"fp8_e4m3": 1007.6e12, "bf16": 503.8e12, "fp32": 126e12}, 1.792e12, 120, 96
    ),
}


def on_gpu(profile: Profile, name: str) -> Profile:
    """Return the profile for another GPU. Raises UsageError if its rates are not known."""
    if name not in GPUS:
        wrong = f"GPU {name!r} is not one whose rates are known"
        raise UsageError(wrong, f"one of: {', '.join(GPUS)}")
    rates = GPUS[name]
    return profile.replace(target=Target("cuda", name, rates.sm, rates.memory_gb))


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
    latents: int = 1  # latent frames of a block, which the decoder takes one by one

    @property
    def total_gb(self) -> float:
        return round(sum(self.memory_gb.values()), 2)

    @property
    def fits(self) -> bool:
        return not self.limit_gb or self.total_gb <= self.limit_gb

    @property
    def floors_ms(self) -> dict[str, float]:
        """Return the floors of a block's stages by name; {} if the target's rates are unknown."""
        by_name = {stage.name: stage.floor_ms for stage in self.stages}
        generator, decoder = by_name["generator"], by_name["decoder"]
        if self.floor_ms is None or generator is None or decoder is None:
            return {}
        generator = round(self.passes * generator, 3)
        decoder = round(self.latents * decoder, 3)
        return {"step": self.floor_ms, "generator": generator, "decoder": decoder}

    def json(self) -> str:
        return json.dumps({**asdict(self), "total_gb": self.total_gb, "fits": self.fits})


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all tensors made inside, and the most alive at once.

    `given` tensors and their views do not count.
    """

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.most = 0
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in given)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tree_iter(found):
            if not isinstance(tensor, torch.Tensor):
                continue
            if (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.most = max(self.most, self.live)
        return found

    def _freed(self, size: int) -> None:
        self.live -= size


def cost_of(profile: Profile) -> Cost:
    """Compute what `profile` costs on its target."""
    networks = family_of(profile).networks()
    with torch.device("meta"):
        modules = networks.graph_modules(profile, *networks.build(profile))
    gpu = GPUS.get(profile.target.name)
    graphs = family_of(profile).signatures(profile)
    stages = [_stage(profile, graphs[name], modules[name], gpu) for name in graphs]
    by_name = {stage.name: stage for stage in stages}
    cache = _cache_bytes(profile) / 1e9
    passes, working = profile.passes, ("generator", "decoder")
    memory = sum(math.prod(spec.shape) for spec in graphs["decoder"].state)
    resident = {
        "weights": sum(s.weights_gb for s in stages),
        "kv cache": cache,
        "decoder memory": 2 * memory * BYTES[profile.precision.compute] / 1e9,
        "activations": sum(by_name[name].activations_gb for name in working),  # the two overlap
        "workspace": WORKSPACE_GB if gpu else 0.0,
        "runtime": RUNTIME_GB if gpu else 0.0,
    }
    floors = {name: by_name[name].floor_ms for name in working}
    latents = profile.video.block_frames
    least = passes * (floors["generator"] or 0) + latents * (floors["decoder"] or 0)
    floor = None if None in floors.values() else round(least, 2)
    return Cost(
        profile.name, profile.target.name, stages, round(cache, 3),
        {name: round(gb, 3) for name, gb in resident.items()}, profile.target.memory_gb,
        passes, round(profile.step_budget_ms, 1), floor, latents,
    )  # fmt: skip


def _cache_bytes(profile: Profile) -> int:
    """Return the bytes of all layers' caches; the FP8 layout has whole tiles."""
    if profile.precision.kv_cache != "fp8_e4m3":
        return profile.kv_cache_bytes
    whole = math.ceil(profile.cache_tokens / TILE_KEYS) * TILE_KEYS
    return profile.kv_cache_bytes // profile.cache_tokens * whole


def live_bytes(profile: Profile, graph: str) -> int:
    """Return the most bytes alive at once in one eager run of a graph in float32."""
    networks = family_of(profile).networks()
    with torch.device("meta"):
        module = networks.graph_modules(profile, *networks.build(profile))[graph]
    signature = family_of(profile).signatures(profile)[graph]
    return _counted(signature, module)[0]


def _counted(signature: GraphSignature, module: nn.Module) -> tuple[int, dict[Any, int]]:
    """Run a graph on shapes alone; return the most bytes alive, and operations by operator."""
    specs = signature.read
    with torch.device("meta"):
        inputs = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in specs]
    ours = {torch.ops.aapt.block_causal_attention: _attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=ours)
    bytes_ = LiveBytes([*inputs, *module.state_dict().values(), *module.buffers()])
    with torch.no_grad(), counter, bytes_:
        module(*inputs)
    return bytes_.most, counter.get_flop_counts()["Global"]


def _stage(
    profile: Profile, signature: GraphSignature, module: nn.Module, gpu: Rates | None
) -> StageCost:
    live_bytes, by_op = _counted(signature, module)
    attention = sum(count for op, count in by_op.items() if "attention" in str(op))
    products = sum(by_op.values()) - attention
    p = profile.precision
    vae = signature.name in ("encoder", "decoder")  # it stays in the compute precision
    stored = p.compute if vae else p.weights
    count = sum(
        math.prod(parameter.shape)
        for parameter in family_of(profile).networks().parameters(signature.name, module)
    )
    weights = count * BYTES[stored]
    read = weights + (_cache_bytes(profile) if signature.name == "generator" else 0)
    floor, bound = None, ""
    if gpu:
        compute = products / gpu.flops[stored] + attention / gpu.flops[p.kv_cache]
        memory = read / gpu.bandwidth
        floor = round(1000 * max(compute, memory), 3)
        bound = "compute" if compute >= memory else "memory"
    return StageCost(
        signature.name, round(products / 1e9, 2), round(attention / 1e9, 2),
        round(weights / 1e9, 3), round(live_bytes / 1e9, 3), floor, bound,
    )  # fmt: skip


def _attention_flops(
    q: Any, k: Any, v: Any, k_cache: Any, *rest: Any, out_shape: Any = None, **options: Any
) -> int:
    """Count two products of [T, D] with every key of the block and of a full cache, per head."""
    b, t, heads, dim = q
    return int(4 * b * t * (t + k_cache[1]) * heads * dim)
