"""TensorRT's lean runtime, the real library: our plugin's registration, and loading errors.

It has a registry and the plugins' base classes, and no builder. Each function below `In the child`
runs in a process of its own, because a process holds one TensorRT, and this one may end in a crash.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aapt_deploy.backends.trt.doctor.process import ask_process
from aapt_deploy.backends.trt.flavour import LEAN, PROPER
from aapt_deploy.backends.trt.lean import installed
from aapt_deploy.backends.trt.loading import api_of
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import BundleError
from aapt_deploy.models.aapt.signature import signatures
from tests.support import ROOT

LEAN_RUN = "aapt_deploy.backends.trt.doctor.lean_run"
DRIVER = Path("/proc/driver/nvidia/version").exists()
INSTALLED = installed(LEAN)
NO_LEAN = "the lean runtime is not installed: pip install 'aapt_deploy[tensorrt-lean]'"
pytestmark = pytest.mark.skipif(INSTALLED is None, reason=NO_LEAN)
without_driver = pytest.mark.skipif(DRIVER, reason="this machine has a driver")


def child(function: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", __name__, function, *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def told(function: str, *arguments: object) -> Any:
    """What a child returns, as JSON; it must end well."""
    done = child(function, *arguments)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def portable(path: Path, release: str, form: str = "native") -> Bundle:
    """The bundle with a portable engine of a release, whose plans are a few bytes."""
    opened = Bundle.open(path)
    files, names = opened.manifest["files"], list(signatures(opened.profile))
    with opened.add_engine("tensorrt-fp32") as stage:
        for name in names:
            (stage.path / f"{name}.plan").write_bytes(b"not a plan" * 100)
        stage.entry |= {
            "backend": "tensorrt", "precision": "fp32", "threads": 1, "spinning": False,
            "step_ms": 1.0, "plugin": form, "portable": True,
            "graphs": {name: f"{stage.relative}/{name}.plan" for name in names},
            "receipts": {
                name: {
                    "tensorrt": release, "sms": [90], "kernels": "", "cuda": "13.0",
                    "graph_sha256": files[f"{name}.onnx"]["sha256"], "driver": "580", "gpu": "H100",
                }
                for name in names
            },
        }  # fmt: skip
    return Bundle.open(path)


# --- the plugin ---


def test_the_plugin_joins_the_registry() -> None:
    assert told("registered") == {"found": True, "listed": True, "again": True, "launchers": True}


@pytest.mark.parametrize("phase", ["BUILD", "RUNTIME"])
def test_a_plugin_is_created_cloned_and_serialised(phase: str) -> None:
    assert told("created", phase) == {
        "interfaces": {"CORE": True, "BUILD": True, "RUNTIME": True},
        "fields": [["scale", "FLOAT32", [0.125]]],
        "clone": [["scale", "FLOAT32", [0.125]]],
        "read back": [["scale", "FLOAT32", [0.125]]],
        "failures": [],
    }


def test_what_a_plan_may_hold_wrongly_is_refused_and_kept() -> None:
    assert told("refused") == ["a aapt::BlockCausalAttention node has no attribute 'scale'"]


def test_a_name_that_another_library_took_is_refused() -> None:
    error = told("taken")
    assert error["kind"] == "MachineError" and error["text"].startswith("another library has")


# --- loading ---


@without_driver
def test_the_library_itself_crashes_without_a_driver() -> None:
    """As long as it does, `open_plan` must not use a runtime that failed to start."""
    done = child("used_without_driver")
    assert done.returncode == -signal.SIGSEGV, done


@without_driver
def test_a_missing_driver_is_told_and_the_process_lives(tmp_path: Path) -> None:
    file = tmp_path / "generator.plan"
    file.write_bytes(b"not a plan" * 100)
    error = told("opened", file)
    assert error["kind"] == "MachineError" and "NVIDIA driver" in error["hint"]
    assert error["text"].startswith(f"TensorRT's lean runtime cannot load plan {file}: ")
    assert "CUDA initialization failure" in error["text"] and ".cpp" not in error["text"]


@pytest.mark.gpu
@pytest.mark.parametrize("content", [b"", b"not a plan" * 100])
def test_a_file_that_is_no_plan_is_told(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "generator.plan"
    file.write_bytes(content)
    error = told("opened", file)
    assert error["kind"] == "BundleError" and f"plan {file}" in error["text"]


def test_a_process_uses_one_tensorrt() -> None:
    error = told("both")
    assert error["kind"] == "MachineError" and "lean runtime already" in error["text"]


@pytest.mark.skipif(installed(PROPER) is not None, reason="TensorRT itself goes first")
@pytest.mark.parametrize("form", ["native", "python"])
@without_driver
def test_a_portable_engine_is_opened_by_it(copied: Path, form: str) -> None:
    """Over an emulated device: up to what the real runtime says without a driver."""
    portable(copied, str(INSTALLED), form)
    error = told("streamed", copied)
    assert error["kind"] == "MachineError" and "lean runtime cannot load plan" in error["text"]
    assert error["plugin"] is (form == "python")


@pytest.mark.skipif(installed(PROPER) is not None, reason="TensorRT itself goes first")
@pytest.mark.parametrize("release", ["10.16.1.11", "11.4.1.0"])
def test_a_portable_engine_of_another_release_names_the_one_to_install(
    copied: Path, release: str
) -> None:
    portable(copied, release)
    error = told("streamed", copied)
    assert error["kind"] == "MachineError" and error["plugin"] is False
    assert f"with TensorRT {release}; " in error["text"]
    assert f"here is TensorRT's lean runtime {INSTALLED}" in error["text"]
    assert f"'aapt_deploy[tensorrt-lean]' tensorrt-lean-cu13-libs=={release}" in error["hint"]


@without_driver
def test_the_doctor_s_process_runs_a_portable_plan_with_it(tmp_path: Path) -> None:
    file = tmp_path / "probe.plan"
    file.write_bytes(b"not a plan" * 100)
    answer, reason = ask_process(LEAN_RUN, ["native", str(file)], 60)
    assert answer is not None and answer["found"].startswith("no NVIDIA driver"), reason
    for form in ("native", "python", "aot"):
        found = told("probed", form, file)
        assert found["ok"] is False
        assert found["found"].startswith(f"TensorRT's lean runtime cannot load plan {file}: ")


# --- In the child ---


def launchers(layout: str, head_dim: int) -> Any:
    raise AssertionError("nothing is launched here")


def names_of(collection: Any) -> list[Any]:
    fields = [collection[index] for index in range(len(collection))]
    return [[field.name, field.type.name, np.ravel(field.data).tolist()] for field in fields]


def registry() -> tuple[Any, Any, Any]:
    """The bindings, our plugin's module and the real registry."""
    trt = api_of(LEAN).trt
    from aapt_deploy.backends.trt.plugin import python as plugin

    return trt, plugin, trt.get_plugin_registry()


def registered() -> Any:
    _, plugin, known = registry()
    creator = plugin.register(launchers)
    found = known.get_creator("BlockCausalAttention", "1", "aapt")
    other = lambda layout, head_dim: launchers(layout, head_dim)
    again = plugin.register(other)
    return {
        "found": found is creator, "listed": any(one is creator for one in known.all_creators),
        "again": again is creator, "launchers": creator.launchers is other,
    }  # fmt: skip


def created(phase: str) -> Any:
    trt, plugin, known = registry()
    creator = plugin.register(launchers)
    scale = np.array([0.125], np.float32)
    fields = [trt.PluginField("scale", scale, trt.PluginFieldType.FLOAT32)]
    taken = known.get_creator("BlockCausalAttention", "1", "aapt")
    make = lambda collection: taken.create_plugin(
        "attention", collection, getattr(trt.TensorRTPhase, phase)
    )
    made = make(trt.PluginFieldCollection(fields))
    kinds = {
        "CORE": trt.IPluginV3OneCore, "BUILD": trt.IPluginV3OneBuild,
        "RUNTIME": trt.IPluginV3OneRuntime,
    }  # fmt: skip
    interfaces = {
        name: isinstance(made.get_capability_interface(kind), kinds[name])
        for name, kind in ((name, getattr(trt.PluginCapabilityType, name)) for name in kinds)
    }
    stored = made.get_fields_to_serialize()
    return {
        "interfaces": interfaces, "fields": names_of(stored),
        "clone": names_of(made.clone().get_fields_to_serialize()),
        "read back": names_of(make(stored).get_fields_to_serialize()),
        "failures": [str(failure) for failure in creator.failures],
    }  # fmt: skip


def refused() -> Any:
    trt, plugin, known = registry()
    creator = plugin.register(launchers)
    odd = [trt.PluginField("odd", np.ones(1, np.float32), trt.PluginFieldType.FLOAT32)]
    taken = known.get_creator("BlockCausalAttention", "1", "aapt")
    try:
        taken.create_plugin("x", trt.PluginFieldCollection(odd), trt.TensorRTPhase.RUNTIME)
    except BundleError as error:
        caught = error
    assert creator.failures == [caught]
    return [str(failure).partition(";")[0] for failure in creator.failures]


def taken() -> Any:
    _, plugin, known = registry()
    assert known.register_creator(theirs := plugin.Creator(launchers), "aapt")
    try:
        plugin.register(launchers)
    except Exception as error:
        assert known.get_creator("BlockCausalAttention", "1", "aapt") is theirs
        return {"kind": type(error).__name__, "text": str(error)}


def used_without_driver() -> None:
    trt = api_of(LEAN).trt
    trt.Runtime(trt.Logger(trt.Logger.ERROR)).engine_host_code_allowed = False


def opened(file: str) -> Any:
    try:
        api_of(LEAN).open_plan(Path(file))
    except Exception as error:
        return said(error)


def said(error: Any) -> dict[str, Any]:
    return {"kind": type(error).__name__, "text": str(error), "hint": error.hint}


def both() -> Any:
    api_of(LEAN)
    try:
        api_of(PROPER)
    except Exception as error:
        return said(error)


def streamed(bundle: str) -> Any:
    from aapt_deploy.backends.trt import cuda, opening
    from tests.support.cuda_emulator import Driver

    opening.with_driver = lambda: cuda.Device(Driver())  # type: ignore[attr-defined]
    try:
        opening.open_bundle(Bundle.open(Path(bundle)), "fp32")
    except Exception as error:
        known = api_of(LEAN).trt.get_plugin_registry()
        plugin = known.get_creator("BlockCausalAttention", "1", "aapt")
        return {**said(error), "plugin": plugin is not None}


def probed(form: str, file: str) -> Any:
    from aapt_deploy.backends.trt import cuda
    from aapt_deploy.backends.trt.doctor import lean_run
    from aapt_deploy.ops.block_causal_attention import kernels
    from tests.support.cuda_emulator import Driver

    kernels.launcher = lambda layout, head_dim: launchers  # they would be compiled for a GPU
    device = cuda.Device(Driver())
    answer = lean_run.answer(form, Path(file), device)
    device.close()
    return answer


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])), flush=True)
