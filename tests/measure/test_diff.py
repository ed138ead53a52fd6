"""Compare records of `aapt profile --json`: real ones, and made-up ones with layers."""

import json
from pathlib import Path
from typing import Any

import pytest

from aapt_deploy.backends.table import LONGEST_MS
from aapt_deploy.errors import InputError
from aapt_deploy.measure.diff import Change, difference


def record(**changes: Any) -> dict[str, Any]:
    times = {"count": 10, "p50_ms": 20.0, "p95_ms": 22.0, "p99_ms": 23.0, "max_ms": 24.0}
    base = {
        "profile": "p",
        "backend": "tensorrt",
        "precision": "fp8_e4m3",
        "blocks": 10,
        "passes_per_block": 1,
        "machine": {"gpu": "H100"},
    }
    return base | {"steady": {"step": times, "decoder": times}, "layers": {}} | changes


def written(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def test_two_real_records_are_compared_stage_by_stage(
    bundle: Path, aapt: Any, tmp_path: Path
) -> None:
    paths = []
    for precision in ("fp32", "int8"):
        ran = aapt("profile", bundle, "--precision", precision, "--blocks", 10, "--json")
        paths.append(tmp_path / f"{precision}.json")
        paths[-1].write_text(ran.out)
    ran = aapt("diff", *paths, "--json")
    assert ran.code == 0, ran.err
    found, one, two = json.loads(ran.out), *(json.loads(path.read_text()) for path in paths)
    assert found["differs"] == {"precision": ["fp32", "int8"]}
    assert found["layers"] == {}
    for kind in ("p50_ms", "p95_ms"):
        assert [change["name"] for change in found["stages"][kind]] == list(one["steady"])
        for change in found["stages"][kind]:
            assert (
                change["before_ms"] == one["steady"][change["name"]][kind]
                and change["after_ms"] == two["steady"][change["name"]][kind]
            )
    assert "precision" in ran.err and "stages, p50" in ran.err and ran.out.count("\n") == 1


def test_layers_are_sorted_by_what_changed_and_new_and_gone_ones_are_told(
    tmp_path: Path, aapt: Any
) -> None:
    layers = lambda **ms: {
        "generator": [
            {"name": name, "ms": value, "kind": "", "tactic": "", "share": 0.1}
            for name, value in ms.items()
        ]
    }
    a = written(tmp_path, "a.json", record(layers=layers(attention=5.0, reformat=1.0, gemm=3.0)))
    b = written(
        tmp_path,
        "b.json",
        record(layers=layers(gemm=3.5, attention=2.0, fused=0.2), machine={"gpu": "H200"}),
    )
    found = difference(a, b)
    assert found.layers["generator"] == [
        Change("attention", 5.0, 2.0), Change("reformat", 1.0, None), Change("gemm", 3.0, 3.5),
        Change("fused", None, 0.2),
    ]  # fmt: skip
    assert [change.delta_ms for change in found.layers["generator"]] == [-3.0, -1.0, 0.5, 0.2]
    assert [change.ratio for change in found.layers["generator"]] == [
        0.4,
        None,
        pytest.approx(3.5 / 3, abs=1e-4),
        None,
    ]
    assert found.differs == {"machine.gpu": ("H100", "H200")}
    ran = aapt("diff", a, b)
    assert (
        ran.code == 0 and "layers of generator" in ran.err and "-3.000" in ran.err and not ran.out
    )


def test_older_records_without_layers_are_compared(tmp_path: Path) -> None:
    older = record()
    del older["layers"]
    newer = record(layers={"decoder": [{"name": "conv", "ms": 1.5}]})
    paths = [written(tmp_path, name, held) for name, held in (("a", older), ("b", newer))]
    assert difference(paths[0], paths[0]).layers == {}
    assert difference(*paths).layers == {"decoder": [Change("conv", None, 1.5)]}
    assert difference(*reversed(paths)).layers == {"decoder": [Change("conv", 1.5, None)]}
    assert difference(*paths).stages == {
        "p50_ms": [Change("step", 20.0, 20.0), Change("decoder", 20.0, 20.0)],
        "p95_ms": [Change("step", 22.0, 22.0), Change("decoder", 22.0, 22.0)],
    }


def test_a_header_that_differs_is_shown_for_both_records(tmp_path: Path) -> None:
    other = {"profile": "q", "backend": "torch", "precision": "bf16", "blocks": 9}
    a = written(tmp_path, "a", record(machine={"gpu": "H100", "driver": 580}))
    b = written(tmp_path, "b", record(**other, passes_per_block=4, machine={"gpu": "H100"}))
    assert difference(a, b).differs == {
        "backend": ("tensorrt", "torch"), "blocks": ("10", "9"), "machine.driver": ("580", "-"),
        "passes_per_block": ("1", "4"), "precision": ("fp8_e4m3", "bf16"), "profile": ("p", "q"),
    }  # fmt: skip


def test_a_change_is_rounded_and_has_no_ratio_without_both_times() -> None:
    change = Change("step", 3.0, 1.0)
    assert (change.delta_ms, change.ratio) == (-2.0, 0.3333)
    assert Change("step", 1.0, 1.00006).delta_ms == 0.0001
    assert (Change("new", None, 2.0).delta_ms, Change("new", None, 2.0).ratio) == (2.0, None)
    assert (Change("gone", 2.0, None).delta_ms, Change("gone", 2.0, None).ratio) == (-2.0, None)
    assert Change("free", 0.0, 1.0).ratio is None and Change("free", 2.0, 0.0).ratio == 0


@pytest.mark.parametrize("value", [0, LONGEST_MS, 2.5])
def test_times_from_nothing_to_the_longest_are_read(tmp_path: Path, value: float) -> None:
    times = {"p50_ms": value, "p95_ms": value}
    path = written(tmp_path, "a", record(steady={"step": times}))
    assert difference(path, path).stages["p95_ms"] == [Change("step", value, value)]


@pytest.mark.parametrize("value", [-0.001, 2 * LONGEST_MS, True, None, "1"])
def test_what_is_no_time_is_refused(tmp_path: Path, value: object) -> None:
    for name in ("p50_ms", "p95_ms"):
        times = {"p50_ms": 1.0, "p95_ms": 1.0} | {name: value}
        path = written(tmp_path, "a", record(steady={"step": times}))
        with pytest.raises(InputError, match="stage step has no times"):
            difference(path, path)
    layers = {"generator": [{"name": "gemm", "ms": 1.0}, {"name": "norm", "ms": value}]}
    path = written(tmp_path, "a", record(layers=layers))
    with pytest.raises(InputError, match="layers of generator have no names or times"):
        difference(path, path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "no object"), ("{", "not JSON"), ("{}", "lacks profile"),
        (json.dumps(record(steady={"step": {"p50_ms": "fast"}})), "stage step"),
        (json.dumps(record(steady={"step": {"p50_ms": 1, "p95_ms": float("nan")}})), "stage step"),
        (json.dumps(record(machine=3)), "machine, steady or layers is no object"),
        (json.dumps(record(steady=[])), "machine, steady or layers is no object"),
        (json.dumps(record(layers=[])), "machine, steady or layers is no object"),
        (json.dumps(record(steady={"step": []})), "stage step has no times"),
        (json.dumps(record(layers={"generator": {}})), "layers of generator"),
        (json.dumps(record(layers={"generator": [[]]})), "layers of generator"),
        (json.dumps({"profile": "p", "steady": {}, "blocks": 1}),
         "lacks backend, precision, passes_per_block, machine$"),
        (json.dumps(record(layers={"generator": [{"name": 3, "ms": 1}]})), "layers of generator"),
        ("[" * 100_000, "not JSON"),
        (json.dumps(record(steady={"step": {"p50_ms": 10**400, "p95_ms": 1}})), "stage step"),
        (json.dumps(record(layers={"generator": [{"name": "gemm", "ms": 10**400}]})),
         "layers of generator"),
    ],
)  # fmt: skip
def test_what_is_no_record_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(content)
    with pytest.raises(InputError, match=reason) as caught:
        difference(written(tmp_path, "good.json", record()), bad)
    assert "--json" in caught.value.hint and "bad.json" in str(caught.value)


def test_a_missing_file_and_a_missing_bundle_are_told(tmp_path: Path, aapt: Any) -> None:
    ran = aapt("diff", tmp_path / "none.json", tmp_path / "none.json")
    assert ran.code == 4 and "none.json cannot be read" in ran.error
    ran = aapt("profile")
    assert ran.code == 2 and "BUNDLE" in ran.error


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ("quality B --seconds", "aapt quality"),
        ("profile B --blocks", "aapt profile"),
        ("train run --recipe", "aapt train run"),
    ],
)
def test_an_option_without_its_value_leads_to_its_own_commands_help(
    aapt: Any, words: str, path: str
) -> None:
    ran = aapt(*words.split())
    assert (
        ran.code == 2
        and "requires" in ran.error
        and ran.err.splitlines()[-1] == f"hint: see: {path} --help"
    )
