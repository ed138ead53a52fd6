"""Our TensorRT code against the real Python bindings of two releases.

The machine needs neither TensorRT nor a GPU.

    link stubs    the bindings load over libraries that have only names (link_stubs.py)
    contracts     contract_*.py, run inside a process of its own for each release
    types         mypy over our TensorRT modules with stubs of each release; planted mistakes

The first run downloads the bindings (wheels.py); later ones need no network.
"""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aapt_deploy.backends.trt import flavour, loading
from aapt_deploy.errors import MachineError
from tests.support import ROOT
from tests.support.bindings import link_stubs, type_stubs, wheels

HERE = Path(__file__).parent
MODULES = (
    "backends/trt/api", "backends/trt/engine", "backends/trt/state", "backends/trt/cuda",
    "backends/trt/doctor/smallest_plugin", "backends/trt/doctor/bench",
    "backends/trt/doctor/probes",
    "backends/trt/build",
    "backends/trt/plugin/python", "backends/trt/plugin/ahead_of_time",
)  # fmt: skip

pytestmark = pytest.mark.skipif(
    not link_stubs.supported(), reason="link stubs are written for Linux on x86-64 and ARM64"
)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=HERE,
        env=os.environ | paths | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_stub_is_a_library_whose_functions_return_their_value(tmp_path: Path) -> None:
    for value in (0, 1):
        file = tmp_path / f"libstub{value}.so.7"
        file.write_bytes(link_stubs.library(file.name, ("first", "second"), value))
        loaded = ctypes.CDLL(str(file))
        assert [loaded.first(), loaded.second(5, 6)] == [value, value]
        with pytest.raises(AttributeError):
            _ = loaded.third


def test_without_tensorrt_its_module_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.delitem(sys.modules, "aapt_deploy.backends.trt.api", raising=False)
    with pytest.raises(MachineError) as caught:
        loading.api_of(flavour.PROPER)
    assert caught.value.hint == "pip install 'aapt_deploy[tensorrt]'"


def test_what_cannot_be_downloaded_is_told_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "FOLDER", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        wheels.Unavailable,
        match=r"(?s)tensorrt-cu13-bindings==11.* could not be downloaded for Python 3\..*"
        "PIP_FIND_LINKS",
    ):
        wheels.bindings("11.4")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


OLDER, NEWEST = wheels.RELEASES
RELEASES = [pytest.param(OLDER, marks=pytest.mark.slow), NEWEST]


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    """A release whose bindings are here. Skips, with pip's reason, if they cannot be fetched."""
    name: str = request.param
    try:
        wheels.bindings(name)
    except wheels.Unavailable as error:
        pytest.skip(str(error))
    return name


def test_contracts(release: str) -> None:
    files = sorted(HERE.glob("contract_*.py"))
    options = [
        "-p",
        "tests.support.bindings.inside",
        "--release",
        release,
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(HERE),
    ]
    options += ["-W", "error", "--tb=short", "-q"]
    done = run("-m", "pytest", *options, *map(str, files))
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    counted = re.search(r"(\d+) passed", done.stdout)
    assert counted and int(counted[1]) > 80 and "skipped" not in done.stdout, done.stdout[-500:]


PLANTED = """
import tensorrt as trt

def f(
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig,
    parser: trt.OnnxParser, context: trt.IExecutionContext
) -> None:
    config.set_flag("FP8")  # wrong: a name for an enum
    config.set_flag(8)  # wrong: a number for an enum
    config.max_workspace_size = 1 << 30  # wrong: of 8.x
    builder.build_cuda_engine(network)  # wrong: of 7.x
    config.set_timing_cache(config.create_timing_cache(b""))  # wrong: an argument is missing
    context.execute_async_v2([0], 0)  # wrong: of 9.x
    config.set_memory_pool_limit(trt.TacticSource.EDGE_MASK_CONVOLUTIONS, 1)  # wrong: another enum
    memoryview(builder.build_serialized_network(network, config))  # wrong: None is possible
    context.set_input_shape("x", (1, 2))
    config.set_flag(trt.BuilderFlag.TF32)
    config.set_flag(trt.BuilderFlag.FP8)  # wrong in 11.4
    flag = trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH  # wrong in 11.4
    builder.create_network(1 << int(flag))
    parser.supports_model(b"")  # wrong in 11.4
    network.add_attention_v2  # wrong in 10.16
"""


@pytest.mark.slow
def test_types(release: str, tmp_path: Path) -> None:
    """Our modules are clean, and every planted mistake is found."""
    planted = tmp_path / "planted.py"
    planted.write_text(PLANTED)
    stubs = type_stubs.type_stubs(release)
    files = [str(ROOT / "aapt_deploy" / f"{module}.py") for module in MODULES]
    options = [
        "--config-file",
        str(ROOT / "pyproject.toml"),
        "--follow-imports",
        "silent",
        "--no-error-summary",
        "--no-pretty",
    ]
    options += ["--cache-dir", str(stubs.parent / "mypy"), "--disable-error-code", "type-arg"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *files, str(planted)],
        cwd=ROOT, env=os.environ | {"MYPYPATH": str(stubs)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    found = {int(line) for line in re.findall(r"planted\.py:(\d+): error", done.stdout)}
    marks = ("# wrong:", f"# wrong in {release}")
    wanted = {
        number
        for number, line in enumerate(PLANTED.splitlines(), 1)
        if any(mark in line for mark in marks)
    }
    assert found == wanted, done.stdout
    assert [
        line for line in done.stdout.splitlines() if ": error" in line and "planted.py" not in line
    ] == [], done.stdout + done.stderr
