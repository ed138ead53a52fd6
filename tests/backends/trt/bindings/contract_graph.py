"""A graph of `lower_for_plugin` is what the plugin takes: names, shapes, types."""

from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from aapt_deploy.backends.trt import lower_attention
from aapt_deploy.backends.trt.plugin import python as python_plugin
from aapt_deploy.errors import BundleError
from aapt_deploy.ops.block_causal_attention import (
    DOMAIN,
    NAME,
    Ring,
    hopper_fp8,
    onnx_function,
    softmax_scale,
)

RING = Ring(text_tokens=7, block_tokens=100, sink_blocks=1, window_blocks=3)
H, D, LAYERS = 3, 64, 2
TENSORRT = {
    TensorProto.BFLOAT16: "BF16",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.INT32: "INT32",
    TensorProto.FLOAT: "FLOAT",
}


def model(dtype: int = TensorProto.FLOAT) -> ModelProto:
    """Two layers of attention, as an export leaves them."""
    block, cache = [1, RING.block_tokens, H, D], [1, RING.tokens, H, D]
    inputs, outputs, nodes = (
        [helper.make_tensor_value_info("cache_len", TensorProto.INT32, [1])],
        [],
        [],
    )
    for layer in range(LAYERS):
        names = [f"{kind}.{layer:02d}" for kind in ("q", "k", "v", "k_cache", "v_cache")]
        shapes = [block] * 3 + [cache] * 2
        kinds = [dtype] * 3 + [TensorProto.FLOAT] * 2
        inputs += [
            helper.make_tensor_value_info(name, kind, shape)
            for name, kind, shape in zip(names, kinds, shapes, strict=True)
        ]
        out = [f"{kind}.{layer:02d}" for kind in ("out", "k_block", "v_block")]
        outputs += [
            helper.make_tensor_value_info(name, kind, block)
            for name, kind in zip(out, [dtype, 1, 1], strict=True)
        ]
        attributes: dict[str, Any] = {
            "scale": softmax_scale(D),
            "plugin_namespace": "aapt",
            "plugin_version": "1",
        }
        nodes.append(
            helper.make_node(
                NAME, [*names, "cache_len"], out, f"layer.{layer}", domain=DOMAIN, **attributes
            )
        )
    graph = helper.make_graph(nodes, "attention", inputs, outputs)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)]
    return onnx_function.attach(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def scales() -> list[hopper_fp8.Scales]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.uniform(0.5, 2, shape).astype(np.float32)
    return [
        hopper_fp8.Scales(q_scale=draw(H), k_scale=draw(H), k_mean=draw(H, D), v_scale=draw(H, D))
        for _ in range(LAYERS)
    ]


def described(lowered: ModelProto) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and TensorRT type of every tensor whose type the graph fixes."""
    found = {
        value.name: (
            tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim),
            TENSORRT[value.type.tensor_type.elem_type],
        )
        for value in (*lowered.graph.input, *lowered.graph.output)
    }
    found |= {
        tensor.name: (tuple(tensor.dims), TENSORRT[tensor.data_type])
        for tensor in lowered.graph.initializer
    }
    for node in lowered.graph.node:
        if node.op_type == "Cast" and node.attribute[0].i == TensorProto.BFLOAT16:
            found[node.output[0]] = (found[node.input[0]][0], "BF16")
    return found


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.BFLOAT16])
@pytest.mark.parametrize("form", ["token_major", "hopper_fp8", "packed"])
def test_every_node_is_one_that_the_plugin_takes(trt: ModuleType, form: str, dtype: int) -> None:
    mine = None if form == "token_major" else scales()
    lowered = lower_attention.lower_for_plugin(model(dtype), RING, mine, packed=form == "packed")
    onnx.checker.check_model(lowered)
    assert not lowered.functions
    found = described(lowered)
    ours = [node for node in lowered.graph.node if node.op_type == NAME]
    assert len(ours) == LAYERS and {node.domain for node in ours} == {DOMAIN}
    for layer, node in enumerate(ours):
        assert {one.name: helper.get_attribute_value(one) for one in node.attribute} == {
            "scale": np.float32(softmax_scale(D)), "plugin_namespace": b"aapt",
            "plugin_version": b"1",
        }  # fmt: skip
        size = python_plugin.sizes([found[name][0] for name in node.input])
        layout = "token_major" if form == "token_major" else "hopper_fp8"
        cache = RING.tokens if form == "token_major" else hopper_fp8.tiles(RING.tokens)
        assert size == python_plugin.Sizes(layout, RING.block_tokens, H, D, cache)
        kinds = python_plugin.dtypes(layout, packed=form == "packed")
        assert [found[name][1] for name in node.input] == [
            kind.name for kind in kinds[: len(node.input)]
        ]
        assert [found[name][1] for name in node.output[1:]] == [kind.name for kind in kinds[-2:]]
        if mine:
            values = {
                tensor.name: onnx.numpy_helper.to_array(tensor)
                for tensor in lowered.graph.initializer
            }
            for name, field in zip(
                node.input[6:], ("q_scale", "k_scale", "v_scale", "k_mean"), strict=True
            ):
                assert np.array_equal(values[name], getattr(mine[layer], field))
    assert sum(node.op_type == "Cast" for node in lowered.graph.node) == (
        0 if dtype == TensorProto.BFLOAT16 else 4 * LAYERS
    )


def test_a_graph_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BundleError, match="2 attention layers and there are scales for 1"):
        lower_attention.lower_for_plugin(model(), RING, scales()[:1])
    undescribed = model()
    first = next(value for value in undescribed.graph.input if value.name == "q.00")
    first.type.tensor_type.ClearField("shape")
    with pytest.raises(BundleError, match=r"does not tell the shape of 'q\.00'"):
        lower_attention.lower_for_plugin(undescribed, RING, None)
