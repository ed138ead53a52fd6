"""The plugin class and its creator, driven as TensorRT drives them, over the real base classes."""

import gc
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from aapt_deploy.backends.trt.plugin import python as python_plugin
from aapt_deploy.errors import BundleError, MachineError
from aapt_deploy.ops.block_causal_attention import NAME, PLUGIN_NAMESPACE, PLUGIN_VERSION

T, H, D, S, TILES = 100, 3, 64, 900, 15
SHAPES = {
    "token_major": [(1, T, H, D)] * 3 + [(1, S, H, D)] * 2 + [(1,)],
    "hopper_fp8": [(1, T, H, D)] * 3
    + [(H, TILES, 64 * D)] * 2
    + [(1,), (H,), (H,), (H, D), (H, D)],
}
PACKED = [(H, TILES, 16 * D) if len(shape) == 3 else shape for shape in SHAPES["hopper_fp8"]]
OUT = {"token_major": [(1, T, H, D)] * 3, "hopper_fp8": [(1, T, H, D)] + [(H, 2, 64 * D)] * 2}
LAYOUTS = sorted(SHAPES)

Launch = tuple[str, list[int], list[int], list[int], int]


class Launches:
    """Launchers that note what they are asked to launch."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, int]] = []
        self.seen: list[Launch] = []

    def __call__(self, layout: str, head_dim: int) -> python_plugin.Launcher:
        self.loaded.append((layout, head_dim))

        def launch(
            kernel: str,
            inputs: Sequence[int],
            numbers: Sequence[int],
            outputs: Sequence[int],
            stream: int,
        ) -> None:
            self.seen.append((kernel, [*inputs], [*numbers], [*outputs], stream))

        return launch


@pytest.fixture
def launchers() -> Launches:
    return Launches()


@pytest.fixture
def creator(
    registry: Any, launchers: Launches, monkeypatch: pytest.MonkeyPatch
) -> python_plugin.Creator:
    monkeypatch.setattr(python_plugin, "_REGISTERED", [])
    return python_plugin.register(launchers)


def attributes(trt: ModuleType, scale: float = D**-0.5) -> tuple[Any, Any]:
    """The field collection that the parser makes of a node, and what it points into."""
    value = np.array([scale], np.float32)
    fields = [trt.PluginField("scale", value, trt.PluginFieldType.FLOAT32)]
    return trt.PluginFieldCollection(fields), (value, fields)


@pytest.fixture
def plugin(creator: python_plugin.Creator, trt: ModuleType) -> python_plugin.BlockCausalAttention:
    collection, _ = attributes(trt)
    return creator.create_plugin(NAME, collection, trt.TensorRTPhase.BUILD)


def described(
    trt: ModuleType, shapes: Sequence[tuple[int, ...]], types: Sequence[Any], dynamic: bool = False
) -> list[Any]:
    descs = []
    for shape, kind in zip(shapes, types, strict=False):
        desc = trt.PluginTensorDesc()
        desc.dims, desc.type, desc.format = trt.Dims(shape), kind, trt.TensorFormat.LINEAR
        if dynamic:
            outer = trt.DynamicPluginTensorDesc()
            outer.desc, outer.min, outer.opt, outer.max = desc, desc.dims, desc.dims, desc.dims
            desc = outer
        descs.append(desc)
    return descs


def test_the_registry_finds_the_creator_under_the_names_of_the_node(
    creator: python_plugin.Creator, registry: Any, launchers: Launches
) -> None:
    assert registry.get_creator(NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE) is creator
    assert (creator.name, creator.plugin_version, creator.plugin_namespace) == (
        "BlockCausalAttention",
        "1",
        "aapt",
    )
    other = Launches()
    assert python_plugin.register(other) is creator and creator.launchers is other


def test_a_name_that_is_taken_or_a_missing_registry_is_told(
    registry: Any, launchers: Launches, trt: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python_plugin, "_REGISTERED", [])
    registry.creators[NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE] = object()
    with pytest.raises(MachineError, match="another library"):
        python_plugin.register(launchers)
    monkeypatch.setattr(trt, "get_plugin_registry", lambda: None)
    with pytest.raises(MachineError, match="no plugin registry"):
        python_plugin.register(launchers)


def test_the_creator_tells_its_only_field(creator: python_plugin.Creator) -> None:
    gc.collect()
    names = [creator.field_names[index].name for index in range(len(creator.field_names))]
    assert names == ["scale"]


def test_the_plugin_is_all_three_capabilities(
    plugin: python_plugin.BlockCausalAttention, trt: ModuleType
) -> None:
    for capability, base in (
        ("CORE", "IPluginV3OneCore"),
        ("BUILD", "IPluginV3OneBuild"),
        ("RUNTIME", "IPluginV3OneRuntime"),
    ):
        assert isinstance(
            plugin.get_capability_interface(getattr(trt.PluginCapabilityType, capability)),
            getattr(trt, base),
        )
    assert (
        plugin.plugin_name,
        plugin.plugin_namespace,
        plugin.plugin_version,
        plugin.num_outputs,
    ) == ("BlockCausalAttention", "aapt", "1", 3)


def test_serialised_fields_survive_the_collector_and_make_the_same_plugin(
    plugin: python_plugin.BlockCausalAttention, creator: python_plugin.Creator, trt: ModuleType
) -> None:
    """Trap: a collection of temporaries points to freed memory, and would be read here."""
    twin = plugin.clone()
    del plugin
    collection = twin.get_fields_to_serialize()
    gc.collect()
    noise = [np.full(1, 7.0, np.float32) for _ in range(1000)]
    again = creator.create_plugin(NAME, collection, trt.TensorRTPhase.RUNTIME)
    assert np.isclose(again.scale[0], D**-0.5) and len(noise) == 1000


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_types_are_the_cache_s(
    plugin: python_plugin.BlockCausalAttention, layout: str, trt: ModuleType
) -> None:
    for packed in (False, True):
        kinds = python_plugin.dtypes(layout, packed)
        found = plugin.get_output_data_types(kinds[: python_plugin.INPUTS[layout]])
        assert found == kinds[-3:]
        assert (
            {"token_major": "BF16", "hopper_fp8": "INT32" if packed else "FP8"}[layout]
            == found[1].name
            == found[2].name
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_shapes_follow_from_the_inputs(
    plugin: python_plugin.BlockCausalAttention, layout: str, builder: Any, trt: ModuleType
) -> None:
    inputs = [
        trt.DimsExprs([builder.constant(extent) for extent in shape]) for shape in SHAPES[layout]
    ]
    found = plugin.get_output_shapes(inputs, [], builder)
    assert [tuple(extent.get_constant_value() for extent in dims) for dims in found] == OUT[layout]
    if layout == "hopper_fp8":
        assert found[1][1].made == ("CEIL_DIV", T, 64)


def test_the_real_dims_of_expressions_take_what_the_plugin_makes(
    trt: ModuleType, builder: Any
) -> None:
    """`builder` replaces DimsExprs by a list; the real one must accept the same constructor."""
    real = __import__("tensorrt_bindings.tensorrt").tensorrt.DimsExprs
    assert len(real([builder.constant(1), builder.constant(2)])) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True])
def test_only_the_kernels_own_types_and_plain_memory_are_supported(
    plugin: python_plugin.BlockCausalAttention, layout: str, packed: bool, trt: ModuleType
) -> None:
    kinds, count = python_plugin.dtypes(layout, packed), python_plugin.INPUTS[layout]
    for pos, kind in enumerate(kinds):
        accepted = []
        for tried in trt.DataType.__members__.values():
            descs = described(
                trt, [(1,)] * len(kinds), [*kinds[:pos], tried, *kinds[pos + 1 :]], dynamic=True
            )
            if plugin.supports_format_combination(pos, descs, count):
                accepted.append(tried)
        both = (
            {trt.DataType.FP8, trt.DataType.INT32}
            if layout == "hopper_fp8" and pos == 3
            else {kind}
        )
        assert set(accepted) == both
        descs = described(trt, [(1,)] * len(kinds), kinds, dynamic=True)
        descs[pos].desc.format = trt.TensorFormat.CHW32
        assert not plugin.supports_format_combination(pos, descs, count)
    assert trt.DataType.UINT8 not in python_plugin.dtypes(
        "hopper_fp8", packed
    )  # TensorRT's plugins take none


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_launches_the_kernels_with_their_flat_parameters(
    plugin: python_plugin.BlockCausalAttention, layout: str, launchers: Launches, trt: ModuleType
) -> None:
    kinds, count = python_plugin.dtypes(layout, False), python_plugin.INPUTS[layout]
    reads, writes = (
        described(trt, SHAPES[layout], kinds),
        described(trt, OUT[layout], kinds[count:]),
    )
    plugin.configure_plugin(described(trt, SHAPES[layout], kinds, dynamic=True), [])
    assert plugin.get_workspace_size([], []) == 0
    running = plugin.attach_to_context(None)  # type: ignore[arg-type]
    assert running is not plugin
    running.on_shape_change(reads, writes)
    assert launchers.loaded == [(layout, D)] and launchers.seen == []
    q, k, v, kc, vc, n, qs, ks, vs, km = range(1000, 1010)
    out, kb, vb = 2000, 2001, 2002
    running.enqueue(reads, writes, [*range(1000, 1000 + count)], [out, kb, vb], 0, 77)
    wanted: dict[str, list[Launch]] = {
        "token_major": [
            ("aapt_attend_token_major", [q, k, v, kc, vc, n], [T, H, S], [out, kb, vb], 77)
        ],
        "hopper_fp8": [
            ("aapt_pack", [k, v, ks, km, vs], [T, H], [kb, vb], 77),
            ("aapt_attend", [q, kb, vb, kc, vc, n, qs, ks, vs], [T, H, TILES], [out], 77),
        ],
    }
    assert launchers.seen == wanted[layout]


def test_a_packed_cache_is_the_same_bytes(
    plugin: python_plugin.BlockCausalAttention, trt: ModuleType, launchers: Launches
) -> None:
    kinds = python_plugin.dtypes("hopper_fp8", packed=True)
    plugin.on_shape_change(described(trt, PACKED, kinds), [])
    assert plugin.size == python_plugin.Sizes("hopper_fp8", T, H, D, TILES)


@pytest.mark.parametrize(
    ("layout", "change", "reason"),
    [
        ("token_major", {3: (1, S, H, 32)}, "caches"),
        ("token_major", {0: (2, T, H, D), 1: (2, T, H, D), 2: (2, T, H, D)}, "q (2"),
        ("token_major", {5: (2,)}, "cache_len"), ("token_major", {1: (1, T + 1, H, D)}, "k (1"),
        ("token_major", {0: (1, -1, H, D)}, "every extent"),
        ("hopper_fp8", {3: (H, TILES, 32 * D), 4: (H, TILES, 32 * D)},
         "FP8 [3, tiles, 4096] or INT32 [3, tiles, 1024]"),
        ("hopper_fp8", {3: (H, TILES, 16 * D), 4: (H, TILES, 16 * D)}, "not 4096 bytes"),
        ("hopper_fp8", {8: (H,)}, "scales"),
        ("hopper_fp8", {4: (H, TILES + 1, 64 * D)}, "caches"),
    ],
)  # fmt: skip
def test_other_shapes_are_refused_and_the_reason_is_kept(
    plugin: python_plugin.BlockCausalAttention,
    layout: str,
    change: dict[int, tuple[int, ...]],
    reason: str,
    trt: ModuleType,
) -> None:
    shapes = [change.get(index, shape) for index, shape in enumerate(SHAPES[layout])]
    descs = described(trt, shapes, python_plugin.dtypes(layout, False), dynamic=True)
    with pytest.raises(BundleError) as caught:
        plugin.configure_plugin(descs, [])
    assert reason in str(caught.value) and plugin.failures == [caught.value]


def test_a_foreign_scale_is_refused(creator: python_plugin.Creator, trt: ModuleType) -> None:
    collection, _ = attributes(trt, scale=0.5)
    plugin = creator.create_plugin(NAME, collection, trt.TensorRTPhase.BUILD)
    with pytest.raises(BundleError, match=r"scale 0\.5"):
        plugin.on_shape_change(
            described(trt, SHAPES["token_major"], python_plugin.dtypes("token_major", False)), []
        )


def test_wrong_types_are_refused_when_running(
    plugin: python_plugin.BlockCausalAttention, trt: ModuleType
) -> None:
    kinds = [trt.DataType.HALF, *python_plugin.dtypes("token_major", False)[1:]]
    with pytest.raises(BundleError, match="inputs of HALF"):
        plugin.on_shape_change(described(trt, SHAPES["token_major"], kinds), [])


def test_a_node_without_scale_and_a_failing_launch_leave_their_reason(
    creator: python_plugin.Creator, plugin: python_plugin.BlockCausalAttention, trt: ModuleType
) -> None:
    with pytest.raises(BundleError, match="no attribute 'scale'"):
        creator.create_plugin(NAME, trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD)

    def none(layout: str, head_dim: int) -> python_plugin.Launcher:
        raise MachineError(f"no kernel for {layout}, head_dim {head_dim}")

    creator.launchers = plugin.launchers = none
    with pytest.raises(MachineError):
        plugin.on_shape_change(
            described(trt, SHAPES["token_major"], python_plugin.dtypes("token_major", False)), []
        )
    assert [str(failure)[:20] for failure in creator.failures] == [
        "a aapt::BlockCausalA",
        "no kernel for token_",
    ]
    assert plugin.failures is creator.failures
