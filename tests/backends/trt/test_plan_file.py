"""What a plan's file tells: layers, in the forms of 10.x and 11.x, and the receipt beside it.

A plan is refused before it is used when it is of another GPU, TensorRT, kernel or graph.
"""

import dataclasses
import json
from typing import Any

import pytest

from aapt_deploy.backends.trt.cuda import Gpu
from aapt_deploy.backends.trt.plan_file import Audit, Receipt, audit, check, read_layers
from aapt_deploy.errors import AaptError, BundleError, MachineError, ParityError

# --- layers ---


def told(form: str, layers: list[tuple[str, str, str, str]]) -> str:
    """The inspector's JSON for layers of (name, kind, type of the input, tactic)."""
    tensor: Any = {
        "10": lambda kind: {
            "Name": "x",
            "Dimensions": [1, 2],
            "Format/Datatype": f"Row major linear {kind} format",
        },
        "11": lambda kind: {
            "Name": "x",
            "Dimensions": [1, 2],
            "Format": "Linear",
            "DataType": kind,
        },
    }[form]
    entries = [
        {
            "Name": n,
            "LayerType": k,
            "Inputs": [tensor(d)],
            "Outputs": [tensor("BF16")],
            "TacticName": t,
        }
        for n, k, d, t in layers
    ]
    return json.dumps({"Layers": entries, "Bindings": ["x"]})


LAYERS = [
    ("layer.0.attention", "PluginV3", "FP8", ""), ("layer.1.attention", "PluginV3", "FP8", ""),
    ("reformat of x", "Reformat", "FP8", ""),
    ("layer.0.mlp", "gemm", "FP8", "sm90_gemm_e4m3"),
    ("layer.1.mlp", "gemm", "BF16", "sm90_gemm_bf16"), ("norm", "kgen", "BF16", ""),
]  # fmt: skip


@pytest.mark.parametrize("form", ["10", "11"])
def test_both_forms_are_read_and_counted(form: str) -> None:
    layers = read_layers(told(form, LAYERS))
    assert (
        layers[3].name == "layer.0.mlp"
        and layers[3].tactic == "sm90_gemm_e4m3"
        and layers[3].reads_fp8
        and not layers[4].reads_fp8
    )
    assert audit(layers, plugin_layers=2, fp8_layers=1) == Audit(
        layers=6, plugins=2, fp8=1, reformats=1
    )


def test_a_plan_without_our_kernel_is_refused_with_what_runs_instead() -> None:
    layers = [
        ("layer.0.attention", "PluginV3", "FP8", ""),
        ("layer.1.attention/softmax", "SoftMax", "BF16", ""),
    ]
    with pytest.raises(
        ParityError,
        match=r"1 layers instead of 2; attention elsewhere: layer\.1\.attention/softmax",
    ):
        audit(read_layers(told("11", layers)), plugin_layers=2)


def test_too_few_layers_in_fp8_are_refused_with_their_names() -> None:
    with pytest.raises(
        ParityError, match=r"1 layers in FP8 instead of 2; not in FP8: layer\.1\.mlp"
    ):
        audit(read_layers(told("11", LAYERS)), plugin_layers=2, fp8_layers=2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"Layers": ["only", "names"]}',
        '{"Layers": [{"Name": "x"}]}',
        '{"Layers": 3}',
        "[]",
    ],
)
def test_what_tells_no_layers_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match="does not describe"):
        read_layers(text)


# --- the receipt ---

HERE = Gpu("11.4.0.106", 90, "13.0", "580.65.06", "NVIDIA H100", "a" * 64)
GRAPH = "c" * 64
RECEIPT = Receipt("11.4.0.106", (90,), "a" * 64, GRAPH, "13.0", "580.65", "NVIDIA H100")


def test_the_machine_that_built_a_plan_runs_it() -> None:
    check(RECEIPT, HERE, GRAPH, "generator.plan")
    check(
        dataclasses.replace(RECEIPT, driver="570.1", cuda="12.8"), HERE, GRAPH, "generator.plan"
    )  # for the record only


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        (
            {"sms": (80, 89), "gpu": "NVIDIA L40S"}, MachineError,
            "SM 80, 89 (NVIDIA L40S); this GPU is SM 90",
        ),
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


@pytest.mark.parametrize(
    "change",
    [
        {"sms": [90, "90"]},
        {"sms": [True]},
        {"sms": []},
        {"sms": 90},
        {"more": 1},
        {"tensorrt": None},
    ],
)
def test_a_receipt_that_is_not_whole_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="no whole receipt"):
        Receipt.of(RECEIPT.to_dict() | change, "generator.plan")
    with pytest.raises(BundleError, match="no whole receipt"):
        Receipt.of(None, "generator.plan")
