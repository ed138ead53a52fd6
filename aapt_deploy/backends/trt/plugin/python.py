"""BlockCausalAttention as a TensorRT plugin in Python, which launches our CUDA kernels.

TensorRT calls it for shapes and types while building, and for launches while running. In a
captured CUDA graph the launches happen once, at capture. It has no device memory: everything a
kernel reads is an input of the node, scales included, which TensorRT keeps as constants.

    token_major   inputs  q, k, v, k_cache, v_cache, cache_len    bf16; the op's own six
    hopper_fp8    inputs  the same six, then q_scale [H], k_scale [H], v_scale [H, D],
                          k_mean [H, D]                           float32
                  caches  e4m3 bytes, as FP8 [H, tiles, 64 * D] or packed as INT32
                          [H, tiles, 16 * D]; plugins take no UINT8
    outputs       out like q; k_block, v_block like the cache, with a block's own length

The inputs imply the layout, so the plugin's one field is the op's `scale`. It is checked and not
used, because the kernels have 1 / sqrt(D).

It does not compile or load kernels (a `Launcher` does), alias a cache (the runtime commits blocks),
or accept a type or shape that the kernels were not made for. TensorRT prints an exception that
leaves a plugin, and continues. So every one is kept in `Creator.failures`, which builder and
runtime read when TensorRT gives up.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn, ParamSpec, Protocol, TypeVar

import numpy as np

from aapt_deploy.backends.trt import flavour
from aapt_deploy.errors import BundleError, MachineError
from aapt_deploy.ops.block_causal_attention import (
    NAME,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    softmax_scale,
)
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import HEAD_DIMS, TILE_KEYS

if TYPE_CHECKING:
    import tensorrt as trt
else:
    _, trt = flavour.bindings()  # the lean runtime has all that a plugin needs to run

INPUTS = {"token_major": 6, "hopper_fp8": 10}  # of the node, by layout
SCALE_FIELD = "scale"

PACK, ATTEND = "aapt_pack", "aapt_attend"  # hopper_fp8
ATTEND_TOKEN_MAJOR = "aapt_attend_token_major"


class Launcher(Protocol):
    """Queues one kernel on `stream`, without synchronising: a CUDA graph may be captured.

    Device addresses are in the order of the kernel's parameters (inputs | int32 numbers | outputs):

        aapt_pack                (k, v, k_scale, k_mean, v_scale | T, H | k_block, v_block)
        aapt_attend              (q, k_block, v_block, k_cache, v_cache, cache_len, q_scale,
                                  k_scale, v_scale | T, H, cache_tiles | out)
        aapt_attend_token_major  (q, k, v, k_cache, v_cache, cache_len | T, H, S
                                  | out, k_block, v_block)
    """

    def __call__(
        self, kernel: str, inputs: Sequence[int], numbers: Sequence[int],
        outputs: Sequence[int], stream: int,
    ) -> None: ...  # fmt: skip


# (layout, head_dim) -> its kernels, loaded; called before any launch, so never inside a capture.
Launchers = Callable[[str, int], Launcher]
Launch = tuple[str, list[int], list[int], list[int]]  # kernel, inputs, numbers, outputs


class Sizes(NamedTuple):
    """Sizes of one layer, by a node's inputs."""

    layout: str
    tokens: int  # T
    heads: int  # H
    head_dim: int  # D
    cache: int  # token_major: tokens S; hopper_fp8: tiles per head


def sizes(shapes: Sequence[Sequence[int]]) -> Sizes:
    """Read the sizes of a layer from the shapes of a node's inputs.

    Raises BundleError if they are not a BlockCausalAttention's, or not static.
    """
    layout = next((name for name, count in INPUTS.items() if count == len(shapes)), None)
    if layout is None:
        known = " or ".join(f"{count} ({name})" for name, count in INPUTS.items())
        _refuse(f"has {len(shapes)} inputs; {known} are known")
    q, k, v, k_cache, v_cache, cache_len, *scales = every = [tuple(shape) for shape in shapes]
    if any(extent < 1 for shape in every for extent in shape):
        _refuse(f"has inputs of the shapes {every}; every extent must be known and positive")
    if len(q) != 4 or q[0] != 1 or not q == k == v or k_cache != v_cache or cache_len != (1,):
        _refuse(f"has q {q}, k {k}, v {v}, caches {k_cache} and {v_cache}, cache_len {cache_len}")
    _, tokens, heads, head_dim = q
    has = f"has caches {k_cache} for q {q}"
    if layout == "token_major":
        fits = len(k_cache) == 4 and k_cache[::2] == (1, heads) and k_cache[3] == head_dim
        if not fits:
            _refuse(f"{has}; token_major is [1, S, {heads}, {head_dim}]")
        return Sizes(layout, tokens, heads, head_dim, k_cache[1])
    if head_dim not in HEAD_DIMS:
        known = " and ".join(map(str, HEAD_DIMS))
        _refuse(f"has head_dim {head_dim}; hopper_fp8 has kernels for {known}")
    row = TILE_KEYS * head_dim
    if len(k_cache) != 3 or k_cache[0] != heads or k_cache[2] not in (row, row // 4):
        forms = f"FP8 [{heads}, tiles, {row}] or INT32 [{heads}, tiles, {row // 4}]"
        _refuse(f"{has}; hopper_fp8 is {forms}")
    if scales != [(heads,), (heads,), (heads, head_dim), (heads, head_dim)]:
        _refuse(f"has scales of the shapes {scales} for q {q}")
    return Sizes(layout, tokens, heads, head_dim, k_cache[1])


def dtypes(layout: str, packed: bool) -> list[trt.DataType]:
    """Return the types of inputs and outputs. `packed`: FP8 bytes as INT32."""
    real, cache = trt.DataType.BF16, trt.DataType.BF16
    if layout == "hopper_fp8":
        cache = trt.DataType.INT32 if packed else trt.DataType.FP8
    scales = [trt.DataType.FLOAT] * (INPUTS[layout] - INPUTS["token_major"])
    return [real, real, real, cache, cache, trt.DataType.INT32, *scales, real, cache, cache]


def launches(size: Sizes, inputs: Sequence[int], outputs: Sequence[int]) -> list[Launch]:
    """Return the kernels of one layer in order, each with (inputs, numbers, outputs)."""
    q, k, v, *past = inputs[:6]
    out, k_block, v_block = outputs
    block, numbers = [k_block, v_block], [size.tokens, size.heads, size.cache]
    if size.layout == "token_major":
        return [(ATTEND_TOKEN_MAJOR, [q, k, v, *past], numbers, [out, *block])]
    q_scale, k_scale, v_scale, k_mean = inputs[6:]
    scales = [q_scale, k_scale, v_scale]
    return [
        (PACK, [k, v, k_scale, k_mean, v_scale], numbers[:2], block),
        (ATTEND, [q, *block, *past, *scales], numbers, [out]),
    ]


def _refuse(what: str) -> NoReturn:
    hint = "export the bundle and build the engine again with this version of aapt_deploy"
    raise BundleError(f"a {PLUGIN_NAMESPACE}::{NAME} node {what}", hint)


P = ParamSpec("P")
R = TypeVar("R")


def _kept(method: Callable[P, R]) -> Callable[P, R]:
    """Record what a callback raises, before TensorRT turns it into "-1"."""

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
    """One node. TensorRT clones it; clones share the launchers and the failures."""

    def __init__(self, scale: float, launchers: Launchers, failures: list[Exception]) -> None:
        trt.IPluginV3.__init__(self)
        trt.IPluginV3OneCore.__init__(self)
        trt.IPluginV3OneBuild.__init__(self)
        trt.IPluginV3OneRuntime.__init__(self)
        self.plugin_name, self.plugin_namespace = NAME, PLUGIN_NAMESPACE
        self.plugin_version = PLUGIN_VERSION
        self.num_outputs = 3
        self.launchers, self.failures = launchers, failures
        self.launcher: Launcher | None = None
        self.size: Sizes | None = None
        # A PluginField points into an array, and a collection into fields. Keep all three alive.
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
        ceil_div, keys = trt.DimensionOperation.CEIL_DIV, expr_builder.constant(TILE_KEYS)
        tiles = expr_builder.operation(ceil_div, k[1], keys)
        blocks = [trt.DimsExprs([cache[0], tiles, cache[2]]) for cache in (k_cache, v_cache)]
        return [_dims(q), *blocks]

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
        fits = found.type == wanted or (pos == 3 and found.type in _cache_types(layout))
        return bool(found.format == trt.TensorFormat.LINEAR and fits)

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
        self, input_desc: Sequence[trt.PluginTensorDesc],
        output_desc: Sequence[trt.PluginTensorDesc], inputs: Sequence[int],
        outputs: Sequence[int], workspace: int, stream: int,
    ) -> None:  # fmt: skip
        assert self.launcher is not None and self.size is not None, "run before its shapes are set"
        for kernel, reads, numbers, writes in launches(self.size, inputs, outputs):
            self.launcher(kernel, reads, numbers, writes, stream)

    def set_tactic(self, tactic: int) -> None:
        """Do nothing: there is one way to run."""

    def get_fields_to_serialize(self) -> trt.PluginFieldCollection:
        return self.collection

    def _accept(self, descs: Sequence[trt.PluginTensorDesc]) -> Sizes:
        size = sizes([tuple(desc.dims) for desc in descs])
        found = [desc.type for desc in descs]
        packed = found[3] == trt.DataType.INT32
        if (wanted := dtypes(size.layout, packed)[: len(found)]) != found:
            had, needs = (", ".join(kind.name for kind in kinds) for kinds in (found, wanted))
            _refuse(f"has inputs of {had}; {size.layout} is {needs}")
        tile_bytes, caches = TILE_KEYS * size.head_dim, tuple(descs[3].dims)
        if size.layout == "hopper_fp8" and caches[2] != tile_bytes // (4 if packed else 1):
            kind = found[3].name
            _refuse(f"has caches {caches} of {kind}, whose tiles are not {tile_bytes} bytes")
        if not math.isclose(self.scale[0], softmax_scale(size.head_dim), rel_tol=1e-6):
            ours = f"1 / sqrt({size.head_dim})"
            _refuse(f"has scale {self.scale[0]}; the kernels compute with {ours}")
        return size


def _cache_types(layout: str) -> list[trt.DataType]:
    return [dtypes(layout, packed)[3] for packed in (False, True)]


def _dims(like: trt.DimsExprs) -> trt.DimsExprs:
    return trt.DimsExprs([like[axis] for axis in range(len(like))])


class Creator(trt.IPluginCreatorV3One):
    """Makes the plugin, from a node's attributes or a plan's serialised fields."""

    def __init__(self, launchers: Launchers) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_namespace = NAME, PLUGIN_NAMESPACE
        self.plugin_version = PLUGIN_VERSION
        self.launchers = launchers
        self.failures: list[Exception] = []  # of all plugins it made
        empty = np.array([], np.float32)
        self.fields = [trt.PluginField(SCALE_FIELD, empty, trt.PluginFieldType.FLOAT32)]
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
            others = ", ".join(field.name for field in fields) or "none"
            _refuse(f"has no attribute {SCALE_FIELD!r}; it has {others}")
        return BlockCausalAttention(float(np.ravel(scale)[0]), self.launchers, self.failures)


# TensorRT's registry is one for the process, and does not keep a Python creator alive.
_REGISTERED: list[Creator] = []


def register(launchers: Launchers) -> Creator:
    """Register the plugin, before a graph is parsed and before a plan is opened.

    A second call replaces the launchers. Raises MachineError if TensorRT has no registry, or
    another library has taken the name.
    """
    registry = trt.get_plugin_registry()
    if registry is None:
        hint = "install TensorRT's libraries: pip install 'aapt_deploy[tensorrt]'"
        raise MachineError("TensorRT has no plugin registry", hint)
    if _REGISTERED and registry.get_creator(NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE) is not None:
        _REGISTERED[0].launchers = launchers
        return _REGISTERED[0]
    creator = Creator(launchers)
    if not registry.register_creator(creator, PLUGIN_NAMESPACE):
        plugin = f"{PLUGIN_NAMESPACE}::{NAME}, version {PLUGIN_VERSION}"
        text = f"another library has registered the TensorRT plugin {plugin}"
        raise MachineError(text, "do not load it in this process")
    _REGISTERED[:] = [creator]
    return creator
