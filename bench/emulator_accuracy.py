"""Measure the accuracy of the FP8 attention kernel's arithmetic, in the emulator.

The emulator (aapt_deploy/ops/block_causal_attention/emulator.py) runs the kernel's arithmetic on
the bytes of its own cache layout, over the data of tests/support/attention_data.py, and with one
thing changed at a time. Prints the two tables of plugins/block_causal_attention/README.md. No
speed: this is NumPy. Takes some minutes on one core, and needs no package that the tests do not.
"""

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from aapt_deploy.measure.machine import machine
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.ops.block_causal_attention.emulator import EXACT, HOPPER_BITS, KERNEL, Arithmetic
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import TILE_KEYS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the data is the tests', so that both speak of the same numbers
from tests.support.attention_data import LONG, SEED, SHORT, Case, case

KINDS = (("plain", 0), ("sharp", 0), ("outlier", 0), ("sink", 6), ("sink", 9), ("sink", 12))
HEADS = 2
ARITHMETICS = {
    "exact sums": EXACT,
    "the kernel": KERNEL,
    "four tiles per accumulator": Arithmetic(flush_keys=4 * TILE_KEYS),
    "single level": Arithmetic(flush_keys=None),
    "no offset": Arithmetic(p_offset=0),
    "sink first": Arithmetic(sink_last=False),
}
SINK_ORDERS = ("the kernel", "sink first")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def name(kind: str, sink_score: float, head_dim: int) -> str:
    return kind + f" {sink_score}" * (kind == "sink") + f", D = {head_dim}" * (head_dim != 128)


def row(kind: str, sink_score: float, ring: Ring, head_dim: int, seed: int) -> dict[str, Any]:
    """Every error of one set of data, in the table's order."""
    made: Case = case(kind, ring, sink_score, HEADS, head_dim, seed)
    errors = {
        "inputs alone": made.input_error(),
        **{name: made.error(arithmetic) for name, arithmetic in ARITHMETICS.items()},
    }
    alone = {name: made.arithmetic_error(ARITHMETICS[name]) for name in SINK_ORDERS}
    case.cache_clear()  # one set at a time in memory
    return {
        "data": name(kind, sink_score, head_dim), "keys": ring.tokens + ring.block_tokens,
        "head_dim": head_dim, "rows": len(made.q),
        "relative_rmse": {name: round(error, 5) for name, error in errors.items()},
        "relative_rmse_of_the_arithmetic_alone": {
            name: round(error, 5) for name, error in alone.items()
        },
    }  # fmt: skip


def percent(error: float) -> str:
    return f"{100 * error:.2f}" if error < 0.1 else f"{100 * error:.1f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, in percent."""
    lines = []
    for made in rows:
        cells = [
            f"**{percent(error)}**" if name == "the kernel" else percent(error)
            for name, error in made["relative_rmse"].items()
        ]
        lines.append(
            "| " + " | ".join([made["data"], f"{made['keys']:,}".replace(",", " "), *cells]) + " |"
        )
    return "\n".join(lines)


def sink_table(rows: list[dict[str, Any]]) -> str:
    """Markdown, in percent: the arithmetic alone, by the order of visits."""
    return "\n".join(
        "| "
        + " | ".join(
            [
                made["data"],
                *(
                    percent(made["relative_rmse_of_the_arithmetic_alone"][order])
                    for order in SINK_ORDERS
                ),
            ]
        )
        + " |"
        for made in rows
        if made["data"].startswith("sink") and made["keys"] > 30_000
    )


def revision() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=None, help="record to write")
    options = parser.parse_args()
    today = datetime.date.today().isoformat()
    cases = [(*kind, ring, 128) for ring in (SHORT, LONG) for kind in KINDS] + [
        ("plain", 0, ring, 64) for ring in (SHORT, LONG)
    ]
    rows = []
    for kind, sink_score, ring, head_dim in cases:
        rows.append(row(kind, sink_score, ring, head_dim, options.seed))
        say(f"{rows[-1]['data']}, {rows[-1]['keys']} keys: {rows[-1]['relative_rmse']}")
    record = {
        "what": "accuracy of the FP8 attention kernel's arithmetic, emulated in NumPy on a CPU; "
                "no GPU took part",
        "date": today, "git": revision(),
        "machine": machine(), "versions": {"numpy": np.__version__}, "seed": options.seed,
        "heads": HEADS,
        "block_tokens": SHORT.block_tokens, "accumulator_bits": HOPPER_BITS, "rows": rows,
    }  # fmt: skip
    out = options.out or ROOT / "docs" / "measurements" / f"emulator-accuracy-{today}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")
    say(f"record: {out}")
    print(table(rows) + "\n\n" + sink_table(rows))


if __name__ == "__main__":
    main()
