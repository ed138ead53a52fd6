"""Compare two records of `aapt profile --json`, stage by stage and layer by layer.

`aapt diff A.json B.json` compares what was recorded and measures nothing. What else differs,
machine and versions first, is shown above the figures: a difference in milliseconds means nothing
without it. Two records of one machine, minutes apart, show how much is noise.
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
    """One stage or layer in both records; None if a record lacks it."""

    name: str
    before_ms: float | None
    after_ms: float | None

    @property
    def delta_ms(self) -> float:
        return round((self.after_ms or 0.0) - (self.before_ms or 0.0), 4)

    @property
    def ratio(self) -> float | None:
        """Return after / before; None if one is missing or zero."""
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
    """Compare two records. Raises InputError if a file is not a record."""
    one, two = _read(a), _read(b)
    flat = [_header(record) for record in (one, two)]
    names = sorted(flat[0].keys() | flat[1].keys())
    differs = {
        name: (str(flat[0].get(name, "-")), str(flat[1].get(name, "-")))
        for name in names
        if flat[0].get(name) != flat[1].get(name)
    }
    stages = {kind: _changes(*(_stages(x, kind) for x in (one, two))) for kind in PERCENTILES}
    layers = {}
    for graph in sorted(one["layers"].keys() | two["layers"].keys()):
        changes = _changes(*(_layers(record, graph) for record in (one, two)))
        layers[graph] = sorted(changes, key=lambda change: -abs(change.delta_ms))
    return Difference(differs, stages, layers)


def _header(record: dict[str, Any]) -> dict[str, Any]:
    machine = {f"machine.{name}": value for name, value in record["machine"].items()}
    return {name: record[name] for name in HEADER} | machine


def _stages(record: dict[str, Any], kind: str) -> dict[str, float]:
    return {name: times[kind] for name, times in record["steady"].items()}


def _layers(record: dict[str, Any], graph: str) -> dict[str, float]:
    return {row["name"]: row["ms"] for row in record["layers"].get(graph, [])}


def _changes(one: dict[str, float], two: dict[str, float]) -> list[Change]:
    """List the changes in the order of A, then what only B has."""
    names = (*one, *(name for name in two if name not in one))
    return [Change(name, one.get(name), two.get(name)) for name in names]


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
    record.setdefault("layers", {})  # older records have none
    return dict(record)


def _wrong(record: Any) -> str:
    """Return what is not as `Latency.json` writes it; "" if all is."""
    if not isinstance(record, dict):
        return "it is no object"
    if missing := [name for name in (*HEADER, "machine", "steady") if name not in record]:
        return f"it lacks {', '.join(missing)}"
    steady, layers = record["steady"], record.get("layers", {})
    if not all(isinstance(part, dict) for part in (record["machine"], steady, layers)):
        return "machine, steady or layers is no object"
    for name, times in steady.items():
        if not (isinstance(times, dict) and all(_is_time(times.get(kind)) for kind in PERCENTILES)):
            return f"stage {name} has no times"
    for graph, rows in layers.items():
        if not isinstance(rows, list) or not all(map(_is_layer, rows)):
            return f"the layers of {graph} have no names or times"
    return ""


def _is_layer(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("name"), str) and _is_time(row.get("ms"))


def _is_time(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value <= LONGEST_MS  # false for a NaN
