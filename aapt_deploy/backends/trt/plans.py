"""What a plan is built with, and what it reads and writes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How to build one graph."""

    plugin_layers: int  # BlockCausalAttention layers that the network must have
    workspace_bytes: int  # the most that TensorRT may use for scratch memory
    decomposable: bool = False  # attention may run as separate operations: float32 has no kernel
    sms: tuple[int, ...] = ()  # compute capabilities x 10, where the flavour builds for named ones
    portable: bool = False  # the lean runtime can run the plan
    optimization_level: int = 3  # 0 (fast build) to 5 (fast engine)
    timing_cache: bytes = b""  # of an earlier build; another machine's is ignored


@dataclass(frozen=True)
class Tensor:
    """An input or output of a plan."""

    name: str
    is_input: bool
    dtype: str  # TensorRT's own name: "FLOAT", "BF16", "FP8", "INT32", …
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BuiltPlan:
    """A finished plan, still in memory."""

    plan: memoryview
    timing_cache: bytes
    network_layers: int
    tensors: tuple[Tensor, ...]
