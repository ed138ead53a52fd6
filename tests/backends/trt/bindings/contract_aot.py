"""The ahead-of-time plugins through the real `tensorrt.plugin`, and its traps."""

import importlib
import itertools
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from aapt_deploy.errors import BundleError
from tests.support.bindings.plugin_layer import Setter, descs, forget

T, H, D, TILES = 100, 3, 64, 15
PTX = "//\n.version 8.6\n.target sm_90a\n"
PACK_IN = [(1, T, H, D), (1, T, H, D), (H,), (H, D), (H, D)]
ATTEND_IN = [
    (1, T, H, D),
    *[(H, 2, 64 * D)] * 2,
    *[(H, TILES, 64 * D)] * 2,
    (1,),
    (H,),
    (H,),
    (H, D),
]
PACK_TYPES = ["BF16", "BF16", "FLOAT", "FLOAT", "FLOAT", "FP8", "FP8"]
ATTEND_TYPES = ["BF16", "FP8", "FP8", "FP8", "FP8", "INT32", "FLOAT", "FLOAT", "FLOAT", "BF16"]


@pytest.fixture(scope="session")
def trtp() -> ModuleType:
    return importlib.import_module("tensorrt.plugin")


@pytest.fixture
def module(trtp: ModuleType, registry: Any) -> Iterator[ModuleType]:
    """Our module with both plugins defined; undone afterwards, so every test may define them."""
    from aapt_deploy.backends.trt.plugin import ahead_of_time

    compiled = lambda kernel, tokens, heads, head_dim: ahead_of_time.Compiled(
        f"{kernel}_{head_dim}", PTX, (-(-tokens // 64), heads, 1), (128, 1, 1)
    )
    ahead_of_time.define(compiled)
    yield ahead_of_time
    forget(trtp, "aapt")


@pytest.mark.parametrize(
    ("name", "inputs", "outputs", "types", "numbers"),
    [
        ("BlockCausalAttentionPack", PACK_IN, [(H, 2, 64 * D)] * 2, PACK_TYPES, [T, H]),
        ("BlockCausalAttentionAttend", ATTEND_IN, [(1, T, H, D)], ATTEND_TYPES, [T, H, TILES]),
    ],
)
def test_a_plugin_goes_all_the_way_from_the_registry_to_its_kernel(
    module: ModuleType,
    registry: Any,
    builder: Any,
    trt: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    inputs: list[tuple[int, ...]],
    outputs: list[tuple[int, ...]],
    types: list[str],
    numbers: list[int],
) -> None:
    plugin = registry.get_creator(name, "1", "aapt").create_plugin(
        name,
        "aapt",
        trt.PluginFieldCollection([]),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    count = len(inputs)
    kinds = [getattr(trt.DataType, kind) for kind in types]
    assert (
        plugin.get_output_data_types(kinds[:count], [len(shape) for shape in inputs])
        == kinds[count:]
    )
    expressions = [
        trt.DimsExprs([builder.constant(extent) for extent in shape]) for shape in inputs
    ]
    shapes = plugin.get_output_shapes(expressions, [], builder)
    assert [tuple(extent.get_constant_value() for extent in dims) for dims in shapes] == outputs
    in_out = descs(trt, [*inputs, *outputs], types)
    combinations = plugin.get_supported_format_combinations(in_out, count)
    assert [(entry.type, entry.format) for entry in combinations] == [
        (kind, trt.TensorFormat.LINEAR) for kind in kinds
    ]
    plugin.configure_plugin(in_out[:count], in_out[count:])
    assert [plugin.get_aliased_input(index) for index in range(len(outputs))] == [-1] * len(outputs)
    plugin.get_valid_tactics()
    plugin.set_tactic(0)
    launch, setter = SimpleNamespace(), Setter()
    made: list[int] = []
    monkeypatch.setattr(
        trt.plugin._tensor, "SymExprImpl", lambda number: made.append(number._expr.value) or number
    )
    plugin.get_launch_params(expressions, in_out, count, launch, setter, builder)
    grid = [2, H, 1, 128, 1, 1, 0]
    assert made == grid + numbers and setter.nbSymExprs == len(numbers)
    twin = plugin.clone()
    kernel, image = twin.get_kernel(
        [entry.desc for entry in in_out[:count]], [entry.desc for entry in in_out[count:]]
    )
    assert (
        kernel
        == {
            "BlockCausalAttentionPack": "aapt_pack_64",
            "BlockCausalAttentionAttend": "aapt_attend_64",
        }[name]
    )
    assert image == PTX.encode()


def test_an_image_that_is_no_ptx_or_wants_much_shared_memory_is_refused(module: ModuleType) -> None:
    with pytest.raises(BundleError, match="no PTX"):
        module.Compiled("aapt_pack", "\x7fELF", (1, 1, 1), (128, 1, 1))
    with pytest.raises(BundleError, match="at most 49152"):
        module.Compiled("aapt_pack", PTX, (1, 1, 1), (128, 1, 1), 49153)
    assert (
        module.Compiled("aapt_pack", PTX, (1, 1, 1), (128, 1, 1), 49152).dynamic_shared_bytes
        == 49152
    )


# --- the traps: what the real layer does, so that a release which changes it is noticed ---


names = (f"trap{number}" for number in itertools.count())


@pytest.fixture
def trap(trtp: ModuleType, registry: Any) -> Iterator[str]:
    """The id of a plugin that is forgotten after the test."""
    namespace = next(names)
    yield f"{namespace}::op"
    forget(trtp, namespace)


def registered(trtp: ModuleType, plugin_id: str) -> None:
    @trtp.register(plugin_id)
    def describe(  # type: ignore[name-defined]
        x: trtp.TensorDesc, first: str, second: str
    ) -> trtp.TensorDesc:
        return x.like()


def made(trt: ModuleType, registry: Any, plugin_id: str, request: str | None = "STRICT_AOT") -> Any:
    namespace, name = plugin_id.split("::")
    fields = [
        trt.PluginField(key, value, trt.PluginFieldType.CHAR)
        for key, value in (("first", b"1"), ("second", b"2"))
    ]
    arguments = [name, namespace, trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD]
    if request:
        arguments.append(getattr(trt.QuickPluginCreationRequest, request))
    return registry.get_creator(name, "1", namespace).create_plugin(*arguments)


def asked(plugin: Any, trt: ModuleType, builder: Any) -> None:
    """Up to the launch parameters, for one input x [5]."""
    plugin.get_output_data_types([trt.DataType.FLOAT], [1])
    expressions = [trt.DimsExprs([builder.constant(5)])]
    plugin.get_output_shapes(expressions, [], builder)
    in_out = descs(trt, [(5,), (5,)], ["FLOAT", "FLOAT"])
    plugin.get_supported_format_combinations(in_out, 1)
    plugin.configure_plugin(in_out[:1], in_out[1:])
    plugin.set_tactic(0)
    plugin.get_launch_params(expressions, in_out, 1, SimpleNamespace(), Setter(), builder)


def test_trap_1_a_subset_of_the_attributes_is_given_all(
    trap: str, trtp: ModuleType, trt: ModuleType, registry: Any, builder: Any
) -> None:
    registered(trtp, trap)

    @trtp.aot_impl(trap)
    def kernel(  # type: ignore[no-untyped-def]
        x, second, outputs, tactic
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]:  # type: ignore[name-defined]
        raise AssertionError("not reached")

    with pytest.raises(TypeError, match="takes 4 positional arguments but 5 were given"):
        asked(made(trt, registry, trap), trt, builder)


def test_trap_2_tactic_and_the_return_annotation_are_mandatory(trap: str, trtp: ModuleType) -> None:
    registered(trtp, trap)
    with pytest.raises(ValueError, match="does not match the expected input arg schema"):

        @trtp.aot_impl(trap)
        def without(
            x, first, second, outputs
        ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]:
            pass

    with pytest.raises(ValueError, match="No return annotation"):

        @trtp.aot_impl(trap)
        def untyped(x, first, second, outputs, tactic):  # type: ignore[no-untyped-def]
            pass


def test_trap_3_postponed_annotations_and_defaults_are_refused(trap: str, trtp: ModuleType) -> None:
    def postponed(x: "trtp.TensorDesc") -> "trtp.TensorDesc":  # type: ignore[name-defined]
        return x

    with pytest.raises((TypeError, ValueError)):
        trtp.register(trap)(postponed)
    with pytest.raises(ValueError, match="default"):

        @trtp.register(f"{trap}2")
        def default(x: trtp.TensorDesc, first: int = 3) -> trtp.TensorDesc:
            return x


@pytest.mark.parametrize("number", ["plain", "narrow", "product"])
def test_trap_4_numbers_must_be_symint32(
    trap: str, trtp: ModuleType, trt: ModuleType, registry: Any, builder: Any, number: str
) -> None:
    registered(trtp, trap)

    @trtp.aot_impl(trap)
    def kernel(  # type: ignore[no-untyped-def]
        x, first, second, outputs, tactic
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]:  # type: ignore[name-defined]
        extras = trtp.SymIntExprs(1)
        extras[0] = {"plain": 3, "narrow": trtp.SymInt16(3), "product": trtp.SymInt32(3) * 2}[
            number
        ]
        return "k", PTX, trtp.KernelLaunchParams(), extras

    reason = {"plain": "Extra args must be|Expected", "narrow": "SymInt32", "product": "SymInt32"}[
        number
    ]
    with pytest.raises(TypeError, match=reason):
        asked(made(trt, registry, trap), trt, builder)


def test_trap_5_launch_parameters_know_no_cluster_and_are_empty_when_made_too_early(
    trtp: ModuleType,
) -> None:
    launch = trtp.KernelLaunchParams(grid_x=7)
    assert launch.grid_x._expr is None
    with pytest.raises(AttributeError, match="cluster_x"):
        launch.cluster_x = 2


def test_trap_6_any_bytes_pass_as_an_image_so_we_check_it(module: ModuleType) -> None:
    """The layer itself takes a cubin; see `Compiled`, whose refusal is tested above."""
    source = __import__("inspect").getsource(
        __import__("tensorrt.plugin._plugin_class", fromlist=["x"])
    )
    assert "PTX/CUBIN must be a 'str' or 'bytes'" in source


def test_trap_7_a_combination_names_positions_by_list_and_types_are_checked_late(
    trtp: ModuleType,
) -> None:
    with pytest.raises(TypeError):
        trtp.AutoTuneCombination().pos(0, "FP32", "LINEAR")
    late = trtp.AutoTuneCombination("FP99, FP32", "LINEAR")
    with pytest.raises(AttributeError):
        late._get_combinations()


def test_trap_8_attributes_of_an_aot_plugin_are_not_serialised(
    trap: str, trtp: ModuleType, trt: ModuleType, registry: Any
) -> None:
    registered(trtp, trap)

    @trtp.aot_impl(trap)
    def kernel(  # type: ignore[no-untyped-def]
        x, first, second, outputs, tactic
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]:  # type: ignore[name-defined]
        raise AssertionError("not reached")

    with pytest.raises(AttributeError, match="impl_attr_names"):
        made(trt, registry, trap).get_fields_to_serialize()


def test_trap_9_without_a_request_the_plugin_is_not_ahead_of_time(
    trap: str, trtp: ModuleType, trt: ModuleType, registry: Any
) -> None:
    registered(trtp, trap)
    assert type(made(trt, registry, trap, request=None)).__name__ == "_TemplateJITPlugin"


def test_trap_10_and_12_do_not_concern_us(module: ModuleType) -> None:
    """We define none of these: just-in-time plugins (10), shape inputs, workspace, kernels (12)."""
    from tensorrt.plugin import _lib

    ours = [
        definition for name, definition in _lib.QDP_REGISTRY.items() if name.startswith("aapt::")
    ]
    assert len(ours) == 2 and all(
        definition.impl_func is None and definition.aot_impl_func for definition in ours
    )


def test_trap_11_a_collection_keeps_nothing_alive(trt: ModuleType) -> None:
    import sys

    import numpy as np

    array = np.array([12], np.int32)
    before = sys.getrefcount(array)
    collection = trt.PluginFieldCollection([trt.PluginField("a", array, trt.PluginFieldType.INT32)])
    assert (
        len(collection) == 1 and sys.getrefcount(array) == before
    )  # so an array that is only passed here is freed


def test_trap_13_whole_numbers_are_no_attributes_under_10_16(
    trap: str, trtp: ModuleType, trt: ModuleType, registry: Any, release: str
) -> None:
    """10.16 converts the array of a number as numpy 2.4 refuses. Our plugins have no attributes."""
    import numpy as np

    @trtp.register(trap)
    def describe(x: trtp.TensorDesc, first: int) -> trtp.TensorDesc:  # type: ignore[name-defined]
        return x.like()

    @trtp.aot_impl(trap)
    def kernel(
        x, first, outputs, tactic
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]:
        raise AssertionError("not reached")

    namespace, name = trap.split("::")
    array = np.array([12])
    fields = [trt.PluginField("first", array, trt.PluginFieldType.INT64)]
    make = lambda: registry.get_creator(name, "1", namespace).create_plugin(
        name,
        namespace,
        trt.PluginFieldCollection(fields),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    if release == "10.16" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        with pytest.raises(TypeError, match="0-dimensional"):
            make()
    else:
        assert make().attrs == {"first": 12}
