"""Lowered graphs for TensorRT: equal numbers if ONNX Runtime can run them, else types.

Nothing is read from outside a bundle.
"""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from aapt_deploy.backends.trt.doctor import cases
from aapt_deploy.backends.trt.doctor.receipts import NATIVE, Choice
from aapt_deploy.backends.trt.lower import lower
from aapt_deploy.backends.trt.lower_attention import lower_native
from aapt_deploy.backends.trt.lower_products import (
    fp8_products,
    outputs_in_bf16,
    products_in_bf16,
)
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import BundleError
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.ops.block_causal_attention import NAME, Ring
from aapt_deploy.profiles import Profile
from tests.support.native_attention import for_onnxruntime
from tests.support.tampered import HOSTILE, WEIGHTS, external, tampered

FALLBACK = Choice(NATIVE, packed=False, captured=True, reason="")


def run(model: ModelProto, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


def random_inputs(profile: Profile, cache_len: int) -> dict[str, np.ndarray]:
    signature, rng = signatures(profile)["generator"], np.random.default_rng(3)
    inputs = {
        spec.name: rng.standard_normal(spec.shape).astype(spec.dtype)
        for spec in (*signature.inputs, *signature.state)
    }
    return inputs | {"cache_len": np.array([cache_len], np.int32)}


def test_native_attention_is_the_portable_function(bundle: Path, tiny: Profile) -> None:
    """Over an empty, a half-full and a full cache; tokens behind the valid ones do not matter."""
    exported = onnx.load(bundle / "generator.onnx")
    native = lower_native(exported, Ring.of(tiny), TensorProto.FLOAT)
    onnx.checker.check_model(native, full_check=True)
    assert not native.functions and all(node.op_type != NAME for node in native.graph.node)
    lowered = for_onnxruntime(native, tiny.frame_tokens)
    for cache_len in (tiny.text.tokens, tiny.cache_tokens // 2, tiny.cache_tokens):
        inputs = random_inputs(tiny, cache_len)
        wanted, found = run(exported, inputs), run(lowered, inputs)
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            assert np.allclose(found[name], array, atol=2e-5), (cache_len, name)


def test_the_whole_native_graph_in_bf16_is_well_typed_and_close() -> None:
    case = cases.native()
    onnx.checker.check_model(case.model, full_check=True)
    inputs = {
        name: array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array
        for name, array in case.inputs.items()
    }
    out, k_block, v_block = ReferenceEvaluator(
        for_onnxruntime(case.model, cases.RING.block_tokens)
    ).run(None, inputs)
    assert np.linalg.norm(out - case.out) < 0.1 * np.linalg.norm(
        case.out
    )  # the evaluator also sums in bf16, which no kernel does
    assert np.array_equal(k_block.view(np.uint16), case.blocks["k_block"]) and np.array_equal(
        v_block.view(np.uint16), case.blocks["v_block"]
    )


def test_the_fp8_product_of_the_doctor_is_what_onnx_runtime_computes() -> None:
    case = cases.fp8_product()
    found = run(case.model, case.inputs)["out"]
    assert np.linalg.norm(found - case.out) < 1e-6 * np.linalg.norm(case.out)
    assert fp8_products(case.model) == {"x": ["product"]}


def quantised_and_not() -> ModelProto:
    """The doctor's FP8 product, and a plain one behind it."""
    model = cases.fp8_product().model
    graph = model.graph
    graph.node[-1].output[0] = "between"
    graph.node.append(helper.make_node("MatMul", ["between", "more"], ["out"], "plain"))
    graph.initializer.append(
        onnx.numpy_helper.from_array(np.eye(cases.COLUMNS, dtype=np.float32), "more")
    )
    return model


def test_products_become_bf16_but_for_those_in_fp8() -> None:
    lowered = products_in_bf16(quantised_and_not(), Path())
    onnx.checker.check_model(lowered, full_check=True)
    nodes = {node.name: node for node in lowered.graph.node}
    assert list(nodes["product"].input) == ["x.fp8", "weight.t"] and list(nodes["plain"].input) == [
        "between.bf16",
        "more.bf16",
    ]
    assert fp8_products(lowered) == {"x.bf16": ["product"]}
    found = ReferenceEvaluator(lowered).run(None, {"x": cases.fp8_product().inputs["x"]})[0]
    wanted = cases.fp8_product().out
    assert (
        found.dtype == np.float32
        and 1e-6 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.03
    )


def test_outputs_leave_as_bf16() -> None:
    model = outputs_in_bf16(quantised_and_not(), ["out"])
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.BFLOAT16
    assert (
        ReferenceEvaluator(model).run(None, {"x": cases.fp8_product().inputs["x"]})[0].dtype
        == ml_dtypes.bfloat16
    )


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_every_graph_of_a_bundle_is_lowered(
    bundle: Path, tiny: Profile, tmp_path: Path, precision: str
) -> None:
    opened = Bundle.open(bundle)
    for name in signatures(tiny):
        lowered = lower(opened, name, precision, FALLBACK, None, tmp_path)
        onnx.checker.check_model(lowered.path, full_check=True)
        model = onnx.load(lowered.path)
        types = {
            value.name: value.type.tensor_type.elem_type
            for value in (*model.graph.input, *model.graph.output)
        }
        half = {value for value, kind in types.items() if kind == TensorProto.BFLOAT16}
        stored = {
            value
            for value in types
            if value.startswith(("k_cache", "v_cache", "k_block", "v_block", "text_"))
        }
        assert half == (stored if precision == "bf16" else set())
        attention = {"generator": tiny.model.depth, "prompt": tiny.model.depth - 1}
        assert (lowered.plugin_layers, lowered.attention_layers) == (0, attention.get(name, 0))
        assert lowered.products > 0 and not lowered.fp8_products


# --- graphs from strangers; the guard itself: tests/bundle/test_graph_file.py ---


@pytest.mark.parametrize("case", HOSTILE)
def test_a_graph_that_reaches_outside_its_own_weights_is_refused(
    copied: Path, tmp_path: Path, case: str
) -> None:
    opened = tampered(copied, HOSTILE[case], WEIGHTS)
    with pytest.raises(BundleError, match=r"encoder\.onnx") as caught:
        lower(opened, "encoder", "fp32", FALLBACK, None, tmp_path / "out")
    assert "do not use this bundle" in caught.value.hint and not (tmp_path / "out").exists()


def test_weights_beside_a_graph_come_along(copied: Path, tmp_path: Path) -> None:
    opened = tampered(copied, external(), WEIGHTS)
    lower(opened, "encoder", "fp32", FALLBACK, None, tmp_path / "out")
    assert (tmp_path / "out" / "encoder.onnx.data").read_bytes() == WEIGHTS


def test_weights_that_are_a_link_are_refused(copied: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(WEIGHTS)
    opened = tampered(copied, external(), secret.read_bytes())
    (copied / "encoder.onnx.data").unlink()
    (copied / "encoder.onnx.data").symlink_to(secret)
    with pytest.raises(BundleError, match="missing or a link"):
        lower(opened, "encoder", "fp32", FALLBACK, None, tmp_path / "out")


def test_a_generator_with_too_few_layers_is_refused(copied: Path, tmp_path: Path) -> None:
    def cut(model: ModelProto) -> None:
        model.graph.node.remove(next(node for node in model.graph.node if node.op_type == NAME))

    with pytest.raises(BundleError, match="1 attention layers, the profile 2"):
        lower(
            tampered(copied, cut, None, "generator"), "generator", "fp32", FALLBACK, None, tmp_path
        )
