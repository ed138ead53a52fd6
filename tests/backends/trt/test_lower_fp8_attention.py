"""FP8 attention without a plugin: what the graph computes, how well, and what TensorRT makes of it.

The compiler is real: TensorRT-RTX builds plans without a GPU. What it says about kernels and memory
is in its log.
"""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from aapt_deploy.backends.trt.doctor.receipts import NATIVE_FP8, Choice
from aapt_deploy.backends.trt.lower import lower
from aapt_deploy.backends.trt.lower_fp8_attention import (
    lower_native_fp8,
    q_factors,
    text_in_fp8,
)
from aapt_deploy.backends.trt.state import CacheLayer, TokenMajor
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.bundle.scales import Scales as Calibrated
from aapt_deploy.bundle.signature import layer_names
from aapt_deploy.errors import BundleError
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.ops.block_causal_attention import OPSET, Ring, softmax_scale
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import Scales, calibrate
from tests.support.attention_data import LONG, SHORT, case, draw, rmse
from tests.support.cuda_emulator import Driver
from tests.support.native_fp8 import (
    ASCENDING,
    DOCUMENTED,
    ORDERS,
    attend,
    computed_fp8,
)
from tests.support.one_layer import one_layer
from tests.support.tiny import FEW_BLOCKS, Exported, frames_of
from tests.support.trt_plans import by_onnx, decibels, opened_over, toy_scales

trt = pytest.importorskip(
    "tensorrt_rtx_bindings", reason="TensorRT-RTX has no wheels for this Python"
)

SMALL = Ring(text_tokens=3, block_tokens=16, sink_blocks=1, window_blocks=2)
HEADS = 2


# --- what the graph computes ---


class Layer:
    """One lowered layer and its data, in a ring of which `cache_len` tokens are valid."""

    def __init__(self, head_dim: int, cache_len: int, smooth_k: bool = False) -> None:
        ring, tokens = SMALL, SMALL.block_tokens
        data = draw("plain", ring.tokens + tokens, rows=tokens, head_dim=head_dim)
        for x, size in zip(data, (0.5, 2, 8), strict=True):
            x[:, 1] *= size  # heads whose scales differ widely
        self.scales = calibrate(*data, smooth_k=smooth_k)
        self.cache_len, self.data = cache_len, data
        self.k, self.v = data.k[ring.tokens :], data.v[ring.tokens :]
        model = one_layer(ring, HEADS, head_dim)
        self.run = computed_fp8(lower_native_fp8(model, ring, [self.scales]), tokens)

    def caches(self, behind: int) -> dict[str, np.ndarray]:
        """Caches of codes, with the byte `behind` in all that is not valid."""
        k, v = self.data.k[: SMALL.tokens], self.data.v[: SMALL.tokens]
        codes = {"k_cache": self.scales.quantise_k(k), "v_cache": self.scales.quantise_v(v)}
        for cache in codes.values():
            cache[self.cache_len :] = behind
        return {name: cache[None] for name, cache in codes.items()}

    def results(self, behind: int = 0) -> dict[str, np.ndarray]:
        inputs = {"q": self.data.q[None], "k": self.k[None], "v": self.v[None]}
        length = {"cache_len": np.array([self.cache_len], np.int32)}
        return dict(self.run({**inputs, **self.caches(behind), **length}))


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("cache_len", [0, SMALL.text_tokens, 35, SMALL.tokens])
def test_the_graph_is_the_arithmetic(head_dim: int, cache_len: int) -> None:
    layer = Layer(head_dim, cache_len, smooth_k=cache_len == 35)
    found = layer.results()
    np.testing.assert_array_equal(found["k_block"][0], layer.scales.quantise_k(layer.k))
    np.testing.assert_array_equal(found["v_block"][0], layer.scales.quantise_v(layer.v))
    seen = np.r_[:cache_len, SMALL.tokens : SMALL.tokens + SMALL.block_tokens]
    exact = exact_attention(layer, seen)
    error = rmse(found["out"][0], exact)
    assert 0.002 < error < 0.035, "quantised, and no more than that"


def exact_attention(layer: Layer, seen: np.ndarray) -> np.ndarray:
    """In float64, over the tokens `seen` before quantisation: [T, H, D]."""
    q, k, v = (x.astype(np.float64) for x in layer.data)
    scores = np.einsum("qhd,khd->hqk", q, k[seen]) * softmax_scale(q.shape[-1])
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v[seen]))


def test_what_lies_behind_the_valid_tokens_does_not_matter() -> None:
    layer = Layer(64, 35)
    zeros, largest = layer.results(0), layer.results(0x7E)
    for name, array in zeros.items():
        np.testing.assert_array_equal(largest[name], array)


def test_the_model_of_the_kernel_is_the_graph() -> None:
    """`attend` and ONNX Runtime on the lowered graph, at a full cache."""
    ring = Ring(text_tokens=16, block_tokens=64, sink_blocks=1, window_blocks=3)
    made = case("sharp", ring, heads=HEADS, head_dim=64)
    data = draw("sharp", ring.tokens + ring.block_tokens, heads=HEADS, head_dim=64)
    lowered = lower_native_fp8(one_layer(ring, HEADS, 64), ring, [made.scales])
    rows = np.resize(data.q, (1, ring.block_tokens, HEADS, 64))
    codes = [made.scales.quantise_k(data.k), made.scales.quantise_v(data.v)]
    inputs = {"q": rows, "k": data.k[None, ring.tokens :], "v": data.v[None, ring.tokens :]}
    caches = {"k_cache": codes[0][None, : ring.tokens], "v_cache": codes[1][None, : ring.tokens]}
    length = {"cache_len": np.array([ring.tokens], np.int32)}
    found = computed_fp8(lowered, ring.block_tokens)({**inputs, **caches, **length})
    assert rmse(found["out"][0, : len(data.q)], attend(made, DOCUMENTED).astype(float)) < 0.003


def test_the_scale_of_q_is_a_power_of_two_at_which_nothing_saturates() -> None:
    data = draw("plain", 100, head_dim=64)
    data.q[:, 1] *= 37
    scales = calibrate(*data)
    factors, code_scale = q_factors(softmax_scale(64), scales)
    assert np.log2(code_scale) == round(np.log2(code_scale))
    largest = np.abs(data.q * factors[:, None]).max() / code_scale
    assert 224 < largest <= 448


# --- accuracy at the lengths of real streams ---

# The bounds of our own kernel (test_emulator.py), 1.5 times its model's error. A scale per tensor
# for q costs nothing that this sees. Where P is divided by its sum before it is quantised, a
# strong sink leaves little of e4m3's range to the others: 1.75 times.
MARGIN, WORST, SHORTER = 1.5, 1.75, 0.0064 / 0.0041
KINDS = {
    ("plain", 0): 0.0041, ("sharp", 0): 0.0131, ("outlier", 0): 0.0059,
    ("sink", 6): 0.0075, ("sink", 9): 0.0178, ("sink", 12): 0.0555,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "sink_score"), KINDS)
@pytest.mark.parametrize(
    ("ring", "head_dim"), [(SHORT, 128), (SHORT, 64), (LONG, 128)], ids=["4800", "64", "37332"]
)
def test_the_error_at_real_lengths(kind: str, sink_score: float, ring: Ring, head_dim: int) -> None:
    made = case(kind, ring, sink_score, heads=2 if kind == "sink" else 1, head_dim=head_dim)
    for order in ORDERS:
        error = rmse(attend(made, order), made.exact)
        print(f"{kind} {sink_score} {head_dim} {order}: {error:.4f}")
        margin = WORST if order == DOCUMENTED else MARGIN
        assert error <= margin * KINDS[kind, sink_score] * (SHORTER if ring == SHORT else 1), order


@pytest.mark.parametrize(("ring", "least"), [(SHORT, 0.04), (LONG, 0.2)], ids=["4800", "37332"])
def test_a_kernel_that_sums_in_13_bits_is_found_by_its_error(ring: Ring, least: float) -> None:
    """Whether TensorRT's does is not known; a check on the GPU sees it from 4800 keys on."""
    made = case("plain", ring, heads=1)
    error = rmse(attend(made, ASCENDING, bits=13), made.exact)
    assert error > least and error > 7 * rmse(attend(made, ASCENDING), made.exact)


# --- whole graphs, and a stream ---


def test_a_stream_of_fp8_caches(
    exported: Exported,
    calibrated: Calibrated,
    exported_frames: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Generator and prompt lowered, over the emulated device: frames as of the exported graphs."""
    opened = Bundle.open(exported.path)
    profile = opened.profile
    ring, scales = Ring.of(profile), calibrated.attention
    generator = lower_native_fp8(onnx.load(exported.path / "generator.onnx"), ring, scales)
    pairs = list(zip(*(layer_names(f"text_{x}", profile) for x in "kv"), strict=True))
    prompt = text_in_fp8(onnx.load(exported.path / "prompt.onnx"), pairs, scales)
    for model in (generator, prompt):
        onnx.checker.check_model(model)
    graphs = {name: by_onnx(exported.path / f"{name}.onnx") for name in signatures(profile)}
    graphs["generator"] = computed_fp8(generator, ring.block_tokens)
    graphs["prompt"] = computed_fp8(prompt, ring.block_tokens)
    stored = ("k_cache", "v_cache", "k_block", "v_block", "text_")
    kinds = lambda _, name: "FP8" if name.startswith(stored) else None
    engines = opened_over(Driver(), profile, graphs, kinds=kinds)
    try:
        assert isinstance(engines.generator.cache, TokenMajor)
        frames = frames_of(engines, opened, FEW_BLOCKS, 3)
    finally:
        engines.close()
    near = decibels(frames, exported_frames)
    print(f"{near:.1f} dB")
    assert near > 26


def test_a_prompt_s_codes_are_those_of_the_caches(exported: Exported) -> None:
    profile = Bundle.open(exported.path).profile
    plain = onnx.load(exported.path / "prompt.onnx")
    scales = toy_scales(profile)
    pairs = list(zip(*(layer_names(f"text_{x}", profile) for x in "kv"), strict=True))
    lowered = text_in_fp8(plain, pairs, scales)
    (read,) = signatures(profile)["prompt"].inputs
    text = np.random.default_rng(0).integers(0, 9, read.shape).astype(read.dtype)
    wanted = by_onnx(exported.path / "prompt.onnx")({read.name: text})
    found = computed_fp8(lowered, 1)({read.name: text})
    for (k, v), of_layer in zip(pairs, scales, strict=True):
        assert_codes(found[k], of_layer.quantise_k(wanted[k]))
        assert_codes(found[v], of_layer.quantise_v(wanted[v]))


def assert_codes(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal, but for values on the edge between two codes: other kernels sum in another order."""
    assert found.dtype == np.uint8 and found.shape == wanted.shape
    assert (found != wanted).mean() < 0.001


def test_caches_of_codes_take_no_floats() -> None:
    stream: Any = SimpleNamespace(upload=lambda *_: None)
    caches = TokenMajor(stream, [], "FP8", row_bytes=4, tokens=1)
    with pytest.raises(AssertionError, match="float32 for caches of FP8 codes"):
        caches.write_text(CacheLayer(0, 0, 0, 0), np.zeros(4, np.float32), np.zeros(4, np.float32))


# --- refused before TensorRT is asked ---


@pytest.mark.parametrize("head_dim", [8, 24, 512])
def test_a_head_dim_without_an_fp8_kernel_is_refused(head_dim: int) -> None:
    model = one_layer(SMALL, HEADS, head_dim)
    with pytest.raises(BundleError, match=f"head_dim {head_dim}; FP8 attention needs a multiple"):
        lower_native_fp8(model, SMALL, [some_scales(head_dim)])


def test_scales_of_another_depth_are_refused() -> None:
    scales = [some_scales(64)] * 2
    with pytest.raises(BundleError, match="1 attention layers and there are scales for 2"):
        lower_native_fp8(one_layer(SMALL, HEADS, 64), SMALL, scales)


def some_scales(head_dim: int, heads: int = HEADS) -> Scales:
    ones = np.ones((heads, head_dim), np.float32)
    return Scales(ones[:, 0] / 100, ones[:, 0] / 90, ones / 50, ones / 80)


# --- the real compiler ---


class Messages(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []
        self.errors: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        self.lines += msg.splitlines()
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors.append(msg)

    def number(self, label: str) -> int:
        (line,) = [line for line in self.lines if line.startswith(label)]
        return int(line.split(": ")[1].split(" ")[0])

    def attention(self) -> list[str]:
        """What the log says of every kernel with attention in it."""
        return [line for line in self.lines if line.startswith("Name: _gemm_mha")]


def built(model: ModelProto, targets: list[str]) -> tuple[bool, Messages]:
    """Build for the compute capabilities `targets`; return whether it worked, and the log."""
    messages = Messages()
    builder = trt.Builder(messages)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, messages)
    if not parser.parse(model.SerializeToString()):
        return False, messages
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target), index)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    return builder.build_serialized_network(network, config) is not None, messages


def inputs_of(line: str) -> list[tuple[str, str]]:
    """The dimensions and types of a kernel's inputs, from its line in the log."""
    given = line.split("Constants:")[0]
    return re.findall(r"Dimensions: \[([\d,]*)\].*?Datatype: (\w+)", given)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_attention_becomes_one_fp8_kernel(head_dim: int) -> None:
    model = lower_native_fp8(one_layer(SMALL, HEADS, head_dim), SMALL, [some_scales(head_dim)])
    ok, said = built(model, ["SM89", "SM120", "SM121"])
    assert ok, said.errors
    (line,) = said.attention()
    keys = SMALL.tokens + SMALL.block_tokens
    kinds = dict(inputs_of(line))
    for shape in ((16, head_dim), (head_dim, keys), (keys, head_dim)):
        assert kinds[",".join(map(str, (HEADS, *shape)))] == "FP8", "q, K transposed, V"


def test_every_layer_of_a_generator_is_one_kernel(
    exported: Exported, calibrated: Calibrated, tmp_path: Path
) -> None:
    opened, form = Bundle.open(exported.path), Choice(NATIVE_FP8, False, True, "")
    lowered = lower(opened, "generator", "fp8", form, calibrated.attention, tmp_path)
    ok, said = built(onnx.load(lowered.path), ["SM89", "SM120"])
    assert ok, said.errors
    assert len(said.attention()) == lowered.attention_layers == opened.profile.model.depth


def test_codes_of_a_text_leave_a_plan() -> None:
    names, shape = ("text_k", "text_v"), [1, 7, HEADS, 64]
    tensor = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    nodes = [helper.make_node("Mul", ["x", "x"], [name], name) for name in names]
    graph = helper.make_graph(nodes, "prompt", [tensor("x")], [tensor(name) for name in names])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    ok, said = built(text_in_fp8(model, [names], [some_scales(64)]), ["SM89", "SM120"])
    assert ok, said.errors
    for name in names:
        assert any(f"{name}, Dimensions: [1,7,2,64]" in line and "FP8" in line
                   for line in said.lines if line.startswith("Name: ")), name  # fmt: skip


@pytest.mark.parametrize("target", ["SM80", "SM86"])
def test_gpus_without_fp8_are_refused(target: str) -> None:
    model = lower_native_fp8(one_layer(SMALL, HEADS, 64), SMALL, [some_scales(64)])
    ok, said = built(model, [target])
    assert not ok
    sentence = f"target(s) {target.lower()}, because the model contains HW-specific datatypes"
    assert sentence in said.errors[0] and "fp8_e4m3" in said.errors[0]


def test_each_cache_is_copied_once_at_the_shape_of_8b() -> None:
    """The copy joins cache and block; nothing is transposed, for the kernel reads token order."""
    ring, heads, head_dim = Ring(256, 1196, 1, 30), 24, 128
    model = lower_native_fp8(one_layer(ring, heads, head_dim), ring, [some_scales(128, heads)])
    ok, said = built(model, ["SM89", "SM120"])
    assert ok, said.errors
    keys = ring.tokens + ring.block_tokens
    caches, block = 2 * keys * heads * head_dim, ring.block_tokens * heads * head_dim
    # q as FP8 and the result as bf16 besides, and a megabyte for the mask.
    assert caches < said.number("Total Activation Memory") < caches + 3 * block + (1 << 20)
    (line,) = said.attention()
    strides = re.findall(r"Strides: \[([\d,]*)\]", line.split("Constants:")[0])
    assert f"{head_dim},1,{heads * head_dim}" in strides, "K, by channel and token"
    assert f"{head_dim},{heads * head_dim},1" in strides, "V, by token and channel"


def planted(change: Callable[[ModelProto], None]) -> Messages:
    model = lower_native_fp8(one_layer(SMALL, HEADS, 64), SMALL, [some_scales(64)])
    change(model)
    ok, said = built(model, ["SM89"])
    assert not ok and said.errors
    return said


def test_the_kernel_takes_no_scale_per_head() -> None:
    """Why the scales are folded. If this builds one day, they need not be."""

    def per_head(model: ModelProto) -> None:
        bits = np.full(HEADS, 0x3F80, np.uint16).tobytes()
        scale = helper.make_tensor("per_head", TensorProto.BFLOAT16, [HEADS], bits, raw=True)
        model.graph.initializer.append(scale)
        node = next(n for n in model.graph.node if n.output[0] == "out.k.codes.values")
        node.input[1] = "per_head"
        node.attribute.append(helper.make_attribute("axis", 1))

    assert "Mismatched type" in planted(per_head).errors[0]


def test_the_kernel_takes_no_scales_in_float32() -> None:
    def in_float(model: ModelProto) -> None:
        for constant in model.graph.initializer:
            if constant.data_type == TensorProto.BFLOAT16:
                wide = numpy_helper.to_array(constant).astype(np.float32)
                constant.CopyFrom(numpy_helper.from_array(wide, constant.name))

    assert "not supported by a dedicated kernel" in planted(in_float).errors[0]


def test_kv_cache_update_takes_no_fp8() -> None:
    """Why caches are concatenated instead."""
    messages = Messages()
    builder = trt.Builder(messages)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    cache, update = (
        network.add_input(name, trt.DataType.FP8, (1, 2, tokens, 64))
        for name, tokens in (("cache", 64), ("update", 16))
    )
    where = network.add_input("where", trt.DataType.INT32, (1,))
    layer = network.add_kv_cache_update(cache, update, where, trt.KVCacheMode.LINEAR)
    network.mark_output(layer.get_output(0))
    builder.build_serialized_network(network, builder.create_builder_config())
    assert any("cache has type FP8 but must have type Float, Half, or BFloat16" in error
               for error in messages.errors)  # fmt: skip
