"""`aapt build-engine --backend tensorrt` over an emulated device.

Fake plans are lowered graphs. Everything of ours runs: choosing a form, lowering, keeping plans,
the audit, the engine of the bundle, the comparison with ONNX Runtime, the timing, the manifest,
and then a stream from it. TensorRT's own API is for bindings/contract_build.py.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aapt_deploy import profiles
from aapt_deploy.backends.build import build_engine
from aapt_deploy.backends.trial import BuildOptions
from aapt_deploy.backends.trt import cuda, kept_plans
from aapt_deploy.backends.trt import order as order_module
from aapt_deploy.backends.trt.doctor import receipts
from aapt_deploy.backends.trt.doctor.receipts import Proof
from aapt_deploy.backends.trt.flavour import LEAN, PROPER, RTX
from aapt_deploy.backends.trt.lean import pinned
from aapt_deploy.backends.trt.order import Order
from aapt_deploy.backends.trt.plan_file import PlanLayer
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.cli import console
from aapt_deploy.errors import BundleError, MachineError, ParityError, UsageError
from aapt_deploy.profiles import Target
from tests.support.fake_tensorrt import VERSION, TensorRT, receipt
from tests.support.fake_tensorrt import here as here
from tests.support.opening import open_engines
from tests.support.tampered import tampered
from tests.support.tiny import frames_of
from tests.support.trt_plans import assert_same, toy_scales


def made(
    path: Path,
    said: list[str] | None = None,
    precision: str | None = "fp32",
    attention: str = "auto",
) -> Bundle:
    opened = Bundle.open(path)
    build_engine(
        opened,
        "tensorrt",
        precision,
        BuildOptions((said if said is not None else []).append, attention),
    )
    return opened


def test_an_engine_is_built_compared_timed_and_streams(
    bare: Path, bundle: Path, here: TensorRT
) -> None:
    said: list[str] = []
    opened = made(bare, said)
    assert here.built == ["generator", "encoder", "prompt", "decoder"]
    entry = opened.engines["tensorrt-fp32"]
    assert (entry["plugin"], entry["cache_layout"], entry["precision"], entry["cuda_graph"]) == (
        "native",
        "token_major",
        "fp32",
        True,
    )
    assert (
        entry["parity"]["encoder"] < 1e-5
        and entry["parity"]["generator"] < 1e-5
        and entry["psnr_db"] > 60
        and entry["step_ms"] > 0
    )
    assert entry["audit"]["generator"] | {"layers": 0} == {
        "layers": 0, "plugins": 0, "fp8": 0, "reformats": 0, "attention": 2, "plugins_expected": 0,
        "fp8_expected": 0, "attention_expected": 2,
    }  # fmt: skip
    receipt = entry["receipts"]["generator"]
    assert (
        receipt["tensorrt"],
        receipt["sms"],
        receipt["cuda"],
        receipt["driver"],
        receipt["gpu"],
    ) == (
        VERSION,
        [90],
        "13.0",
        "580.65.06",
        "Emulated H100",
    )
    assert (
        receipt["kernels"] == ""
        and receipt["graph_sha256"] == opened.manifest["files"]["generator.onnx"]["sha256"]
    )
    assert any("attention in form native (our kernels need" in line for line in said)
    opened.verify()
    ours, reference = (
        open_engines(Bundle.open(bare), "tensorrt"),
        open_engines(Bundle.open(bundle), "onnxruntime", "fp32"),
    )
    assert_same(frames_of(ours, opened, 5), frames_of(reference, Bundle.open(bundle), 5))
    ours.close()
    reference.close()
    assert list((receipts.cache_folder() / "unfinished").iterdir()) == []


def test_timings_are_kept_for_the_gpu_and_the_release(bare: Path, here: TensorRT) -> None:
    made(bare)
    assert [settings.timing_cache for settings in here.settings] == [b"", *[b"timings"] * 3]
    file = next(receipts.cache_folder().glob("timing-*"))
    assert file.name == f"timing-sm90-{VERSION}.bin"
    here.version = "10.16.1.11"
    made(bare)
    assert here.settings[4].timing_cache == b""


def test_what_is_built_with_the_same_inputs_is_kept(bare: Path, here: TensorRT) -> None:
    first = made(bare).engines["tensorrt-fp32"]
    said: list[str] = []
    second = made(bare, said).engines["tensorrt-fp32"]
    assert len(here.built) == 4 and sum("built already" in line for line in said) == 4
    assert second["inputs"] == first["inputs"] and second["audit"] == first["audit"]
    Bundle.open(bare).verify()


@pytest.mark.parametrize("change", ["tensorrt", "gpu", "graph", "driver", "plan"])
def test_a_stale_or_foreign_plan_is_built_anew(
    bare: Path, here: TensorRT, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    entry = made(bare).engines["tensorrt-fp32"]
    stale = ["generator", "encoder", "prompt", "decoder"]
    if change == "tensorrt":
        here.version = "11.4.0.107"
    elif change == "gpu":
        here.driver.sm = 100
    elif change == "driver":
        monkeypatch.setattr(cuda, "driver_release", lambda: "590.1")
    elif change == "plan":
        (bare / entry["graphs"]["decoder"]).write_bytes(b"other bytes")
        stale = ["decoder"]
    else:
        tampered(bare, lambda model: model.graph.node[0].__setattr__("doc_string", "changed"), None)
        stale = ["encoder"]
    made(bare)
    assert here.built[4:] == stale


@pytest.mark.parametrize(
    "stopped",
    [KeyboardInterrupt(), BundleError("TensorRT cannot build it"), MachineError("out of memory")],
)
def test_a_build_that_stops_leaves_the_bundle_and_goes_on_where_it_was(
    bare: Path, here: TensorRT, stopped: BaseException
) -> None:
    before = (bare / "manifest.json").read_bytes()

    def stop(graph: str) -> None:
        if graph == "prompt":
            raise stopped

    here.at_build = stop
    with pytest.raises(type(stopped)):
        made(bare)
    assert (
        (bare / "manifest.json").read_bytes() == before
        and not list(bare.glob(".stage-*"))
        and not (bare / "engines").exists()
    )
    here.at_build = lambda graph: None
    made(bare)
    assert here.built == ["generator", "encoder", "prompt", "decoder"]


def test_a_plan_that_waits_and_was_damaged_is_not_trusted(bare: Path, here: TensorRT) -> None:
    def stop(graph: str) -> None:
        if graph == "encoder":
            raise KeyboardInterrupt

    here.at_build = stop
    with pytest.raises(KeyboardInterrupt):
        made(bare)
    waiting = next((receipts.cache_folder() / "unfinished").glob("*.plan"))
    waiting.write_bytes(b"poison")
    here.at_build = lambda graph: None
    made(bare)
    assert here.built == ["generator", "generator", "encoder", "prompt", "decoder"]


# --- plans that are not what was asked for ---


def test_a_plan_that_computes_something_else_is_refused(bare: Path, here: TensorRT) -> None:
    before = (bare / "manifest.json").read_bytes()
    for graph, name, said in (
        ("generator", "clean", "generator differs by"),
        ("decoder", "frames", "frames have"),
        ("encoder", "latent", "encoder"),
    ):
        here.change = lambda found, outputs, graph=graph, name=name: (  # type: ignore[misc]
            outputs.update(
                {
                    name: (
                        255 - outputs[name]
                        if name == "frames"
                        else outputs[name] * np.float32("nan")
                    )
                }
            )
            if found == graph
            else None
        )
        with pytest.raises(ParityError, match=said):
            made(bare)
        assert (bare / "manifest.json").read_bytes() == before


def test_a_plugin_where_none_was_meant_is_refused_and_its_plan_is_not_kept(
    bare: Path, here: TensorRT
) -> None:
    here.layers = lambda layers: [*layers, PlanLayer("mine", "PluginV3", "", (), ())]
    with pytest.raises(ParityError, match="1 layers instead of 0"):
        made(bare)
    assert list((receipts.cache_folder() / "unfinished").iterdir()) == []


def test_attention_that_is_not_fused_and_many_reformats_are_told(
    bare: Path, here: TensorRT
) -> None:
    reformats = [PlanLayer(f"reformat {index}", "Reformat", "", (), ()) for index in range(5)]
    here.layers = lambda layers: [*(layer for layer in layers if layer.kind != "fmha"), *reformats]
    said: list[str] = []
    made(bare, said)
    assert any("2 attention nodes of generator run unfused" in line for line in said)
    assert any("5 reformats, such as reformat 0" in line for line in said)


# --- forms ---


def fp8_bundle(path: Path) -> Bundle:
    """The bundle as if exported in fp8; its graphs stay, which is enough to choose a form."""
    from aapt_deploy.bundle import bundle, scales

    profile = Bundle.open(path).profile
    scales.save(scales.Scales({}, toy_scales(profile), {}), path / scales.FILE)
    manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    manifest.pop(bundle.SEAL)
    manifest["precision"], manifest["files"][scales.FILE] = (
        "fp8",
        bundle._describe(path / scales.FILE),
    )
    bundle._write_manifest(path, manifest)
    return Bundle.open(path)


def attempt(path: Path, attention: str = "auto", portable: bool = False) -> list[str]:
    """Build the generator alone, as far as it comes; what was said."""
    said: list[str] = []
    with contextlib.suppress(KeyboardInterrupt):
        options = BuildOptions(said.append, attention, portable=portable)
        build_engine(Bundle.open(path), "tensorrt", None, options)
    return said


def test_without_proof_the_form_is_tensorrt_s_own_and_the_reason_is_told(
    bare: Path, here: TensorRT
) -> None:
    fp8_bundle(bare)
    here.at_build = lambda graph: (_ for _ in ()).throw(KeyboardInterrupt)
    assert any(
        "form native (aapt doctor --tensorrt has not been run on this machine" in line
        for line in attempt(bare)
    )
    with pytest.raises(
        MachineError, match="'python' is not proved here: aapt doctor --tensorrt has not been run"
    ):
        attempt(bare, "python")


def test_a_proved_form_that_fails_gives_way_and_says_so(bare: Path, here: TensorRT) -> None:
    """Tiny heads have no kernels: lowering refuses, the next form is taken."""
    fp8_bundle(bare)
    receipt(here, receipts.PLUGIN_FP8, receipts.PLUGIN_CAPTURED)
    here.at_build = lambda graph: (_ for _ in ()).throw(KeyboardInterrupt)
    said = attempt(bare)
    assert any("form python (proved here)" in line for line in said)
    assert any(
        "warning: attention in form python failed" in line and "going on with native" in line
        for line in said
    )
    with pytest.raises(BundleError, match="head_dim 16"):
        attempt(bare, "python")


def test_a_receipt_of_another_gpu_proves_nothing(bare: Path, here: TensorRT) -> None:
    fp8_bundle(bare)
    receipt(here, *receipts.PROBES)
    here.driver.sm = 100
    here.at_build = lambda graph: (_ for _ in ()).throw(KeyboardInterrupt)
    assert not any("form python" in line for line in attempt(bare))


def test_everything_that_a_plan_is_made_of_changes_its_hash(bare: Path, here: TensorRT) -> None:
    from dataclasses import replace

    device = cuda.Device(here.driver)
    found = device.gpu(VERSION, "k" * 64)
    device.close()
    choices = receipts.choose(
        {name: Proof(name, True, "", 1.0) for name in receipts.PROBES}, fp8=True
    )
    opened = fp8_bundle(bare)
    cost = order_module.cost_of(opened.profile)
    order = Order(opened, "fp8", PROPER, VERSION, (90,), found, choices[0], None, cost, print, None)
    wider = [replace(stage, activations_gb=1.0) for stage in cost.stages]
    orders = [
        order, replace(order, precision="bf16"),
        *(replace(order, choice=choice) for choice in choices[1:]),
        replace(order, choice=replace(choices[0], packed=True)),
        replace(order, sms=(89,)),
        replace(order, tensorrt="10.16.1.11"),
        replace(order, flavour=RTX),
        replace(order, portable=True),
        replace(order, cost=replace(cost, stages=wider)),
        replace(order, here=replace(found, kernels="o" * 64)),
    ]  # fmt: skip
    assert len({kept_plans.inputs_hash(one, "generator") for one in orders}) == len(orders)
    whole = replace(order, precision="fp32")
    heads, tokens = opened.profile.model.heads, opened.profile.block_tokens
    scores = 4 * heads * tokens * (opened.profile.cache_tokens + tokens)  # float32, unfused
    more = [kept_plans.workspace_bytes(o, "generator") for o in (whole, order)]
    assert more[0] - more[1] == 2 * scores
    assert (
        len({kept_plans.inputs_hash(one, "decoder") for one in orders}) == 7
    )  # neither form nor kernels concern it


# --- portable ---


def test_a_portable_engine_is_one_in_the_manifest_and_in_every_plan(
    bare: Path, here: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(bare)
    said: list[str] = []
    options = BuildOptions(said.append, portable=True)
    opened = Bundle.open(bare)
    build_engine(opened, "tensorrt", "fp32", options)
    assert [settings.portable for settings in here.settings] == [False] * 4 + [True] * 4
    assert opened.engines["tensorrt-fp32"]["portable"] is True
    wanted = f"elsewhere it runs with {pinned(LEAN, VERSION)}"
    assert any(wanted in line for line in said)
    monkeypatch.setattr("aapt_deploy.backends.trt.lean.installed", lambda flavour: VERSION)
    open_engines(Bundle.open(bare), "tensorrt").close()
    assert made(bare).engines["tensorrt-fp32"]["portable"] is False


def test_a_portable_plan_with_our_kernels_is_refused_until_it_is_proved(
    bare: Path, here: TensorRT
) -> None:
    fp8_bundle(bare)
    receipt(here, receipts.PLUGIN_FP8, receipts.PLUGIN_CAPTURED)
    here.at_build = lambda graph: (_ for _ in ()).throw(KeyboardInterrupt)
    assert any("form native (that the lean" in line for line in attempt(bare, portable=True))
    with pytest.raises(MachineError, match="'python' is not proved here: that the lean runtime"):
        attempt(bare, "python", portable=True)
    receipt(here, receipts.PLUGIN_FP8, receipts.PORTABLE_PLUGIN)
    assert any("form python (proved here)" in line for line in attempt(bare, portable=True))


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt-rtx"])
def test_portable_is_for_tensorrt_only(bare: Path, aapt: Any, backend: str) -> None:
    ran = aapt("build-engine", bare, "--backend", backend, "--portable")
    assert ran.code == 2 and ran.error == f"--portable is for tensorrt, not for {backend}"


# --- before any work ---


def test_what_does_not_fit_the_bundle_or_does_not_exist_is_refused(
    bare: Path, here: TensorRT
) -> None:
    with pytest.raises(
        UsageError, match="holds graphs in fp32; tensorrt builds bf16 and fp32 from them, not fp8"
    ) as caught:
        made(bare, precision="fp8")
    assert "aapt export CKPT -o OTHER --precision fp8" in caught.value.hint
    with pytest.raises(UsageError, match="int8"):
        made(bare, precision="int8")
    with pytest.raises(UsageError, match="magic") as caught:
        made(bare, attention="magic")
    assert caught.value.hint == "forms: auto, python, aot, native-fp8, native"
    fp8_bundle(bare)
    with pytest.raises(
        UsageError, match="holds graphs in fp8; tensorrt builds fp8 from them, not bf16"
    ):
        made(bare, precision="bf16")
    here.driver.sm = 80
    with pytest.raises(MachineError, match="SM 80 has no products in FP8, which need SM 89"):
        made(bare, precision=None)
    assert not here.built


def test_without_room_on_the_gpu_nothing_is_begun(
    bare: Path, here: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan of a large preset, and less memory than it needs."""
    large = order_module.cost_of(profiles.load("aapt-8b-736x416-h100"))
    monkeypatch.setattr(order_module, "cost_of", lambda profile: large)
    here.driver.free = 20_000_000_000
    assert large.total_gb > 25
    with pytest.raises(
        MachineError,
        match=rf"aapt-8b-736x416-h100 needs {large.total_gb:.2f} GB \(weights .*20\.00 GB are "
        "free on Emulated H100",
    ) as caught:
        made(bare)
    assert "aapt plan" in caught.value.hint and not here.built


def test_another_gpu_and_little_memory_are_warnings(
    bare: Path, here: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before the first graph; the build goes on."""
    opened, said, target = Bundle.open(bare), list[str](), Target("cuda", "L40S", sm=89)
    profile = opened.profile.replace(target=target)
    needed = dataclasses.replace(
        order_module.cost_of(profile), memory_gb={"weights": 2.0, "runtime": 0.5}
    )
    monkeypatch.setattr(order_module, "free_memory_bytes", lambda: 5_900_000_000)
    order_module._check_target(profile, (90,), said.append)
    order_module._check_host(needed, said.append)
    assert said == [
        "profile tiny-cpu was made for L40S (SM 89); the plans are for SM 90",
        "warning: 5.9 GB of host memory are free; TensorRT may take 6.0 GB while it builds",
    ]
    said.clear()
    monkeypatch.setattr(order_module, "free_memory_bytes", lambda: 6_000_000_000)
    order_module._check_host(needed, said.append)
    for sms in ((89,), (86, 89)):
        order_module._check_target(profile, sms, said.append)
    anywhere = profile.replace(target=dataclasses.replace(target, sm=0))
    order_module._check_target(anywhere, (90,), said.append)
    device = cuda.Device(here.driver)
    here.driver.free = 2_500_000_000
    order_module._check_memory(needed, device)
    assert said == []
    here.driver.free -= 10_000_000
    with pytest.raises(
        MachineError,
        match=r"needs 2\.50 GB \(weights 2\.00, runtime 0\.50\); 2\.49 GB are free on Emulated",
    ):
        order_module._check_memory(needed, device)
    device.close()


def test_plans_on_another_file_system_are_copied(
    bare: Path, here: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    made(bare).verify()


def test_a_plan_that_cannot_be_opened_leaves_no_device_open(
    bare: Path, here: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixture looks whether anything was left behind."""
    module = sys.modules["aapt_deploy.backends.trt.api"]
    true, opened = module.open_plan, list[Path]()

    def refuse(file: Path) -> Any:
        opened.append(file)
        if file.name == "decoder.plan":  # once all are built
            raise BundleError("TensorRT cannot load it", "build again")
        return true(file)

    monkeypatch.setattr(module, "open_plan", refuse)
    with pytest.raises(BundleError, match="TensorRT cannot load it"):
        made(bare)
    assert "tensorrt-fp32" not in Bundle.open(bare).engines and opened


def test_without_tensorrt_two_lines_and_exit_5(
    bare: Path, aapt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "aapt_deploy.backends.trt.api", raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    ran = aapt("build-engine", bare, "--backend", "tensorrt")
    assert ran.code == 5 and ran.error.startswith("TensorRT cannot be loaded") and ran.out == ""
    assert "pip install 'aapt_deploy[tensorrt]'" in ran.err


def test_a_form_of_attention_is_for_tensorrt_only(bare: Path, aapt: Any) -> None:
    assert aapt("build-engine", bare, "--attention", "native").code == 2


# --- progress ---


def test_phases_are_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console.phases("building") as phases:
        phases("tensorrt-fp8: building generator")
        phases.phase("Building engine", None, 3)
        phases.phase("Timing", "Building engine", 10)
        phases.step("Timing", 4)
        phases.done("Timing")
        phases.done("Building engine")
    assert capsys.readouterr().err.splitlines() == [
        "building", "tensorrt-fp8: building generator",
        "tensorrt-fp8: building generator: Building engine",
    ]  # fmt: skip


def test_phases_are_bars_on_a_terminal() -> None:
    from io import StringIO

    from rich.console import Console
    from rich.progress import Progress as Bars

    out = StringIO()
    with Bars(
        console=Console(file=out, force_terminal=True, width=100),
        refresh_per_second=1000,
        transient=True,
    ) as bars:
        phases = console.Phases(bars)
        phases.phase("Building engine", None, 4)
        phases.phase("Timing", "Building engine", 0)
        phases.step("Building engine", 1)
        phases.step("unknown", 1)
        bars.refresh()
        assert [(task.description, task.completed, task.total) for task in bars.tasks] == [
            ("Building engine", 2, 4),
            ("  Timing", 0, None),
        ]
        phases.done("Timing")
        phases.done("Building engine")
        assert not bars.tasks
    assert "Building engine" in out.getvalue()


def test_ctrl_c_while_building_is_exit_130(bare: Path, here: TensorRT, aapt: Any) -> None:
    here.at_build = lambda graph: signal.raise_signal(signal.SIGINT)
    ran = aapt("build-engine", bare, "--backend", "tensorrt", "--precision", "fp32")
    assert (
        ran.code == 130
        and "error" not in ran.err
        and "tensorrt-fp32" not in Bundle.open(bare).engines
    )
