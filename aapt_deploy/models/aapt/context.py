"""Context parallelism over heads: processes share a batch, each with a part of every frame's tokens (as DeepSpeed Ulysses, arXiv 2309.14509).

All but attention works token by token. Around attention, tokens are exchanged for heads: a process then has all tokens of its heads, and the KV cache
holds no others. What comes before the blocks and after them is done by every process alike, on all tokens.

Gradients are meant to be averaged over the processes. That is right for weights that saw all tokens in every process. For those of which each process
saw its own part alone the sum would be; so, between `whole` and `part`, gradients are R times what they are outside.

Letters: R processes, B batch, n blocks, F tokens per frame, H heads, D head_dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aapt_deploy.errors import UsageError


@dataclass(frozen=True)
class Context:
    """This process among those that share its batch."""

    group: dist.ProcessGroup

    @property
    def size(self) -> int:
        return self.group.size()

    def check(self, heads: int, frame_tokens: int) -> None:
        """Raises UsageError where heads or tokens do not divide."""
        if heads % self.size or frame_tokens % self.size:
            raise UsageError(
                f"{self.size} processes cannot share {heads} heads and {frame_tokens} tokens a frame", "choose a --context that divides both"
            )

    def part(self, x: Tensor, frame_tokens: int, dim: int = 1) -> Tensor:
        """This process's tokens of every frame: n*F -> n*F/R along `dim`. A single entry stands for all tokens and stays."""
        if x.shape[dim] == 1:
            return x
        parts = x.unflatten(dim, (-1, self.size, frame_tokens // self.size)).movedim(dim + 1, 0)  # [R, ..., n, F/R, ...]
        mine: Tensor = _Part.apply(parts, self.group)  # type: ignore[no-untyped-call]
        return torch.flatten(mine, dim, dim + 1)

    def heads(self, x: Tensor) -> Tensor:
        """This process's heads of tokens that every process has: [B, N, H, D] -> [B, N, H/R, D]."""
        mine: Tensor = x.chunk(self.size, dim=2)[self.group.rank()]
        return mine

    def to_heads(self, x: Tensor, frame_tokens: int) -> Tensor:
        """All tokens of this process's heads: [B, n*F/R, H, D] -> [B, n*F, H/R, D]."""
        x = x.unflatten(2, (self.size, -1)).unflatten(1, (-1, frame_tokens // self.size))  # [B, n, F/R, R, H/R, D]
        x = _exchanged(x.permute(3, 0, 1, 2, 4, 5), self.group)  # [R, B, n, F/R, H/R, D], by whose tokens
        return x.permute(1, 2, 0, 3, 4, 5).flatten(1, 3)

    def to_tokens(self, x: Tensor, frame_tokens: int) -> Tensor:
        """All heads of this process's tokens: [B, n*F, H/R, D] -> [B, n*F/R, H, D]."""
        x = x.unflatten(1, (-1, self.size, frame_tokens // self.size))  # [B, n, R, F/R, H/R, D]
        x = _exchanged(x.permute(2, 0, 1, 3, 4, 5), self.group)  # [R, B, n, F/R, H/R, D], by whose heads
        return x.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)

    def whole(self, x: Tensor, frame_tokens: int) -> Tensor:
        """All tokens: [B, n*F/R, dim] -> [B, n*F, dim]."""
        parts: Tensor = _Gather.apply(x, self.group)  # type: ignore[no-untyped-call]  # [R, B, n*F/R, dim]
        return torch.flatten(parts.unflatten(2, (-1, frame_tokens // self.size)).permute(1, 2, 0, 3, 4), 1, 3)


def _exchanged(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out: Tensor = _Exchange.apply(x, group)  # type: ignore[no-untyped-call]
    return out


class _Exchange(torch.autograd.Function):
    """x [R, ...]: part r goes to process r, and what process r sent comes in its place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grad, ctx.group), None


class _Part(torch.autograd.Function):
    """This process's part of what all have: [R, ...] -> [...]. Backward, the parts of all come together again."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return parts[group.rank()].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.group) / ctx.group.size(), None


class _Gather(torch.autograd.Function):
    """The parts of all: [...] -> [R, ...]. All go on alike and get the same gradient, of which each takes its part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.group.rank()] * ctx.group.size(), None


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x, group=group)
    return torch.stack(parts)
