"""One op, every facet, every ring case.

Reference, torch, portable ONNX and the in-place lowering must be one function.

Accuracy rule: against float64, a facet may err at most twice as much as a plain implementation in
the same precision.
"""

import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from aapt_deploy.backends.ort import lower
from aapt_deploy.errors import BundleError
from aapt_deploy.ops.block_causal_attention import (
    DOMAIN,
    NAME,
    NEXT,
    SLOT,
    VALID,
    Ring,
    onnx_function,
    reference,
    softmax_scale,
    torch_op,
)
from aapt_deploy.profiles import load, preset_folder

Array = NDArray[np.float32]
Attend = Callable[
    [Array, Array, Array, Array, Array, NDArray[np.int32]], tuple[Array, Array, Array]
]

HEADS, HEAD_DIM = 2, 8
PASSES = 2  # the first pass of each block has other k, v and must leave no trace
INPUTS = ("q", "k", "v", "k_cache.00", "v_cache.00", "cache_len")
OUTPUTS = ("out", "k_block.00", "v_block.00")
RINGS = [Ring(text, 5, sink, window) for text in (0, 3) for sink in (0, 1) for window in (1, 3)]
ring_cases = pytest.mark.parametrize(
    "ring", RINGS, ids=lambda r: f"text{r.text_tokens}-sink{r.sink_blocks}-window{r.window_blocks}"
)


# --- the stream: what each pass brings, and the truth computed from a dense mask ---


class Stream:
    """Random q, k, v of every pass of a rollout, exactly representable in `dtype`.

    The rollout fills the ring and wraps it at least twice.
    """

    def __init__(self, ring: Ring, dtype: torch.dtype = torch.float32) -> None:
        self.ring, self.blocks = ring, 3 * ring.window_blocks + 2
        noise = torch.randn(
            self.blocks,
            PASSES,
            3,
            1,
            ring.block_tokens,
            HEADS,
            HEAD_DIM,
            generator=torch.Generator().manual_seed(1),
        )
        text = torch.randn(
            2, 1, ring.text_tokens, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(2)
        )
        self.passes: Array = noise.to(dtype).float().numpy()  # [block, pass, q|k|v, 1, T, H, D]
        self.text: Array = text.to(dtype).float().numpy()

    def __iter__(self) -> Iterator[tuple[int, int, Array, Array, Array]]:
        for block, run in itertools.product(range(self.blocks), range(PASSES)):
            yield block, run, *self.passes[block, run]

    def whole(self, block: int, run: int) -> tuple[Array, Array, NDArray[np.bool_]]:
        """Return keys and values of the whole clip as pass `run` of `block` knows them.

        The third result says which of these tokens it may see.
        """
        _, keys, values = self.passes[:, PASSES - 1].swapaxes(0, 1).copy()  # [block, 1, T, H, D]
        keys[block], values[block] = self.passes[block, run, 1:]
        seen = np.isin(np.arange(self.blocks), self.ring.visible(block)).repeat(
            self.ring.block_tokens
        )
        mask = np.concatenate([np.ones(self.ring.text_tokens, bool), seen])
        return (
            np.concatenate([self.text[0], *keys], 1),
            np.concatenate([self.text[1], *values], 1),
            mask,
        )

    def attend(self, dtype: torch.dtype) -> list[Array]:
        """Attention of every pass under the dense mask, in plain operations of `dtype`."""
        outs = []
        for block, run, q, _, _ in self:
            keys, values, mask = self.whole(block, run)
            heads = (torch.from_numpy(x).to(dtype).transpose(1, 2) for x in (q, keys, values))
            qh, kh, vh = heads  # [1, H, ., D]
            scores = (qh @ kh.transpose(-1, -2)) * softmax_scale(HEAD_DIM)
            weights = scores.masked_fill(~torch.from_numpy(mask), -torch.inf).softmax(-1)
            outs.append((weights @ vh).transpose(1, 2).double().numpy())
        return outs


def assert_accurate(
    stream: Stream, outs: list[Array], dtype: torch.dtype, atol: float = 1e-7
) -> None:
    truth, plain = stream.attend(torch.float64), stream.attend(dtype)
    assert len(outs) == len(truth) == stream.blocks * PASSES
    error, allowed = (
        max(float(np.abs(a - b).max()) for a, b in zip(x, truth, strict=True))
        for x in (outs, plain)
    )
    assert error <= 2 * allowed + atol, f"{error=:.2e} {allowed=:.2e}"


def rollout(stream: Stream, attend: Attend) -> list[Array]:
    """Roll out alias-free; a pass that is not the block's last is not committed.

    Unused cache rows hold NaN: nobody may read them.
    """
    ring = stream.ring
    caches = np.full((2, 1, ring.tokens, HEADS, HEAD_DIM), np.nan, np.float32)
    caches[:, :, : ring.text_tokens] = stream.text
    outs = []
    for block, run, q, k, v in stream:
        place, before = ring.place(block), caches.copy()
        out, k_block, v_block = attend(
            q, k, v, caches[0], caches[1], np.array([place.cache_len], np.int32)
        )
        np.testing.assert_array_equal(caches, before, "the caches are read-only")
        np.testing.assert_array_equal(k_block, k)
        np.testing.assert_array_equal(v_block, v)
        if run == PASSES - 1:
            caches[:, :, place.slot : place.slot + ring.block_tokens] = k_block, v_block
        outs.append(out)
    return outs


# --- the facets ---


def attention_model(ring: Ring, cache_type: int = TensorProto.FLOAT) -> ModelProto:
    """One bare node, as an export leaves it."""
    block, cache = [1, ring.block_tokens, HEADS, HEAD_DIM], [1, ring.tokens, HEADS, HEAD_DIM]
    kinds = [
        *[(TensorProto.FLOAT, block)] * 3,
        *[(cache_type, cache)] * 2,
        (TensorProto.INT32, [1]),
    ]
    node = helper.make_node(
        NAME,
        INPUTS,
        OUTPUTS,
        domain=DOMAIN,
        scale=softmax_scale(HEAD_DIM),
        plugin_namespace="aapt",
        plugin_version="1",
        name="attention",
    )
    graph = helper.make_graph(
        [node],
        "generator",
        [
            helper.make_tensor_value_info(name, *kind)
            for name, kind in zip(INPUTS, kinds, strict=True)
        ],
        [
            helper.make_tensor_value_info(name, kind, block)
            for name, kind in zip(OUTPUTS, [TensorProto.FLOAT, cache_type, cache_type], strict=True)
        ],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )


def session(model: ModelProto, **options: object) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    for name, value in options.items():
        setattr(settings, name, value)
    return ort.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )


def torch_facet(dtype: torch.dtype) -> Attend:
    def attend(*arrays: Array) -> tuple[Array, Array, Array]:
        tensors = [torch.from_numpy(x).to(dtype) for x in arrays[:5]]
        out, k_block, v_block = torch_op.block_causal_attention(
            *tensors, torch.from_numpy(arrays[5])
        )
        assert out.dtype == k_block.dtype == v_block.dtype == dtype
        return out.float().numpy(), k_block.float().numpy(), v_block.float().numpy()

    return attend


def onnxruntime_facet(ring: Ring) -> Attend:
    portable = session(onnx_function.attach(attention_model(ring)))
    return lambda *arrays: portable.run(OUTPUTS, dict(zip(INPUTS, arrays, strict=True)))


def onnx_reference_facet(ring: Ring) -> Attend:
    evaluator = onnx.reference.ReferenceEvaluator(onnx_function.attach(attention_model(ring)))
    return lambda *arrays: evaluator.run(OUTPUTS, dict(zip(INPUTS, arrays, strict=True)))


class InPlace:
    """The lowered graph with each cache bound once, as its own input and output."""

    def __init__(self, ring: Ring, alias: bool = True, **options: object) -> None:
        self.ring = ring.with_in_place(True)
        self.session = session(
            lower.lower_in_place(attention_model(ring), self.ring), log_severity_level=3, **options
        )
        cache = np.full((1, self.ring.tokens, HEADS, HEAD_DIM), 3e3, np.float32)
        block = np.zeros((1, ring.block_tokens, HEADS, HEAD_DIM), np.float32)
        self.arrays = {name: block.copy() for name in ("q", "k", "v", "out")} | {
            name: np.zeros(1, np.int64) for name in (SLOT, VALID)
        }
        self.arrays |= {"k_cache.00": cache, "v_cache.00": cache.copy()}
        self.values = {
            name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self.arrays.items()
        }
        self.binding = self.session.io_binding()
        for name in (i.name for i in self.session.get_inputs()):
            self.binding.bind_ortvalue_input(name, self.values[name])
        for name in (o.name for o in self.session.get_outputs()):
            source = self.values[name.removesuffix(NEXT)]
            other = (
                source
                if alias or not name.endswith(NEXT)
                else ort.OrtValue.ortvalue_from_numpy(np.empty_like(source.numpy()))
            )
            self.binding.bind_ortvalue_output(name, other)

    def __call__(self, block: int, q: Array, k: Array, v: Array) -> Array:
        place = self.ring.place(block)
        for name, value in {"q": q, "k": k, "v": v, SLOT: place.slot, VALID: place.valid}.items():
            self.arrays[name][:] = value
        self.session.run_with_iobinding(self.binding)
        return self.arrays["out"].copy()

    def rollout(self, stream: Stream) -> list[Array]:
        (
            self.arrays["k_cache.00"][:, : self.ring.text_tokens],
            self.arrays["v_cache.00"][:, : self.ring.text_tokens],
        ) = stream.text
        return [self(block, q, k, v) for block, _, q, k, v in stream]


# --- agreement of all facets over all ring cases ---


@ring_cases
def test_reference_is_the_dense_mask(ring: Ring) -> None:
    stream = Stream(ring)
    for out, truth in zip(
        rollout(stream, reference.block_causal_attention), stream.attend(torch.float64), strict=True
    ):
        assert out.dtype == np.float64
        np.testing.assert_allclose(out, truth, rtol=0, atol=1e-14)


@ring_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_torch_op(ring: Ring, dtype: torch.dtype) -> None:
    stream = Stream(ring, dtype)
    assert_accurate(stream, rollout(stream, torch_facet(dtype)), dtype)


@ring_cases
@pytest.mark.parametrize("facet", [onnxruntime_facet, onnx_reference_facet])
def test_portable_function(ring: Ring, facet: Callable[[Ring], Attend]) -> None:
    stream = Stream(ring)
    assert_accurate(stream, rollout(stream, facet(ring)), torch.float32)


@ring_cases
def test_in_place_lowering(ring: Ring) -> None:
    stream = Stream(ring)
    assert_accurate(stream, InPlace(ring).rollout(stream), torch.float32)


@pytest.mark.parametrize("facet", ["reference", "torch", "portable"])
def test_half_precision_cache_below_single_precision_queries(facet: str) -> None:
    """The block leaves in the cache's dtype and the stored one is read back.

    Values that fp16 holds exactly lose nothing on the way.
    """
    ring = RINGS[-1]
    stream = Stream(ring, torch.float16)
    portable = session(onnx_function.attach(attention_model(ring, TensorProto.FLOAT16)))

    def attend(*arrays: Array) -> tuple[Array, Array, Array]:
        q, k, v, k_cache, v_cache, cache_len = arrays
        args = (q, k, v, k_cache.astype(np.float16), v_cache.astype(np.float16), cache_len)
        if facet == "reference":
            out, *blocks = reference.block_causal_attention(*args)
        elif facet == "torch":
            out, *blocks = (
                x.numpy() for x in torch_op.block_causal_attention(*map(torch.from_numpy, args))
            )
        else:
            out, *blocks = portable.run(OUTPUTS, dict(zip(INPUTS, args, strict=True)))
        assert [x.dtype for x in blocks] == [np.float16, np.float16]
        return out, *blocks

    assert_accurate(stream, rollout(stream, attend), torch.float32)


def test_torch_op_is_well_formed() -> None:
    ring = RINGS[-1]
    _, _, q, k, v = next(iter(Stream(ring)))
    args = (
        [torch.from_numpy(x) for x in (q, k, v)]
        + [torch.zeros(1, ring.tokens, HEADS, HEAD_DIM)] * 2
        + [torch.tensor([4], dtype=torch.int32)]
    )
    torch.library.opcheck(torch_op.operator, args, test_utils=("test_schema", "test_faketensor"))


# --- slot arithmetic ---

SHAPES = [
    Ring(*shape)
    for shape in itertools.product((0, 1, 7), (1, 4), (0, 1, 2), (1, 2, 5), (False, True))
]


def play(ring: Ring) -> None:
    """Play the cache as a list of block indices: text is -1, an unwritten token None."""
    text = [-1] * ring.text_tokens
    cache: list[int | None] = [*text, *[None] * (ring.tokens - ring.text_tokens)]
    for block in range(5 * ring.ring_blocks + 2):
        seen = [
            j for j in range(block + 1) if j < ring.sink_blocks or block - j <= ring.window_blocks
        ]  # the definition, word for word
        assert ring.visible(block) == seen
        own, place = [block] * ring.block_tokens, ring.place(block)
        past = [j for j in seen[:-1] for _ in own]
        assert place.valid == place.cache_len + ring.block_tokens
        if not ring.in_place:
            assert sorted(cache[: place.cache_len]) == [*text, *past]
        for _ in range(PASSES):
            cache[place.slot : place.slot + ring.block_tokens] = own
        assert len(cache) == ring.tokens, "a block was written past the end"
        if ring.in_place:
            assert sorted(cache[: place.valid]) == [*text, *past, *own]


def test_the_valid_prefix_holds_exactly_the_visible_blocks() -> None:
    assert len(SHAPES) == 108
    for ring in SHAPES:
        play(ring)


def test_a_stream_may_run_for_years() -> None:
    first = 10**9
    for ring in SHAPES:
        places = [ring.place(first + i) for i in range(ring.ring_blocks)]
        start = ring.text_tokens + ring.sink_blocks * ring.block_tokens
        slots = list(range(start, ring.tokens, ring.block_tokens))
        assert sorted(p.slot for p in places) == slots, ring
        assert {p.cache_len for p in places} == {ring.with_in_place(False).tokens}, ring
        assert ring.place(first + ring.ring_blocks) == places[0], ring
        recent = range(first - ring.window_blocks, first + 1)
        assert ring.visible(first) == [*range(ring.sink_blocks), *recent], ring


@pytest.mark.parametrize("name", [p.stem for p in sorted(preset_folder().glob("*.toml"))])
def test_ring_of_a_profile(name: str) -> None:
    profile = load(name)
    assert Ring.of(profile).tokens == profile.cache_tokens
    assert Ring.of(profile, in_place=True).tokens == profile.cache_tokens + profile.block_tokens


def test_a_block_before_the_stream_is_refused() -> None:
    for method in (RINGS[0].place, RINGS[0].visible):
        with pytest.raises(AssertionError, match="block=-1"):
            method(-1)


# --- nothing copies the cache ---


def test_the_commit_writes_its_slot_and_nothing_else() -> None:
    ring = RINGS[-1]
    stream, engine = Stream(ring), InPlace(ring)
    engine.rollout(stream)  # a full ring
    addresses = [engine.arrays[name].ctypes.data for name in ("k_cache.00", "v_cache.00")]
    before = [engine.arrays[name].copy() for name in ("k_cache.00", "v_cache.00")]
    _, _, q, k, v = next(iter(stream))
    engine(stream.blocks, q, k, v)
    slot = engine.ring.place(stream.blocks).slot
    for name, old, new in zip(("k_cache.00", "v_cache.00"), before, (k, v), strict=True):
        old[:, slot : slot + ring.block_tokens] = new
        np.testing.assert_array_equal(engine.arrays[name], old)
    outputs = dict(
        zip(
            (o.name for o in engine.session.get_outputs()),
            engine.binding.get_outputs(),
            strict=True,
        )
    )
    assert [outputs[name + NEXT].data_ptr() for name in ("k_cache.00", "v_cache.00")] == addresses


def commit_us(folder: Path, window_frames: int, alias: bool) -> float:
    """Fastest TensorScatter of 30 steps, by ONNX Runtime's own profile."""
    ring = Ring(0, 64, 1, window_frames)
    engine = InPlace(
        ring,
        alias=alias,
        enable_profiling=True,
        profile_file_prefix=str(folder / f"{window_frames}-{alias}"),
    )
    for _ in range(30):
        engine(0, *np.zeros((3, 1, ring.block_tokens, HEADS, HEAD_DIM), np.float32))
    events = json.loads(Path(engine.session.end_profiling()).read_text())
    times = [
        e["dur"]
        for e in events
        if e.get("args", {}).get("op_name") == "TensorScatter" and e["name"].endswith("kernel_time")
    ]
    assert len(times) == 60
    return float(min(times))


def test_the_commit_costs_the_same_for_a_cache_16_times_as_long(tmp_path: Path) -> None:
    """With a control: without the shared buffer the same graph copies.

    This measurement sees it.
    """
    small, large = (commit_us(tmp_path, frames, alias=True) for frames in (62, 16 * 64 - 2))
    copied = commit_us(tmp_path, 16 * 64 - 2, alias=False)
    assert large < 4 * max(small, 5.0), f"{small=} us, {large=} us"
    assert copied > 10 * max(large, 5.0), f"{copied=} us, {large=} us"


def test_the_lowered_graph_is_only_the_work_itself(tmp_path: Path) -> None:
    InPlace(RINGS[-1], optimized_model_filepath=str(tmp_path / "optimized.onnx"))
    nodes = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert sorted(nodes) == ["Attention", *["Reshape"] * 4, *["TensorScatter"] * 2]


# --- from torch to files ---


class TwoLayers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.ModuleList(
            torch.nn.Linear(HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM) for _ in range(2)
        )

    def forward(
        self, x: torch.Tensor, cache_len: torch.Tensor, *caches: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        blocks = []
        for i, qkv in enumerate(self.qkv):
            q, k, v = qkv(x).unflatten(-1, (3 * HEADS, HEAD_DIM)).chunk(3, dim=2)  # [1, T, H, D]
            out, *block = torch_op.block_causal_attention(
                q, k, v, *caches[2 * i : 2 * i + 2], cache_len
            )
            x = x + out.flatten(2)
            blocks += block
        return x, *blocks


@pytest.fixture(scope="module")
def exported() -> tuple[TwoLayers, tuple[torch.Tensor, ...], ModelProto]:
    torch.manual_seed(0)
    ring = RINGS[-1]
    module = TwoLayers().eval()
    x = torch.randn(1, ring.block_tokens, HEADS * HEAD_DIM)
    args = (
        x,
        torch.tensor([8], dtype=torch.int32),
        *torch.randn(4, 1, ring.tokens, HEADS, HEAD_DIM),
    )
    caches, blocks = (
        [f"{kind}_{what}.{i:02}" for i in range(2) for kind in "kv"] for what in ("cache", "block")
    )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated", FutureWarning
        )  # torch's own code
        program = torch.onnx.export(
            module,
            args,
            dynamo=True,
            opset_version=24,
            verbose=False,
            input_names=["x", "cache_len", *caches],
            output_names=["y", *blocks],
        )
    assert program is not None
    return module, args, program.model_proto


def test_export_leaves_one_node_per_layer(
    exported: tuple[TwoLayers, tuple[torch.Tensor, ...], ModelProto],
) -> None:
    module, args, bare = exported
    nodes = [node for node in bare.graph.node if node.op_type == NAME]
    assert len(nodes) == 2 and {node.domain for node in nodes} == {DOMAIN}
    for node in nodes:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert attributes == {
            "scale": pytest.approx(softmax_scale(HEAD_DIM)),
            "plugin_namespace": b"aapt",
            "plugin_version": b"1",
        }
    portable = onnx_function.attach(bare)
    onnx.checker.check_model(portable, full_check=True)
    runner = session(portable)
    got = runner.run(
        None, {i.name: x.numpy() for i, x in zip(runner.get_inputs(), args, strict=True)}
    )
    with torch.no_grad():
        for expected, array in zip(module(*args), got, strict=True):
            np.testing.assert_allclose(array, expected.numpy(), rtol=0, atol=2e-6)


def test_lowering_renames_only_what_the_cache_needs(
    exported: tuple[TwoLayers, tuple[torch.Tensor, ...], ModelProto],
) -> None:
    module, args, bare = exported
    ring = RINGS[-1].with_in_place(True)
    before = bare.SerializeToString(deterministic=True)
    lowered = lower.lower_in_place(onnx_function.attach(bare), ring)
    assert bare.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(lowered, full_check=True)
    caches = ["k_cache.00", "v_cache.00", "k_cache.01", "v_cache.01"]
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*lowered.graph.input, *lowered.graph.output)
    }
    assert [v.name for v in lowered.graph.input] == ["x", SLOT, VALID, *caches]
    assert [v.name for v in lowered.graph.output] == ["y", *(name + NEXT for name in caches)]
    assert all(
        shapes[name] == shapes[name + NEXT] == [1, ring.tokens, HEADS, HEAD_DIM] for name in caches
    )
    scales = [
        a.f
        for node in lowered.graph.node
        if node.op_type == "Attention"
        for a in node.attribute
        if a.name == "scale"
    ]
    assert scales == [pytest.approx(softmax_scale(HEAD_DIM))] * 2
    assert not lowered.functions and DOMAIN not in {entry.domain for entry in lowered.opset_import}

    place = ring.place(1)  # 8 cached tokens: text and sink, as the example arguments have it
    feeds = {"x": args[0].numpy(), SLOT: np.array([place.slot]), VALID: np.array([place.valid])}
    pad = np.full((1, ring.block_tokens, HEADS, HEAD_DIM), 3e3, np.float32)
    feeds |= {
        name: np.concatenate([cache.numpy(), pad], 1)
        for name, cache in zip(caches, args[2:], strict=True)
    }
    with torch.no_grad():
        y, *blocks = module(*args)
    got, *after = session(lowered, log_severity_level=3).run(None, feeds)
    np.testing.assert_allclose(got, y.numpy(), rtol=0, atol=2e-6)
    for array, block in zip(after, blocks, strict=True):
        np.testing.assert_allclose(
            array[:, place.slot : place.valid], block.numpy(), rtol=0, atol=2e-6
        )


def test_a_stripped_graph_has_no_slow_body_to_fall_back_to() -> None:
    bare = attention_model(RINGS[0])
    attached = onnx_function.attach(bare)
    attached.functions.append(
        onnx.parser.parse_function(
            '<domain: "other", opset_import: ["": 24]> Same (x) => (y) { y = Identity(x) }'
        )
    )
    stripped = onnx_function.strip(attached)
    assert [f.domain for f in stripped.functions] == ["other"] and len(attached.functions) == 2
    assert len(onnx_function.attach(attached).functions) == 2, (
        "attaching again must not double the function"
    )
    with pytest.raises(Exception, match=f"{DOMAIN}:{NAME}"):
        session(bare)


# --- refusals ---


def misfits() -> dict[str, tuple[ModelProto, str]]:
    """Graphs that RINGS[0] cannot lower, with the reason they must be given."""
    ring = RINGS[0]
    opset, empty, cache, block, length = (attention_model(ring) for _ in range(5))
    opset.opset_import[0].version = 23
    del empty.graph.node[:]
    for model, name in ((cache, "k_cache.00"), (block, "v_block.00"), (length, "cache_len")):
        model.graph.node.append(helper.make_node("Identity", [name], ["spy"]))
    return {
        "opset": (opset, "is of opset 23, not 24"),
        "empty": (empty, f"no {DOMAIN}::{NAME} node"),
        "cache": (cache, "'k_cache.00', which is not a graph input of its own"),
        "block": (block, "'v_block.00', which is not a graph output alone"),
        "length": (length, r"\['cache_len'\], not from one graph input"),
        "type": (attention_model(ring, TensorProto.FLOAT16), "of FLOAT16"),
        "ring": (
            attention_model(RINGS[-1]),
            rf"\(1, {RINGS[-1].tokens}, 2, 8\).*\[1, {ring.tokens}, heads",
        ),
    }


@pytest.mark.parametrize("name", misfits())
def test_a_graph_that_cannot_be_lowered_says_why(name: str) -> None:
    model, reason = misfits()[name]
    with pytest.raises(BundleError, match=reason) as refused:
        lower.lower_in_place(model, RINGS[0].with_in_place(True))
    assert "export the checkpoint again" in refused.value.hint


def test_the_portable_body_needs_its_opset() -> None:
    with pytest.raises(BundleError, match="opset 23, not 24"):
        onnx_function.attach(misfits()["opset"][0])


# --- under autocast, on a CPU ---


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_attention_under_autocast_is_that_of_float32_within_its_rounding(
    narrow: torch.dtype,
) -> None:
    """Queries of size 2 make the scale matter: without it the softmax would pick one key."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 33, 64, generator=rng) * size for size in (2, 2, 1))
    exact = torch_op.softmax_attention(q.double(), k.double(), v.double())
    plain = torch_op.softmax_attention(q.to(narrow), k.to(narrow), v.to(narrow))
    with torch.autocast("cpu", narrow):
        found = torch_op.softmax_attention(q, k, v)
    assert found.dtype == plain.dtype == narrow
    errors = [float((out.double() - exact).abs().max()) for out in (found, plain)]
    assert 0 < errors[0] <= 2 * errors[1] < 0.2


def test_values_narrower_than_the_queries_are_widened_before_they_are_read() -> None:
    """As under autocast, where q and k were normalised and rotated in float32 and v was not."""
    rng = torch.Generator().manual_seed(0)
    q, k, v, k_past, v_past = (torch.randn(1, 6, HEADS, HEAD_DIM, generator=rng) for _ in range(5))
    half = [x.bfloat16() for x in (v, k_past, v_past)]
    found = torch_op.attend_to(q, k, *half)
    wanted = torch_op.attend_to(q, k, *(x.float() for x in half))
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
