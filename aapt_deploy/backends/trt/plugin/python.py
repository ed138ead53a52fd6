"""BlockCausalAttention as a TensorRT plugin: a Python `IPluginV3` that launches our CUDA kernels on TensorRT's stream.

TensorRT asks it for shapes and types while building, and for launches while running; under a captured CUDA graph the launches happen once, at
capture. It owns no device memory: everything a kernel reads is an input of the node, scales included, and TensorRT keeps those as constants.

    token_major   inputs  q, k, v, k_cache, v_cache, cache_len                                     bf16; the op's own six
    hopper_fp8    inputs  the same six, then q_scale [H], k_scale [H], v_scale [H, D], k_mean [H, D]   float32
                  caches  e4m3 bytes, as FP8 [H, tiles, 64 * D] or packed as INT32 [H, tiles, 16 * D]; plugins take no UINT8
    outputs       out like q; k_block, v_block like the cache, with a block's own length

The layout shows in the inputs, so the plugin's one field is the op's `scale`, which is checked and not used: the kernels know 1 / sqrt(D).

What it deliberately does not do: compile, load or describe kernels (a `Launcher` does), alias a cache (the runtime commits blocks), or accept a
type or shape that the kernels were not made for. TensorRT prints an exception that leaves a plugin and goes on; every one is therefore kept in
`Creator.failures`, where the builder and the runtime look for the reason when TensorRT gives up.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn, ParamSpec, Protocol, TypeVar

import numpy as np
import tensorrt as trt

from aapt_deploy.errors import BundleError, MachineError
from aapt_deploy.ops.block_causal_attention import (
    NAME,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    softmax_scale,
)
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import HEAD_DIMS, TILE_KEYS

INPUTS = {"token_major": 6, "hopper_fp8": 10}  # of the node, by layout
SCALE_FIELD = "scale"

PACK, ATTEND = "aapt_pack", "aapt_attend"  # hopper_fp8
ATTEND_TOKEN_MAJOR = "aapt_attend_token_major"


class Launcher(Protocol):
    """Queues one kernel on `stream`: device addresses in the order of the kernel's parameters (inputs, int32 numbers, outputs).

        aapt_pack                (k, v, k_scale, k_mean, v_scale | T, H | k_block, v_block)
        aapt_attend              (q, k_block, v_block, k_cache, v_cache, cache_len, q_scale, k_scale, v_scale | T, H, cache_tiles | out)
        aapt_attend_token_major  (q, k, v, k_cache, v_cache, cache_len | T, H, S | out, k_block, v_block)

    It must not synchronise: it is called while a CUDA graph is being captured.
    """

    def __call__(
        self,
        kernel: str,
        inputs: Sequence[int],
        numbers: Sequence[int],
        outputs: Sequence[int],
        stream: int,
    ) -> None: ...


Launchers = Callable[
    [str, int], Launcher
]  # (layout, head_dim) -> its kernels, loaded; called before any launch, so never inside a capture


class Sizes(NamedTuple):
    """What a node's inputs say about one layer."""

    layout: str
    tokens: int  # T
    heads: int  # H
    head_dim: int  # D
    cache: int  # token_major: tokens S; hopper_fp8: tiles per head


def sizes(shapes: Sequence[Sequence[int]]) -> Sizes:
    """The sizes that the shapes of a node's inputs mean. Raises BundleError when they are no BlockCausalAttention, or not static."""
    layout = next((name for name, count in INPUTS.items() if count == len(shapes)), None)
    if layout is None:
        _refuse(
            f"has {len(shapes)} inputs; {' or '.join(f'{count} ({name})' for name, count in INPUTS.items())} are known"
        )
    q, k, v, k_cache, v_cache, cache_len, *scales = (tuple(shape) for shape in shapes)
    if any(
        extent < 1 for shape in (q, k, v, k_cache, v_cache, cache_len, *scales) for extent in shape
    ):
        _refuse(
            f"has inputs of the shapes {[tuple(shape) for shape in shapes]}; every extent must be known and positive"
        )
    if len(q) != 4 or q[0] != 1 or not q == k == v or k_cache != v_cache or cache_len != (1,):
        _refuse(f"has q {q}, k {k}, v {v}, caches {k_cache} and {v_cache}, cache_len {cache_len}")
    _, tokens, heads, head_dim = q
    if layout == "token_major":
        fits = len(k_cache) == 4 and k_cache[::2] == (1, heads) and k_cache[3] == head_dim
        if not fits:
            _refuse(f"has caches {k_cache} for q {q}; token_major is [1, S, {heads}, {head_dim}]")
        return Sizes(layout, tokens, heads, head_dim, k_cache[1])
    if head_dim not in HEAD_DIMS:
        _refuse(
            f"has head_dim {head_dim}; hopper_fp8 has kernels for {' and '.join(map(str, HEAD_DIMS))}"
        )
    row = TILE_KEYS * head_dim
    if len(k_cache) != 3 or k_cache[0] != heads or k_cache[2] not in (row, row // 4):
        _refuse(
            f"has caches {k_cache} for q {q}; hopper_fp8 is FP8 [{heads}, tiles, {row}] or INT32 [{heads}, tiles, {row // 4}]"
        )
    if [*scales] != [(heads,), (heads,), (heads, head_dim), (heads, head_dim)]:
        _refuse(f"has scales of the shapes {scales} for q {q}")
    return Sizes(layout, tokens, heads, head_dim, k_cache[1])


def dtypes(layout: str, packed: bool) -> list[trt.DataType]:
    """The only types of inputs and outputs that the kernels read and write. `packed`: FP8 bytes travel as INT32."""
    real, cache = trt.DataType.BF16, trt.DataType.BF16
    if layout == "hopper_fp8":
        cache = trt.DataType.INT32 if packed else trt.DataType.FP8
    scales = [trt.DataType.FLOAT] * (INPUTS[layout] - INPUTS["token_major"])
    return [real, real, real, cache, cache, trt.DataType.INT32, *scales, real, cache, cache]


def launches(
    size: Sizes, inputs: Sequence[int], outputs: Sequence[int]
) -> list[tuple[str, list[int], list[int], list[int]]]:
    """The kernels of one layer in order, each with (inputs, numbers, outputs)."""
    q, k, v, k_cache, v_cache, cache_len, *scales = inputs
    out, k_block, v_block = outputs
    if size.layout == "token_major":
        return [
            (
                ATTEND_TOKEN_MAJOR,
                [q, k, v, k_cache, v_cache, cache_len],
                [size.tokens, size.heads, size.cache],
                [out, k_block, v_block],
            )
        ]
    q_scale, k_scale, v_scale, k_mean = scales
    return [
        (PACK, [k, v, k_scale, k_mean, v_scale], [size.tokens, size.heads], [k_block, v_block]),
        (
            ATTEND,
            [q, k_block, v_block, k_cache, v_cache, cache_len, q_scale, k_scale, v_scale],
            [size.tokens, size.heads, size.cache],
            [out],
        ),
    ]


def _refuse(what: str) -> NoReturn:
    raise BundleError(
        f"a {PLUGIN_NAMESPACE}::{NAME} node {what}",
        "export the bundle and build the engine again with this version of aapt_deploy",
    )


P = ParamSpec("P")
R = TypeVar("R")


def _kept(method: Callable[P, R]) -> Callable[P, R]:
    """Keep what a callback raises before TensorRT turns it into "-1"."""

    @functools.wraps(method)
    def keeping(*arguments: P.args, **keywords: P.kwargs) -> R:
        try:
            return method(*arguments, **keywords)
        except Exception as error:
            owner = arguments[0]
            assert isinstance(owner, BlockCausalAttention | Creator)
            owner.failures.append(error)
            raise

    return keeping


class BlockCausalAttention(
    trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime
):
    """One node. TensorRT clones it freely; clones share the launchers and the list of failures."""

    def __init__(self, scale: float, launchers: Launchers, failures: list[Exception]) -> None:
        trt.IPluginV3.__init__(self)
        trt.IPluginV3OneCore.__init__(self)
        trt.IPluginV3OneBuild.__init__(self)
        trt.IPluginV3OneRuntime.__init__(self)
        self.plugin_name, self.plugin_namespace, self.plugin_version = (
            NAME,
            PLUGIN_NAMESPACE,
            PLUGIN_VERSION,
        )
        self.num_outputs = 3
        self.launchers, self.failures = launchers, failures
        self.launcher: Launcher | None = None
        self.size: Sizes | None = None
        # A PluginField points into an array that it does not own, and a collection into fields: all three live as long as the plugin.
        self.scale = np.array([scale], np.float32)
        self.fields = [trt.PluginField(SCALE_FIELD, self.scale, trt.PluginFieldType.FLOAT32)]
        self.collection = trt.PluginFieldCollection(self.fields)

    @_kept
    def clone(self) -> "BlockCausalAttention":
        twin = BlockCausalAttention(float(self.scale[0]), self.launchers, self.failures)
        twin.launcher, twin.size = self.launcher, self.size
        return twin

    def get_capability_interface(self, type: trt.PluginCapabilityType) -> "BlockCausalAttention":
        return self  # core, build and runtime in one object

    # While building

    @_kept
    def get_output_data_types(self, input_types: Sequence[trt.DataType]) -> list[trt.DataType]:
        return [input_types[0], input_types[3], input_types[4]]

    @_kept
    def get_output_shapes(
        self,
        inputs: Sequence[trt.DimsExprs],
        shape_inputs: Sequence[trt.DimsExprs],
        expr_builder: trt.IExprBuilder,
    ) -> list[trt.DimsExprs]:
        q, k, v, k_cache, v_cache = inputs[:5]
        if len(inputs) == INPUTS["token_major"]:
            return [_dims(q), _dims(k), _dims(v)]
        tiles = expr_builder.operation(
            trt.DimensionOperation.CEIL_DIV, k[1], expr_builder.constant(TILE_KEYS)
        )
        return [
            _dims(q),
            trt.DimsExprs([k_cache[0], tiles, k_cache[2]]),
            trt.DimsExprs([v_cache[0], tiles, v_cache[2]]),
        ]

    @_kept
    def supports_format_combination(
        self, pos: int, in_out: Sequence[trt.DynamicPluginTensorDesc], num_inputs: int
    ) -> bool:
        layout = next((name for name, count in INPUTS.items() if count == num_inputs), None)
        if layout is None:
            _refuse(f"has {num_inputs} inputs")
        packed = pos >= 3 and in_out[3].desc.type == trt.DataType.INT32
        found = in_out[pos].desc
        wanted = dtypes(layout, packed)[pos]
        return bool(
            found.format == trt.TensorFormat.LINEAR
            and (found.type == wanted or (pos == 3 and found.type in _cache_types(layout)))
        )

    @_kept
    def configure_plugin(
        self, in_: Sequence[trt.DynamicPluginTensorDesc], out: Sequence[trt.DynamicPluginTensorDesc]
    ) -> None:
        self._accept([entry.desc for entry in in_])

    @_kept
    def get_workspace_size(
        self, in_: Sequence[trt.DynamicPluginTensorDesc], out: Sequence[trt.DynamicPluginTensorDesc]
    ) -> int:
        return 0  # the block images that attention reads are outputs

    # While running

    @_kept
    def attach_to_context(
        self, resource_context: trt.IPluginResourceContext
    ) -> "BlockCausalAttention":
        return self.clone()

    @_kept
    def on_shape_change(
        self, in_: Sequence[trt.PluginTensorDesc], out: Sequence[trt.PluginTensorDesc]
    ) -> None:
        self.size = self._accept(in_)
        self.launcher = self.launchers(self.size.layout, self.size.head_dim)

    @_kept
    def enqueue(
        self,
        input_desc: Sequence[trt.PluginTensorDesc],
        output_desc: Sequence[trt.PluginTensorDesc],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        assert self.launcher is not None and self.size is not None, (
            "TensorRT ran the plugin before it told the shapes"
        )
        for kernel, reads, numbers, writes in launches(self.size, inputs, outputs):
            self.launcher(kernel, reads, numbers, writes, stream)

    def set_tactic(self, tactic: int) -> None:
        """There is one way to run."""

    def get_fields_to_serialize(self) -> trt.PluginFieldCollection:
        return self.collection

    def _accept(self, descs: Sequence[trt.PluginTensorDesc]) -> Sizes:
        size = sizes([tuple(desc.dims) for desc in descs])
        found = [desc.type for desc in descs]
        packed = found[3] == trt.DataType.INT32
        if (wanted := dtypes(size.layout, packed)[: len(found)]) != found:
            _refuse(
                f"has inputs of {', '.join(kind.name for kind in found)}; {size.layout} is {', '.join(kind.name for kind in wanted)}"
            )
        if size.layout == "hopper_fp8" and tuple(descs[3].dims)[2] != TILE_KEYS * size.head_dim // (
            4 if packed else 1
        ):
            _refuse(
                f"has caches {tuple(descs[3].dims)} of {found[3].name}, whose tiles are not {TILE_KEYS * size.head_dim} bytes"
            )
        if not math.isclose(self.scale[0], softmax_scale(size.head_dim), rel_tol=1e-6):
            _refuse(
                f"has scale {self.scale[0]}; the kernels compute with 1 / sqrt({size.head_dim})"
            )
        return size


def _cache_types(layout: str) -> list[trt.DataType]:
    return [dtypes(layout, packed)[3] for packed in (False, True)]


def _dims(like: trt.DimsExprs) -> trt.DimsExprs:
    return trt.DimsExprs([like[axis] for axis in range(len(like))])


class Creator(trt.IPluginCreatorV3One):
    """Makes the plugin for the parser (from the node's attributes) and for a plan (from its serialised fields)."""

    def __init__(self, launchers: Launchers) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_namespace, self.plugin_version = (
            NAME,
            PLUGIN_NAMESPACE,
            PLUGIN_VERSION,
        )
        self.launchers = launchers
        self.failures: list[Exception] = []  # of all plugins it made
        self.fields = [
            trt.PluginField(SCALE_FIELD, np.array([], np.float32), trt.PluginFieldType.FLOAT32)
        ]
        self.field_names = trt.PluginFieldCollection(self.fields)

    @_kept
    def create_plugin(
        self,
        name: str,
        field_collection: trt.PluginFieldCollection | trt.PluginFieldCollection_,
        phase: trt.TensorRTPhase,
    ) -> BlockCausalAttention:
        fields = [field_collection[index] for index in range(len(field_collection))]
        scale = next((field.data for field in fields if field.name == SCALE_FIELD), None)
        if scale is None or np.size(scale) != 1:
            _refuse(
                f"has no attribute {SCALE_FIELD!r}; it has {', '.join(field.name for field in fields) or 'none'}"
            )
        return BlockCausalAttention(float(np.ravel(scale)[0]), self.launchers, self.failures)


_REGISTERED: list[
    Creator
] = []  # TensorRT's registry is one for the process, and does not keep a Python creator alive


def register(launchers: Launchers) -> Creator:
    """Make the plugin known to TensorRT; before a graph is parsed and before a plan is opened. A second call replaces the launchers.

    Raises MachineError when TensorRT has no registry or another library has taken the name.
    """
    registry = trt.get_plugin_registry()
    if registry is None:
        raise MachineError(
            "TensorRT has no plugin registry",
            "install TensorRT's libraries: pip install 'aapt_deploy[tensorrt]'",
        )
    if _REGISTERED and registry.get_creator(NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE) is not None:
        _REGISTERED[0].launchers = launchers
        return _REGISTERED[0]
    creator = Creator(launchers)
    if not registry.register_creator(creator, PLUGIN_NAMESPACE):
        raise MachineError(
            f"another library has registered the TensorRT plugin {PLUGIN_NAMESPACE}::{NAME}, version {PLUGIN_VERSION}",
            "do not load it in this process",
        )
    _REGISTERED[:] = [creator]
    return creator
