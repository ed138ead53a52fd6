"""build-engine through strict fakes of one release, with golden logs of its calls.

For a whole fp8 bundle, in each form of attention. The bundle is synthetic and small; its
generator has our op's nodes and one product in FP8. Builder, parser and runtime are fakes made
from the release's stubs. A "network" has as many layers as the lowered file has nodes, but a
plugin's only if its creator is registered, as in TensorRT.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from aapt_deploy.backends.trt.doctor import receipts
from aapt_deploy.backends.trt.doctor.receipts import AOT, NATIVE, PYTHON, Choice
from aapt_deploy.bundle import bundle as bundles
from aapt_deploy.bundle import scales
from aapt_deploy.bundle.signature import layer_names
from aapt_deploy.errors import BundleError, MachineError, ParityError
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.ops.block_causal_attention import DOMAIN, NAME, kernels
from tests.support.bindings.build_rig import TRT_TYPES, Rig
from tests.support.bindings.plugin_layer import forget

CHOICES = {
    form: Choice(form, packed=False, captured=True, reason="proved here")
    for form in (PYTHON, AOT, NATIVE)
}


@pytest.fixture
def rig(
    trt: ModuleType, registry: Any, release: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Rig]:
    from aapt_deploy.backends.trt.plugin import ahead_of_time
    from aapt_deploy.backends.trt.plugin import python as python_plugin

    monkeypatch.setattr(python_plugin, "_REGISTERED", [])
    monkeypatch.setattr(ahead_of_time, "_DEFINED", [])
    yield Rig(trt, registry, release, monkeypatch, tmp_path)
    forget(importlib.import_module("tensorrt.plugin"), "aapt")


@pytest.fixture
def write(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--write-golden"))


@pytest.mark.parametrize("form", CHOICES)
def test_a_build_of_a_bundle_is_these_calls(rig: Rig, release: str, form: str, write: bool) -> None:
    order, finished = rig.plans(CHOICES[form])
    rig.golden(f"bundle-{form}-{release}", write)
    assert order.choice.form == form and set(finished) == set(signatures(rig.profile))
    audit = finished["generator"].audit
    plugins = {PYTHON: 2, AOT: 4, NATIVE: 0}[form]
    assert (audit["plugins"], audit["fp8"], audit["attention"]) == (
        plugins,
        1,
        2 if form == NATIVE else 0,
    )
    entry = rig.bundle.engines["tensorrt-fp8"]
    assert entry["plugin"] == form and ("scales" in entry) == (form != NATIVE)
    assert (
        entry["receipts"]["generator"]["kernels"] == ("" if form == NATIVE else "k" * 64)
        and entry["receipts"]["decoder"]["kernels"] == ""
    )
    stored = {PYTHON: "FP8", AOT: "FP8", NATIVE: "BF16"}[form]
    rig.opened = onnx.load_from_string(
        (rig.bundle.path / entry["graphs"]["generator"]).read_bytes()
    )
    kinds = {value.name: TRT_TYPES[value.type.tensor_type.elem_type] for value in rig._io()}
    assert {
        kinds[name]
        for prefix in ("k_cache", "v_block")
        for name in layer_names(prefix, rig.profile)
    } == {stored}


def test_the_runtime_reads_what_the_builder_wrote(rig: Rig) -> None:
    from aapt_deploy.backends.trt.flavour import PROPER
    from aapt_deploy.backends.trt.opening import Entry

    rig.plans(CHOICES[PYTHON])
    entry = Entry.of(rig.bundle, "fp8", PROPER)
    assert entry.plugin == PYTHON and entry.captured and entry.scales
    for found, wanted in zip(
        scales.load(rig.bundle.checked(entry.scales), rig.profile).attention,
        rig.scales,
        strict=True,
    ):
        assert all(
            np.array_equal(array, getattr(wanted, name)) for name, array in vars(found).items()
        )


def test_packed_caches_are_int32(rig: Rig) -> None:
    rig.plans(Choice(PYTHON, packed=True, captured=True, reason=""))
    graph = rig.bundle.engines["tensorrt-fp8"]["graphs"]["generator"]
    inputs = onnx.load_from_string((rig.bundle.path / graph).read_bytes()).graph.input
    kinds = {value.name: TRT_TYPES[value.type.tensor_type.elem_type] for value in inputs}
    assert kinds["k_cache.00"] == "INT32"


def test_the_plugin_is_registered_before_the_graph_is_parsed(rig: Rig) -> None:
    seen: list[list[str]] = []
    parse = rig._parse
    rig.recorder.script["OnnxParser.parse_from_file"] = lambda path: (
        seen.append(sorted(key[0] for key in rig.registry.creators)) or parse(path)
    )
    rig.plans(CHOICES[PYTHON])
    assert seen[0] == [NAME]


# --- planted: a missing plugin, a silent fallback, products that are not in FP8 ---


@pytest.mark.parametrize(("form", "wanted"), [(PYTHON, 2), (AOT, 4)])
def test_a_plugin_that_was_not_registered_is_a_missing_layer_and_no_silent_fallback(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, form: str, wanted: int
) -> None:
    monkeypatch.setattr(rig.module, "_register", lambda order, lowered: ())
    with pytest.raises(
        ParityError, match=f"took 0 of the {wanted} aapt::BlockCausalAttention layers"
    ):
        rig.plans(CHOICES[form])
    assert not [call for call in rig.recorder.journal if "build_serialized_network" in call]


@pytest.mark.parametrize(
    ("lost", "said"),
    [("PluginV3", "0 layers instead of 2"), ("FP8", "0 layers in FP8 instead of 1")],
)
def test_a_plan_without_what_it_was_built_for_is_refused_and_not_kept(
    rig: Rig, lost: str, said: str
) -> None:
    rig.lose = (lost,)
    with pytest.raises(ParityError, match=said):
        rig.plans(CHOICES[PYTHON])
    assert not list((receipts.cache_folder() / "unfinished").iterdir())


def test_a_form_that_tensorrt_refuses_gives_way_to_the_next_and_says_so(rig: Rig) -> None:
    def parse(path: str) -> bool:
        rig._parse(path)
        return not any(node.domain == DOMAIN for node in rig.parsed.graph.node)

    rig.recorder.script["OnnxParser.parse_from_file"] = parse
    order, _ = rig.plans(CHOICES[PYTHON], CHOICES[AOT], CHOICES[NATIVE])
    assert order.choice.form == NATIVE and rig.bundle.engines["tensorrt-fp8"]["plugin"] == NATIVE
    assert sum(line.startswith("warning: attention in form") for line in rig.said) == 2


def test_what_the_plugin_raised_is_the_error_of_the_build(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(layout: str, head_dim: int) -> None:
        raise MachineError("GPU NVIDIA L40S has compute capability 8.9", "take another")

    monkeypatch.setattr(kernels, "launcher", refuse)
    with pytest.raises(MachineError, match=r"compute capability 8\.9"):
        rig.plans(CHOICES[PYTHON])
    assert not rig.recorder.journal


def test_ctrl_c_in_the_middle_leaves_nothing_half_written(rig: Rig) -> None:
    calls: list[int] = []

    def build(network: Any, config: Any) -> bytes:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return bytes(rig.parsed.SerializeToString())

    rig.recorder.script["Builder.build_serialized_network"] = build
    with pytest.raises(KeyboardInterrupt):
        rig.plans(CHOICES[PYTHON])
    names = [file.suffix for file in (receipts.cache_folder() / "unfinished").iterdir()]
    assert (
        sorted(names) == [".json", ".plan"]
        and "tensorrt-fp8" not in bundles.Bundle.open(rig.bundle.path).engines
    )
    rig.plans(CHOICES[PYTHON])
    assert len(calls) == 2 + 3, "the generator's plan was not kept"


def test_errors_of_the_parser_reach_the_user_with_what_can_be_done(rig: Rig) -> None:
    rig.recorder.script |= {
        "OnnxParser.parse_from_file": False, "OnnxParser.num_errors": 1,
        "ParserError.desc": "No importer registered for op: Attention",
        "ParserError.node_name": "attention.0", "ParserError.node_operator": "Attention",
    }  # fmt: skip
    with pytest.raises(BundleError, match=r"Attention node 'attention\.0': No importer") as caught:
        rig.plans(CHOICES[NATIVE])
    assert "newer TensorRT" in caught.value.hint


def test_the_aot_kernels_are_our_ptx_and_launch_shapes(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aapt_deploy.backends.trt.plugin import ahead_of_time

    defined: list[Any] = []
    monkeypatch.setattr(ahead_of_time, "define", defined.append)
    launch = kernels.PtxLaunch("aapt_attend", "//\n.version 8.6\n", (2, 3, 1), (384, 1, 1))
    ahead_of_time.define_once(lambda *sizes: launch)
    ahead_of_time.define_once(lambda *sizes: launch)
    assert len(defined) == 1
    compiled = defined[0]("aapt_attend", 100, 3, 64)
    assert (
        compiled.name,
        compiled.ptx,
        compiled.grid,
        compiled.block,
        compiled.dynamic_shared_bytes,
    ) == (*launch, 0)
