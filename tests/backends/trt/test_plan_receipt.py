"""A plan is refused before it is used when it is of another GPU, TensorRT, kernel or graph."""

import dataclasses
from typing import Any

import pytest

from aapt_deploy.backends.trt.cuda import Gpu
from aapt_deploy.backends.trt.plan_file import Receipt, check
from aapt_deploy.errors import AaptError, BundleError, MachineError

HERE = Gpu("11.4.0.106", 90, "13.0", "580.65.06", "NVIDIA H100", "a" * 64)
GRAPH = "c" * 64
RECEIPT = Receipt("11.4.0.106", 90, "a" * 64, GRAPH, "13.0", "580.65", "NVIDIA H100")


def test_the_machine_that_built_a_plan_runs_it() -> None:
    check(RECEIPT, HERE, GRAPH, "generator.plan")
    check(
        dataclasses.replace(RECEIPT, driver="570.1", cuda="12.8"), HERE, GRAPH, "generator.plan"
    )  # for the record only


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        ({"sm": 89, "gpu": "NVIDIA L40S"}, MachineError, "SM 89 (NVIDIA L40S); this GPU is SM 90"),
        ({"tensorrt": "10.16.1.11"}, MachineError, "TensorRT 10.16.1.11; here is 11.4.0.106"),
        ({"tensorrt": "11.4.0.107"}, MachineError, "11.4.0.107"),
        ({"kernels": "b" * 64}, BundleError, "kernels bbbbbbbbbbbb"),
        ({"graph_sha256": "d" * 64}, BundleError, "another graph"),
    ],
)  # fmt: skip
def test_a_foreign_or_stale_plan_is_refused_with_the_fix(
    change: dict[str, Any], kind: type[AaptError], reason: str
) -> None:
    with pytest.raises(kind) as caught:
        check(dataclasses.replace(RECEIPT, **change), HERE, GRAPH, "generator.plan")
    assert reason in str(caught.value) and "aapt build-engine" in caught.value.hint


def test_a_receipt_goes_through_a_manifest() -> None:
    assert Receipt.of(RECEIPT.to_dict(), "generator.plan") == RECEIPT


@pytest.mark.parametrize("change", [{"sm": "90"}, {"sm": True}, {"more": 1}, {"tensorrt": None}])
def test_a_receipt_that_is_not_whole_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="no whole receipt"):
        Receipt.of(RECEIPT.to_dict() | change, "generator.plan")
    with pytest.raises(BundleError, match="no whole receipt"):
        Receipt.of(None, "generator.plan")
