"""What aapt_attend should take on a Hopper GPU, before one has run it: waves, visits, clocks.

A launch has one thread block for each 128 query rows of a head, and a multiprocessor runs one at
a time. So a launch takes as many rounds ("waves") as the fullest multiprocessor has blocks, and
each round takes its visits of 64 keys, one behind the other.

Clocks of a visit were simulated from the machine code of the loop (one scheduler's warps, issue
slots, tensor pipe, exponentials), by the latency of a tile's bulk copy. They depend on the ring:
K runs one visit ahead of V, so two tiles of V hide one visit of latency, and five hide four.
`python bench/attention_model.py` prints the table of docs/log.md.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
from headline_model import EFFICIENCY, GPU

from aapt_deploy.ops.block_causal_attention.hopper_fp8 import tiles
from aapt_deploy.ops.block_causal_attention.kernels import QUERY_ROWS, VARIANTS, Variant

SMS, CLOCK_HZ = 132, 1.755e9  # of an H100 or H200 in SXM form, at the boost clock
L2_LATENCY, DRAM_LATENCY = 800, 1200  # clocks of the bulk copy of a tile
VISIT_CLOCKS = {"shallow": {800: 842, 1000: 962, 1200: 1070, 1500: 1193}, "deep": 842}
PESSIMISTIC = 1033 / 842  # the same loop with all latencies at their upper ends
PROLOGUE_CLOCKS = {True: 2_000, False: 10_000}  # loads first; 16 loads, each behind its divisions
HEADS, DIM = 24, 128

# What headline_model.py counts on, and its lead over the best bf16 kernel by the same table.
GOAL_TFLOPS = round(GPU.flops["fp8_e4m3"] * EFFICIENCY["attention fp8"] / 1e12)
BF16_TFLOPS = GPU.flops["bf16"] * EFFICIENCY["attention bf16"] / 1e12
GOAL_RATIO = round(GOAL_TFLOPS / BF16_TFLOPS, 2)


class Shape(NamedTuple):
    """One launch over a cache that is full."""

    tokens: int
    cached: int
    heads: int

    @property
    def flop(self) -> int:
        return 4 * self.tokens * (self.tokens + self.cached) * self.heads * DIM


SHAPES = {
    "736x416, 30 frames": Shape(1196, 37_332 - 1196, HEADS),
    "1280x720, 15 frames": Shape(3600, 57_856 - 3600, HEADS),
    "Wan, 1 of 21 frames": Shape(1560, 20 * 1560, 12),
    "Wan, 3 of 21 frames": Shape(4680, 18 * 1560, 12),
}


class Waves(NamedTuple):
    """How a launch fills the GPU."""

    blocks: int
    rounds: int
    filled: float  # of the multiprocessors' time, while the launch runs
    useful: float  # of that, rows that are not padding


def waves(shape: Shape) -> Waves:
    rows = -(-shape.tokens // QUERY_ROWS)
    blocks = rows * shape.heads
    rounds = -(-blocks // SMS)
    return Waves(blocks, rounds, blocks / (rounds * SMS), shape.tokens / (rows * QUERY_ROWS))


def visit_clocks(variant: Variant) -> int:
    """Clocks of 64 keys for one thread block; a tile comes from L2 where it was prefetched."""
    if variant.deep:
        return VISIT_CLOCKS["deep"]
    return VISIT_CLOCKS["shallow"][L2_LATENCY if variant.prefetch else DRAM_LATENCY]


def seconds(shape: Shape, variant: Variant, pessimistic: bool = False) -> float:
    visits = tiles(shape.tokens) + tiles(shape.cached)
    clocks = visits * visit_clocks(variant) * (PESSIMISTIC if pessimistic else 1.0)
    return waves(shape).rounds * (clocks + PROLOGUE_CLOCKS[variant.loads_first]) / CLOCK_HZ


def tflops(shape: Shape, variant: Variant, pessimistic: bool = False) -> float:
    return shape.flop / seconds(shape, variant, pessimistic) / 1e12


def stream_k_tflops(shape: Shape, variant: Variant) -> float:
    """The same clocks with equal shares for all multiprocessors and 2 % for their partial sums."""
    of_waves = waves(shape)
    return 0.98 * tflops(shape, variant) / of_waves.filled


def goals(record: dict[str, Any]) -> dict[str, bool]:
    """What must hold, of the stages that gave a result."""
    found: dict[str, bool] = {}
    for stage in ("smoke", "products", "correct"):
        parts = [p for p in record.get(stage, {}).values() if isinstance(p, dict)]
        if parts:
            wrong = any(("error" in p and "ok" not in p) or p.get("ok") is False for p in parts)
            found[f"{stage}: nothing is wrong"] = not wrong
    for title in list(SHAPES)[:2]:
        of_shape = {n: p for n, p in record.get("speed", {}).items() if n.startswith(title)}
        rates = {n: p["tflops"] for n, p in of_shape.items() if "tflops" in p}
        bf16 = [rate for name, rate in rates.items() if "bf16" in name]
        own = [rate for name, rate in rates.items() if name.rpartition(": ")[2] in VARIANTS]
        if own:
            found[f"{title}: at least {GOAL_TFLOPS} TFLOP/s"] = max(own) >= GOAL_TFLOPS
        if own and bf16:
            name = f"{title}: {GOAL_RATIO} times the fastest bf16"
            found[name] = max(own) >= GOAL_RATIO * max(bf16)
    return found


def table() -> str:
    lines = [
        "| shape | blocks | rounds | filled | useful rows | stream-K |",
        "|---|---|---|---|---|---|",
    ]
    for title, shape in SHAPES.items():
        w, bound = waves(shape), stream_k_tflops(shape, VARIANTS["K6V5"])
        cells = [w.blocks, w.rounds, f"{w.filled:.2f}", f"{w.useful:.2f}", f"{bound:.0f}"]
        lines.append(f"| {title} | " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| variant | " + " | ".join(SHAPES) + " |", "|---|" + "---|" * len(SHAPES)]
    for name, variant in VARIANTS.items():
        pairs = [(tflops(s, variant, True), tflops(s, variant)) for s in SHAPES.values()]
        lines.append(f"| {name} | " + " | ".join(f"{a:.0f} to {b:.0f}" for a, b in pairs) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
