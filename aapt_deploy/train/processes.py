"""Run training in this process, or in many.

Under `torchrun`, processes form a mesh of `data` x `context`. Weights, gradients and optimiser are
sharded over all of them (FSDP2). Each row of the mesh takes its share of an update's batches. The
processes of a row share one batch: each has a part of every frame's tokens and, in attention, a
part of the heads (models/aapt/context.py). Batches, losses and files equal those of one process, so
a run may resume with another number of them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from aapt_deploy.errors import MachineError, UsageError
from aapt_deploy.models.aapt.backbone import Backbone
from aapt_deploy.models.aapt.context import Context

PATIENCE = timedelta(hours=24)  # the others wait while one encodes the clips or trains the VAE

Module = TypeVar("Module", bound=Backbone)


@dataclass(frozen=True)
class Setup:
    """One process by default, in float32, keeping every activation."""

    device: str = "cpu"
    bf16: bool = False  # mixed precision: weights and optimiser stay float32
    checkpointing: bool = False  # recompute each visual block in the backward pass
    mesh: DeviceMesh | None = None  # "data" x "context"

    @contextmanager
    def autocast(self) -> Iterator[None]:
        with torch.autocast(
            torch.device(self.device).type, dtype=torch.bfloat16, enabled=self.bf16
        ):
            yield

    @property
    def writes(self) -> bool:
        """Whether this process writes the files and talks."""
        return self.mesh is None or dist.get_rank() == 0

    @property
    def rows(self) -> tuple[int, int]:
        """Which of how many rows of the mesh this process is in."""
        return (
            (0, 1) if self.mesh is None else (self.mesh.get_local_rank("data"), self.mesh.size(0))
        )

    def wait(self) -> None:
        """Until every process is here."""
        if self.mesh is not None:
            dist.barrier()

    def mean(self, figures: dict[str, float]) -> dict[str, float]:
        """Each figure's mean over the processes."""
        if self.mesh is None:
            return figures
        values = torch.tensor(list(figures.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return dict(zip(figures, (values / dist.get_world_size()).tolist(), strict=True))

    def agreed(self, wanted: bool) -> bool:
        """What the first process wants."""
        if self.mesh is None:
            return wanted
        answer = torch.tensor([wanted], dtype=torch.int32, device=self.device)
        dist.broadcast(answer, 0)
        return bool(answer.item())

    def shared(self, module: Module) -> Module:
        """`module`, sharded over all processes in place. Alone, as it is."""
        if self.mesh is None:
            return module
        if self.mesh.size(1) > 1:
            module.context = Context(self.mesh.get_group("context"))
        everyone = self.mesh._flatten() if self.mesh.ndim > 1 else self.mesh
        for layer in (*module.text, *module.visual):
            fully_shard(layer, mesh=everyone)
        fully_shard(module, mesh=everyone)
        for method in ("step", "prompt"):
            if hasattr(module, method):
                register_fsdp_forward_method(module, method)
        return module


ALONE = Setup()


def has_bf16(device: str) -> bool:
    """Return whether hardware multiplies in bf16.

    A CPU that emulates it takes 100 times longer than in float32 (docs/log.md).
    """
    return device != "cpu" or any(
        torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")
    )


def joined(device: str, bf16: bool, checkpointing: bool, context: int) -> Setup:
    """Return the setup of this process among those that `torchrun` started, if it did.

    On a GPU each process takes the one of its local rank.

    Raises UsageError if `context` does not divide the processes, or for an unknown device.
    Raises MachineError if the device is missing.
    """
    if device not in ("cpu", "cuda"):
        raise UsageError(
            f"--device {device!r} is neither cpu nor cuda", "for example --device cuda"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            "there is no GPU that PyTorch can use",
            "train with --device cpu, or look at what `aapt doctor` says",
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if context < 1 or world % context:
        raise UsageError(
            f"--context {context} does not divide {world} processes",
            "start a multiple of it with torchrun --nproc-per-node",
        )
    if world == 1:
        return Setup(device, bf16, checkpointing)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    return Setup(
        device,
        bf16,
        checkpointing,
        init_device_mesh(device, (world // context, context), mesh_dim_names=("data", "context")),
    )


def unsharded(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process must ask."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full


def own(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fill(target: Tensor, full: Tensor) -> None:
    """Copy all of a tensor into one that may be sharded."""
    if isinstance(target, DTensor):
        full = distribute_tensor(
            full.to(target.device), target.device_mesh, target.placements
        ).to_local()
    own(target).copy_(full)


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in module.parameters())
