"""`aapt diff A.json B.json`: two records of `aapt profile --json`, stage by stage and layer by layer.

It compares what was recorded and measures nothing. Whatever else differs between the two, machine and versions first, is told above the figures,
because a difference in milliseconds means nothing without it. Two records of one machine, minutes apart, tell how much is noise.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aapt_deploy.backends.table import LONGEST_MS
from aapt_deploy.errors import InputError

HEADER = ("profile", "backend", "precision", "blocks", "passes_per_block")
PERCENTILES = ("p50_ms", "p95_ms")


@dataclass(frozen=True)
class Change:
    """One stage or layer in both records; None where a record has no such."""

    name: str
    before_ms: float | None
    after_ms: float | None

    @property
    def delta_ms(self) -> float:
        return round((self.after_ms or 0.0) - (self.before_ms or 0.0), 4)

    @property
    def ratio(self) -> float | None:
        """after / before; None where one is missing or nothing."""
        return (
            round(self.after_ms / self.before_ms, 4)
            if self.before_ms and self.after_ms is not None
            else None
        )


@dataclass(frozen=True)
class Difference:
    """What changed from record A to record B."""

    differs: dict[str, tuple[str, str]]  # what else is not the same, in A and in B
    stages: dict[str, list[Change]]  # percentile -> stages
    layers: dict[str, list[Change]]  # graph -> layers, the largest change first

    def json(self) -> str:
        return json.dumps(asdict(self))


def difference(a: Path, b: Path) -> Difference:
    """Compare two records. Raises InputError for a file that is no record."""
    one, two = _read(a), _read(b)
    flat = [_header(record) for record in (one, two)]
    names = sorted(flat[0].keys() | flat[1].keys())
    differs = {
        name: (str(flat[0].get(name, "-")), str(flat[1].get(name, "-")))
        for name in names
        if flat[0].get(name) != flat[1].get(name)
    }
    stages = {
        kind: _changes(
            *(
                {name: times[kind] for name, times in record["steady"].items()}
                for record in (one, two)
            )
        )
        for kind in PERCENTILES
    }
    layers = {}
    for graph in sorted(one["layers"].keys() | two["layers"].keys()):
        found = [
            {row["name"]: row["ms"] for row in record["layers"].get(graph, [])}
            for record in (one, two)
        ]
        layers[graph] = sorted(_changes(*found), key=lambda change: -abs(change.delta_ms))
    return Difference(differs, stages, layers)


def _header(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in HEADER} | {
        f"machine.{name}": value for name, value in record["machine"].items()
    }


def _changes(one: dict[str, float], two: dict[str, float]) -> list[Change]:
    """In the order of A, what only B has behind."""
    return [
        Change(name, one.get(name), two.get(name))
        for name in (*one, *(name for name in two if name not in one))
    ]


def _read(path: Path) -> dict[str, Any]:
    hint = "make one with: aapt profile BUNDLE --json > RECORD.json"
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"record {path} cannot be read: {error.strerror}", hint) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"record {path} is not JSON: {error}", hint) from None
    if wrong := _wrong(record):
        raise InputError(f"record {path} is not one of aapt profile: {wrong}", hint)
    record.setdefault("layers", {})  # of before there were any
    return dict(record)


def _wrong(record: Any) -> str:
    """What is not as `Latency.json` writes it; "" when all is."""
    if not isinstance(record, dict):
        return "it is no object"
    if missing := [name for name in (*HEADER, "machine", "steady") if name not in record]:
        return f"it lacks {', '.join(missing)}"
    steady, layers = record["steady"], record.get("layers", {})
    if (
        not isinstance(record["machine"], dict)
        or not isinstance(steady, dict)
        or not isinstance(layers, dict)
    ):
        return "machine, steady or layers is no object"
    for name, times in steady.items():
        if not (isinstance(times, dict) and all(_is_time(times.get(kind)) for kind in PERCENTILES)):
            return f"stage {name} has no times"
    for graph, rows in layers.items():
        if not isinstance(rows, list) or not all(
            isinstance(row, dict) and isinstance(row.get("name"), str) and _is_time(row.get("ms"))
            for row in rows
        ):
            return f"the layers of {graph} have no names or times"
    return ""


def _is_time(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LONGEST_MS
    )  # a nan is not
