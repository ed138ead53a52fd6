"""Share a batch among processes, each with a part of every frame's tokens.

This is context parallelism over heads, as in DeepSpeed Ulysses (arXiv 2309.14509). All but
attention works token by token. For attention, tokens are exchanged for heads. A process then has
all tokens of its heads, and a KV cache of those heads only. Every process computes what comes
before and after the blocks on all tokens.

Gradients are averaged over the processes, which is right for weights that saw all tokens in every
process. Weights that saw one part in each process need the sum. So, between `part` and `whole`,
gradients are R times those outside.

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
    """The group of processes that share a batch with this one."""

    group: dist.ProcessGroup

    @property
    def size(self) -> int:
        return self.group.size()

    def check(self, heads: int, frame_tokens: int) -> None:
        """Raise UsageError if heads or tokens do not divide among the processes."""
        if heads % self.size or frame_tokens % self.size:
            share = f"{heads} heads and {frame_tokens} tokens a frame"
            hint = "choose a --context that divides both"
            raise UsageError(f"{self.size} processes cannot share {share}", hint)

    def part(self, x: Tensor, frame_tokens: int, dim: int = 1) -> Tensor:
        """Return this process's tokens of every frame: n*F -> n*F/R along `dim`.

        A single entry, which is for all tokens, is returned as it is.
        """
        if x.shape[dim] == 1:
            return x
        parts = x.unflatten(dim, (-1, self.size, frame_tokens // self.size))
        parts = parts.movedim(dim + 1, 0)  # [R, ..., n, F/R, ...]
        mine: Tensor = _Part.apply(parts, self.group)  # type: ignore[no-untyped-call]
        return torch.flatten(mine, dim, dim + 1)

    def heads(self, x: Tensor) -> Tensor:
        """Return this process's heads of all tokens: [B, N, H, D] -> [B, N, H/R, D]."""
        mine: Tensor = x.chunk(self.size, dim=2)[self.group.rank()]
        return mine

    def to_heads(self, x: Tensor, frame_tokens: int) -> Tensor:
        """Exchange for all tokens of this process's heads: [B, n*F/R, H, D] -> [B, n*F, H/R, D]."""
        x = x.unflatten(2, (self.size, -1)).unflatten(1, (-1, frame_tokens // self.size))
        x = x.permute(3, 0, 1, 2, 4, 5)  # [R, B, n, F/R, H/R, D], by the owner of the heads
        x = _exchanged(x, self.group)  # by the owner of the tokens
        return x.permute(1, 2, 0, 3, 4, 5).flatten(1, 3)

    def to_tokens(self, x: Tensor, frame_tokens: int) -> Tensor:
        """Exchange for all heads of this process's tokens: [B, n*F, H/R, D] -> [B, n*F/R, H, D]."""
        x = x.unflatten(1, (-1, self.size, frame_tokens // self.size))
        x = x.permute(2, 0, 1, 3, 4, 5)  # [R, B, n, F/R, H/R, D], by the owner of the tokens
        x = _exchanged(x, self.group)  # by the owner of the heads
        return x.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)

    def whole(self, x: Tensor, frame_tokens: int) -> Tensor:
        """Gather all tokens: [B, n*F/R, dim] -> [B, n*F, dim]."""
        parts: Tensor = _Gather.apply(x, self.group)  # type: ignore[no-untyped-call]
        parts = parts.unflatten(2, (-1, frame_tokens // self.size))  # [R, B, n, F/R, dim]
        return torch.flatten(parts.permute(1, 2, 0, 3, 4), 1, 3)


def _exchanged(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out: Tensor = _Exchange.apply(x, group)  # type: ignore[no-untyped-call]
    return out


class _Exchange(torch.autograd.Function):
    """Send part r of x [R, ...] to process r, and put what process r sent in its place."""

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
    """Take this process's part, [R, ...] -> [...]. Backward gathers the parts of all."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return parts[group.rank()].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.group) / ctx.group.size(), None


class _Gather(torch.autograd.Function):
    """Gather the parts of all, [...] -> [R, ...]. Backward takes one part of the gradient."""

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
