"""Receipts of the doctor: valid for exactly one machine, and they decide a build's form."""

import dataclasses
import json
from pathlib import Path

import pytest

from aapt_deploy.backends.trt.cuda import Gpu
from aapt_deploy.backends.trt.doctor import receipts
from aapt_deploy.backends.trt.doctor.receipts import (
    AOT,
    NATIVE,
    NATIVE_FP8,
    PYTHON,
    Choice,
    Proof,
)

HERE = Gpu("11.4.0.106", 90, "13.0", "580.65.06", "NVIDIA H100", "a" * 64)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def proved(*names: str) -> dict[str, Proof]:
    return {name: Proof(name, name in names, "seen", 1.0) for name in receipts.PROBES}


def test_a_receipt_comes_back() -> None:
    answers = [
        Proof(receipts.NATIVE_BUILDS, True, "close", 2.5),
        Proof(receipts.AOT_OP, False, "crashed", 0.1),
    ]
    receipts.save(HERE, answers)
    assert receipts.load(HERE) == {answer.name: answer for answer in answers}


@pytest.mark.parametrize(
    "change",
    [
        {"sm": 89},
        {"tensorrt": "11.4.0.107"},
        {"cuda": "12.9"},
        {"driver": "580.65.07"},
        {"kernels": "b" * 64},
        {"gpu": "NVIDIA H200"},
    ],
)
def test_a_receipt_of_another_machine_proves_nothing(change: dict[str, object]) -> None:
    receipts.save(HERE, [Proof(receipts.NATIVE_BUILDS, True, "", 1.0)])
    assert receipts.load(dataclasses.replace(HERE, **change)) is None  # type: ignore[arg-type]


def test_a_receipt_put_in_another_machine_s_place_proves_nothing() -> None:
    """Its name may lie; what it says of itself counts."""
    other = dataclasses.replace(HERE, sm=89)
    receipts.save(HERE, [Proof(receipts.PLUGIN_FP8, True, "", 1.0)]).rename(
        receipts.receipt_file(other)
    )
    assert receipts.load(other) is None


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"format": "other"}', None])
def test_a_damaged_receipt_proves_nothing(damage: str | None) -> None:
    path = receipts.save(HERE, [Proof(receipts.NATIVE_BUILDS, True, "", 1.0)])
    if damage is None:
        content = json.loads(path.read_text())
        content["proofs"][0]["ok"] = "yes"
        damage = json.dumps(content)
    path.write_text(damage)
    assert receipts.load(HERE) is None


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    receipts.write_whole(path, b"old")
    with pytest.raises(TypeError):
        receipts.write_whole(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("names", "fp8", "forms", "packed"),
    [
        (None, True, [NATIVE], False),
        ((), True, [NATIVE], False),
        ((receipts.PLUGIN_FP8, receipts.PLUGIN_CAPTURED), True, [PYTHON, NATIVE], False),
        ((receipts.PLUGIN_PACKED,), True, [PYTHON, NATIVE], True),
        ((receipts.AOT_WORKS, receipts.AOT_OP, receipts.CAPTURED), True, [AOT, NATIVE], False),
        ((receipts.AOT_WORKS, receipts.AOT_STATIC), True, [NATIVE], False),
        ((receipts.FP8_ATTENTION,), True, [NATIVE_FP8, NATIVE], False),
        ((receipts.FP8_ATTENTION,), False, [NATIVE], False),
        (receipts.PROBES, True, [PYTHON, AOT, NATIVE_FP8, NATIVE], False),
        (receipts.PROBES, False, [NATIVE], False),
    ],
)
def test_the_best_proved_form_comes_first_and_native_last(
    names: tuple[str, ...] | None, fp8: bool, forms: list[str], packed: bool
) -> None:
    choices = receipts.choose(None if names is None else proved(*names), fp8)
    assert [choice.form for choice in choices] == forms
    assert choices[0].packed is packed and all(choice.reason for choice in choices)
    if names is None:
        assert "aapt doctor --tensorrt has not been run" in choices[0].reason


@pytest.mark.parametrize(
    ("names", "forms"),
    [
        ((receipts.PORTABLE_PLUGIN, receipts.PORTABLE_AOT), [PYTHON, AOT, NATIVE_FP8, NATIVE]),
        ((receipts.PORTABLE_PLUGIN,), [PYTHON, NATIVE_FP8, NATIVE]),
        ((receipts.PORTABLE_AOT, receipts.PORTABLE_NATIVE), [AOT, NATIVE_FP8, NATIVE]),
        ((), [NATIVE_FP8, NATIVE]),
    ],
)
def test_a_portable_plan_with_our_kernels_needs_a_proof_of_its_own(
    names: tuple[str, ...], forms: list[str]
) -> None:
    plain = (
        receipts.PLUGIN_FP8, receipts.AOT_WORKS, receipts.AOT_OP, receipts.FP8_ATTENTION,
    )  # fmt: skip
    choices = receipts.choose(proved(*plain, *names), fp8=True, portable=True)
    assert [choice.form for choice in choices] == forms
    if PYTHON not in forms:
        assert "lean runtime runs plans with our kernels is not proved" in choices[-1].reason


def test_what_could_not_be_captured_is_not() -> None:
    choices = receipts.choose(proved(receipts.PLUGIN_FP8, receipts.CAPTURED), fp8=True)
    assert [choice.captured for choice in choices] == [False, True]


def test_files_are_in_this_users_caches_under_the_machines_name(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache / "aapt_deploy" / "tensorrt"
    assert receipts.cache_folder() == folder
    assert receipts.receipt_file(HERE) == folder / f"proofs-{HERE.key}.json"
    assert receipts.timing_cache_file(HERE) == folder / "timing-sm90-11.4.0.106.bin"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert receipts.cache_folder() == Path.home() / ".cache" / "aapt_deploy" / "tensorrt"


def test_a_receipt_is_text_that_people_read() -> None:
    path = receipts.save(HERE, [Proof(receipts.SLOT, True, "same bytes", 2.5)])
    assert path == receipts.receipt_file(HERE) and path.read_text().count("\n") > 5
    assert json.loads(path.read_text()) == {
        "format": receipts.FORMAT, "verified_on": dataclasses.asdict(HERE),
        "proofs": [{"name": receipts.SLOT, "ok": True, "found": "same bytes", "seconds": 2.5}],
    }  # fmt: skip


NOT_RUN = "aapt doctor --tensorrt has not been run on this machine with these versions"
NO_SCALES = "our kernels need the FP8 scales of an fp8 bundle"
NOTHING = "nothing better is proved here"


@pytest.mark.parametrize(
    ("names", "fp8", "choices"),
    [
        (None, True, [Choice(NATIVE, False, True, NOT_RUN)]),
        (None, False, [Choice(NATIVE, False, True, NO_SCALES)]),
        ((), True, [Choice(NATIVE, False, False, NOTHING)]),
        ((receipts.CAPTURED,), False, [Choice(NATIVE, False, True, NO_SCALES)]),
        ((receipts.AOT_WORKS,), True, [Choice(NATIVE, False, False, NOTHING)]),
        ((receipts.AOT_OP,), True, [Choice(NATIVE, False, False, NOTHING)]),
        ((receipts.AOT_WORKS, receipts.AOT_OP), True,
         [Choice(AOT, False, False, "proved here; the plan holds our kernels"),
          Choice(NATIVE, False, False, NOTHING)]),
        ((receipts.PLUGIN_FP8, receipts.PLUGIN_PACKED, receipts.CAPTURED), True,
         [Choice(PYTHON, False, False, "proved here"), Choice(NATIVE, False, True, NOTHING)]),
        ((receipts.PLUGIN_PACKED, receipts.PLUGIN_CAPTURED), True,
         [Choice(PYTHON, True, True, "proved here"), Choice(NATIVE, False, False, NOTHING)]),
    ],
)  # fmt: skip
def test_each_choice_says_how_and_why(
    names: tuple[str, ...] | None, fp8: bool, choices: list[Choice]
) -> None:
    assert receipts.choose(None if names is None else proved(*names), fp8) == choices
    if names:  # a check that was not made proves nothing either
        seen = {name: proof for name, proof in proved(*names).items() if proof.ok}
        assert receipts.choose(seen, fp8) == choices
