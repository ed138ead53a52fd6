"""Reading and auditing what TensorRT tells about a plan's layers, in the forms of 10.x and 11.x."""

import json
from typing import Any

import pytest

from aapt_deploy.backends.trt.plan_file import Audit, audit, read_layers
from aapt_deploy.errors import BundleError, ParityError


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
