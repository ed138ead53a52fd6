"""Which part of a wrong aapt_attend is wrong: its error by group, and the mistake that explains it.

Two looks at one launch, both against the kernel's own arithmetic (attention_checks.Case.model):

    groups       the error of rows by warpgroup, warp and half of a fragment, of channels by
                 eights, of heads: an error that sits in one group names a register or a tile
    mistakes     the same arithmetic with one thing done wrong, for each thing that a layout or a
                 descriptor can have wrong; the mistake whose output is the kernel's is the answer
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aapt_deploy.ops.block_causal_attention import softmax_scale
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import TILE_KEYS, pos
from tests.support.attention_checks import Case, rmse

EXPLAINS = 0.02  # a mistake explains an output that it comes as close to, relative RMSE


def diagnose(case: Case, out: Tensor) -> dict[str, Any]:
    """What is wrong with `out` [T, H, D], in words that can be printed."""
    found, model = out[case.rows].double(), case.model.double()
    errors = {name: distance(case, found, change) for name, change in MISTAKES.items()}
    nearest = min(errors, key=lambda name: errors[name])
    return {
        "T": case.tokens, "cached": case.cached, "D": case.dim,
        "not_finite": int((~out.isfinite()).sum()), "from_model": rmse(found, model),
        "by_group": by_group(case, found, model),
        "if": {name: round(error, 4) for name, error in errors.items()},
        "explained_by": nearest if errors[nearest] < EXPLAINS else "none of the known mistakes",
    }  # fmt: skip


def by_group(case: Case, found: Tensor, model: Tensor) -> dict[str, dict[str, float]]:
    """Relative error of each group of rows, channels and heads."""
    rows, (_, heads, dim) = case.rows, found.shape
    channel = torch.arange(dim, device=found.device)
    row_groups = {
        "rows of warpgroup": rows // 64 % 2,
        "rows of warp": rows // 16 % 4,
        "rows of half a fragment": rows // 8 % 2,
        "rows of thread block": rows // 128,
    }
    errors: dict[str, dict[str, float]] = {}
    for name, group in row_groups.items():
        of_group = {int(g): group == g for g in group.unique()[:8]}
        errors[name] = {str(g): rmse(found[at], model[at]) for g, at in of_group.items()}
    sixteens = {first: (channel // 16 == first // 16) for first in range(0, dim, 16)}
    pairs = {first: (found[..., at], model[..., at]) for first, at in sixteens.items()}
    errors["channels from"] = {str(first): rmse(*pair) for first, pair in pairs.items()}
    errors["head"] = {str(h): rmse(found[:, h], model[:, h]) for h in range(heads)}
    return {name: {g: round(e, 4) for g, e in group.items()} for name, group in errors.items()}


def distance(case: Case, found: Tensor, change: Callable[[Case, "Operands"], "Operands"]) -> float:
    """Relative RMSE of `found` from attention with one thing done wrong; infinite for NaN."""
    error = rmse(found, attention(case, change(case, Operands(case))))
    return error if error == error else float("inf")


class Operands:
    """What the products of `case` are made of, in float64: [H, n, D], the cache first."""

    def __init__(self, case: Case) -> None:
        q, k, v = (x.double().transpose(0, 1) for x in case.codes)
        self.q, self.k, self.v = q[:, case.rows], k, v
        self.block_first = case.cached
        by_head = case.scales.q * case.scales.k * softmax_scale(case.dim)
        self.factor = by_head.double()[:, None, None]
        self.scale = case.scales.v.double()[:, None]
        self.visible = torch.ones(k.shape[1], dtype=torch.bool, device=k.device)

    def tiled(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """`x` with `change` done to every tile [H, 64, D], padded with zeros where it is ragged."""
        parts = []
        for segment in (x[:, : self.block_first], x[:, self.block_first :]):
            for tile in segment.split(TILE_KEYS, 1):
                padded = torch.nn.functional.pad(tile, (0, 0, 0, TILE_KEYS - tile.shape[1]))
                parts.append(change(padded)[:, : tile.shape[1]])
        return torch.cat(parts, 1)


def attention(case: Case, o: Operands) -> Tensor:
    """[R, H, D]. Rows of P are not rounded: mistakes are larger than that by far."""
    scores = (o.q @ o.k.transpose(1, 2)) * o.factor
    p = scores.masked_fill(~o.visible, -torch.inf).softmax(-1)
    return ((p @ o.v) * o.scale).transpose(0, 1)


# Mistakes, each a change of the operands. An index of 64 keys says which is read in whose place.


def keys_in_order_of_columns(case: Case, o: Operands) -> Operands:
    columns = torch.arange(TILE_KEYS)
    place = torch.tensor([int(c) & 32 | int(pos(int(c) & 31)) for c in columns], device=o.v.device)
    o.v = o.tiled(o.v, lambda tile: tile[:, place])
    return o


def unswizzled(span: int, rows: int, pieces: int) -> Callable[[Tensor], Tensor]:
    """A tile [H, rows, pieces * 16] read as if it lay straight. `span`: bytes of a row."""

    def change(tile: Tensor) -> Tensor:
        offset = torch.arange(rows * pieces, device=tile.device) * 16
        source = (offset ^ ((offset >> 7) & (span // 16 - 1)) << 4) // 16
        return tile.reshape(len(tile), rows * pieces, 16)[:, source].reshape(tile.shape)

    return change


def k_unswizzled(case: Case, o: Operands) -> Operands:
    o.k = o.tiled(o.k, unswizzled(case.dim, TILE_KEYS, case.dim // 16))
    return o


def v_unswizzled(case: Case, o: Operands) -> Operands:
    straight = unswizzled(TILE_KEYS, case.dim, TILE_KEYS // 16)
    key = lambda c: c & 48 | (c & 12) >> 1 | (c & 2) << 2 | c & 1
    columns = torch.tensor([key(column) for column in range(TILE_KEYS)])
    back = torch.empty_like(columns)
    back[columns] = torch.arange(TILE_KEYS)
    columns, back = columns.to(o.v.device), back.to(o.v.device)

    def change(tile: Tensor) -> Tensor:
        by_channel = tile[:, columns].transpose(1, 2).contiguous()  # [H, D, 64 columns]
        return straight(by_channel).transpose(1, 2)[:, back]

    o.v = o.tiled(o.v, change)
    return o


def halves_of_fragments_exchanged(case: Case, o: Operands) -> Operands:
    other = {int(row): at for at, row in enumerate(case.rows)}
    at = [other.get(int(row) ^ 8, i) for i, row in enumerate(case.rows)]
    o.q = o.q[:, torch.tensor(at, device=o.q.device)]
    return o


def cache_unseen(case: Case, o: Operands) -> Operands:
    o.visible[: case.cached] = False
    return o


def block_unseen(case: Case, o: Operands) -> Operands:
    o.visible[case.cached :] = False
    return o


def unscaled(case: Case, o: Operands) -> Operands:
    o.factor = o.factor / softmax_scale(case.dim)
    return o


MISTAKES: dict[str, Callable[[Case, Operands], Operands]] = {
    "V is read in the order of keys, not of P's columns": keys_in_order_of_columns,
    "K is not swizzled": k_unswizzled,
    "V is not swizzled": v_unswizzled,
    "rows g and g + 8 of Q are exchanged": halves_of_fragments_exchanged,
    "only the block is seen": cache_unseen,
    "only the cache is seen": block_unseen,
    "scores lack 1 / sqrt(D)": unscaled,
    "nothing: within rounding of the model": lambda case, o: o,
}
