"""Lower an exported generator for the plugin, which bindings/ tests."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from aapt_deploy.backends.trt import lower_attention
from aapt_deploy.errors import BundleError
from aapt_deploy.ops.block_causal_attention import NAME, Ring
from aapt_deploy.profiles import Profile


def test_an_exported_generator_is_lowered_whole(bundle: Path, tiny: Profile) -> None:
    exported = onnx.load(bundle / "generator.onnx")
    lowered = lower_attention.lower_for_plugin(exported, Ring.of(tiny), None)
    ours = [node for node in lowered.graph.node if node.op_type == NAME]
    assert len(ours) == tiny.model.depth and not lowered.functions
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in (*lowered.graph.input, *lowered.graph.output)
    }
    assert [name for name, kind in kinds.items() if kind == TensorProto.BFLOAT16] == [
        name for name in kinds if name.startswith(("k_cache", "v_cache", "k_block", "v_block"))
    ]
    casts = {node.output[0]: node.input[0] for node in lowered.graph.node if node.op_type == "Cast"}
    before = {node.name: node for node in exported.graph.node}
    for node in ours:
        assert [casts[name] for name in node.input[:3]] == list(before[node.name].input[:3])
        assert casts[before[node.name].output[0]] == node.output[0]
    produced = (
        {name for node in lowered.graph.node for name in node.output}
        | kinds.keys()
        | {tensor.name for tensor in lowered.graph.initializer}
    )
    assert {name for node in lowered.graph.node for name in node.input if name} <= produced


def test_a_head_dim_without_kernels_is_refused(bundle: Path, tiny: Profile) -> None:
    assert tiny.head_dim not in (64, 128)
    with pytest.raises(
        BundleError, match=f"head_dim {tiny.head_dim}; hopper_fp8 is for 64 and 128"
    ):
        lower_attention.lower_for_plugin(onnx.load(bundle / "generator.onnx"), Ring.of(tiny), [])
