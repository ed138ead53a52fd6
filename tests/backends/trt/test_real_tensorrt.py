"""Our graphs in the real parser and compiler of TensorRT-RTX, which needs no GPU.

The embedded checkpoint and the 8B shape are in tests/bench/test_rtx.py.

Every lowered graph must be taken, for all GPUs that a plan may be for. Mistakes of the past are
planted, and the real library must find each. Its own words are the tests of remedies.py. Plans are
never executed here.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from aapt_deploy.backends.trt.build import may_decompose
from aapt_deploy.backends.trt.doctor import cases
from aapt_deploy.backends.trt.doctor.receipts import NATIVE, NATIVE_FP8, Choice
from aapt_deploy.backends.trt.flavour import RTX
from aapt_deploy.backends.trt.loading import api_of
from aapt_deploy.backends.trt.lower import lower
from aapt_deploy.backends.trt.lower_attention import lower_for_plugin
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.bundle.scales import FILE as SCALES
from aapt_deploy.bundle.scales import load as load_scales
from aapt_deploy.errors import AaptError, BundleError, MachineError, UsageError
from aapt_deploy.models.family import family_of
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.profiles import Profile
from tests.support import ROOT
from tests.support.bundles import rewrite_manifest
from tests.support.tiny import Exported

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has no wheels for this Python")

ALL, FP8 = (80, 86, 89, 120, 121), (89, 120, 121)
NATIVE_FORM = Choice(NATIVE, packed=False, captured=True, reason="")
CODES = (NATIVE_FP8,)  # forms whose caches hold codes
GB = 1_000_000_000
FLOAT, BF16, UINT8 = TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.UINT8
CACHES = ("k_cache", "v_cache", "k_block", "v_block", "text_")


@pytest.fixture(scope="module")
def api() -> Any:
    return api_of(RTX)


def built(api: Any, path: Path, sms: tuple[int, ...] = (89,), **more: Any) -> Any:
    """Build the graph at `path`; return the BuiltPlan. Raises what api.build raises."""
    settings = api.Settings(0, more.pop("workspace_bytes", 2 * GB), sms=sms, **more)
    return api.build(path, settings)


def all_built(
    api: Any, path: Path, precision: str, folder: Path, sms: tuple[int, ...], form: str = NATIVE
) -> None:
    """Lower and build every graph of a bundle, and compare the networks with the signature."""
    opened, choice = Bundle.open(path), Choice(form, packed=False, captured=True, reason="")
    scales = (
        load_scales(opened.checked(SCALES), opened.profile).attention if form in CODES else None
    )
    cached = "FP8" if form in CODES else "BF16"
    for name, signature in family_of(opened.profile).signatures(opened.profile).items():
        lowered = lower(opened, name, precision, choice, scales, folder)
        plan = built(api, lowered.path, sms, decomposable=may_decompose(name, precision))
        assert len(plan.plan) > 1000 and plan.timing_cache == b""
        found = {tensor.name: tensor for tensor in plan.tensors}
        for spec in (*signature.inputs, *signature.state, *signature.outputs):
            tensor = found[spec.name]
            half = precision != "fp32" and name != "decoder" and spec.name.startswith(CACHES)
            kind = cached if half else {"float32": "FLOAT"}.get(spec.dtype, spec.dtype.upper())
            assert (tensor.dtype, tensor.shape) == (kind, spec.shape), tensor


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_graph_of_the_wan_family_is_built_for_every_gpu(
    api: Any, wan_bundle: Path, tmp_path: Path, precision: str
) -> None:
    """Several latent frames a block, cross-attention, 33 memories; no engine runs them yet."""
    all_built(api, wan_bundle, precision, tmp_path, ALL)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_graph_is_built_for_every_gpu(
    api: Any, bundle: Path, tmp_path: Path, precision: str
) -> None:
    all_built(api, bundle, precision, tmp_path, ALL)


@pytest.mark.parametrize("form", [NATIVE, NATIVE_FP8])
def test_every_graph_in_fp8_is_built_for_every_gpu_that_has_it(
    api: Any, exported: Exported, tmp_path: Path, form: str
) -> None:
    all_built(api, exported.path, "fp8", tmp_path, FP8, form)


# --- what is refused before TensorRT is asked ---


def test_gpus_that_cannot_run_a_plan_are_refused_with_the_cure() -> None:
    assert RTX.targets((), None, "bf16") == (86, 89, 120)
    assert RTX.targets((), None, "fp8") == (89, 120)
    assert RTX.targets((), 121, "fp8") == (121,)
    assert RTX.targets((120, 89, 120), 86, "bf16") == (89, 120)
    with pytest.raises(MachineError, match="SM 75 has no fast products in float32 or bf16"):
        RTX.targets((75, 89), None, "fp32")
    with pytest.raises(UsageError, match="cannot build for SM 90") as caught:
        RTX.targets((90,), None, "bf16")
    assert "80, 86, 89, 120, 121" in caught.value.hint
    for sm in (80, 86):
        with pytest.raises(MachineError, match=f"SM {sm} has no products in FP8") as refused:
            RTX.targets((89, sm), None, "fp8")
        assert "--precision bf16" in refused.value.hint


def test_a_graph_with_a_node_of_ours_is_refused_before_it_is_parsed(
    copied: Path, tmp_path: Path
) -> None:
    """An encoder that somebody put our attention into."""
    model = onnx.load(copied / "encoder.onnx")
    model.graph.node.append(
        helper.make_node("BlockCausalAttention", ["latent"], ["more"], "odd", domain="aapt")
    )
    model.opset_import.append(helper.make_opsetid("aapt", 1))
    (copied / "encoder.onnx").write_bytes(model.SerializeToString())
    entry = {"bytes": (copied / "encoder.onnx").stat().st_size}
    entry["sha256"] = (
        __import__("hashlib").sha256((copied / "encoder.onnx").read_bytes()).hexdigest()
    )
    rewrite_manifest(copied, lambda manifest: manifest["files"].update({"encoder.onnx": entry}))
    with pytest.raises(BundleError, match="has BlockCausalAttention node 'odd'"):
        lower(Bundle.open(copied), "encoder", "bf16", NATIVE_FORM, None, tmp_path)


PLUGIN_IN_RTX = """
import sys
from pathlib import Path
import tensorrt_rtx_bindings as trt

class Creator(trt.IPluginCreatorV3One):
    def __init__(self):
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_namespace, self.plugin_version = "BlockCausalAttention", "aapt", "1"
        self.field_names = trt.PluginFieldCollection([])
    def create_plugin(self, name, fields, phase):
        raise RuntimeError("asked for a plugin")

creator = Creator()
trt.get_plugin_registry().register_creator(creator, "aapt")
logger = trt.Logger(trt.Logger.ERROR)
network = trt.Builder(logger).create_network(0)
parsed = trt.OnnxParser(network, logger).parse_from_file(sys.argv[1])
print("parsed" if parsed else "refused")
"""


def test_the_parser_has_no_plugins(
    loaded: Any, bundle: Path, tiny: Profile, tmp_path: Path
) -> None:
    """It does not take our plugin's node: it refuses the graph, or ends the process."""
    model = lower_for_plugin(onnx.load(bundle / "generator.onnx"), Ring.of(tiny), None)
    path = tmp_path / "plugin.onnx"
    path.write_bytes(model.SerializeToString())
    done = subprocess.run(
        [sys.executable, "-c", PLUGIN_IN_RTX, str(path)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0 or done.stdout.splitlines()[-1] == "refused", done


# --- mistakes that the real library finds, and what a user is told ---


def value(name: str, shape: list[Any], kind: int = FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def graph(nodes: list[Any], inputs: list[Any], outputs: list[Any], *constants: Any) -> ModelProto:
    made = helper.make_graph(nodes, "broken", inputs, outputs, list(constants))
    domains = [helper.make_opsetid("", 24), helper.make_opsetid("aapt", 1)]
    return helper.make_model(made, opset_imports=domains, ir_version=10)


def one(operator: str, *inputs: str, name: str = "odd", **attributes: Any) -> Any:
    return helper.make_node(operator, list(inputs), ["y"], name, **attributes)


def outside(location: str, length: int) -> ModelProto:
    """A product with a weight in the file `location`."""
    weight = TensorProto(name="w", data_type=FLOAT, dims=[64, 64])
    weight.data_location = TensorProto.EXTERNAL
    for key, said in (("location", location), ("offset", "0"), ("length", str(length))):
        weight.external_data.add(key=key, value=said)
    return graph([one("MatMul", "x", "w")], [value("x", [2, 64])], [value("y", [2, 64])], weight)


SQUARE = [value("x", [8, 8])]
OUT = [value("y", [8, 8])]
HEADS = [value(name, [1, 4, 64, 64]) for name in "qkv"]


def uint8_moved_before_its_cast() -> ModelProto:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], "turn", perm=[1, 0]),
        one("Cast", "t", name="after", to=FLOAT),
    ]
    return graph(nodes, [value("x", [8, 8], UINT8)], OUT)


def uint8_cast_before_it_is_moved() -> ModelProto:
    nodes = [
        helper.make_node("Cast", ["x"], ["t"], "early", to=UINT8),
        one("Transpose", "t", name="after", perm=[1, 0]),
    ]
    return graph(nodes, SQUARE, [value("y", [8, 8], UINT8)])


def two_types() -> ModelProto:
    cast = helper.make_node("Cast", ["x"], ["half"], "cast", to=BF16)
    return graph([cast, one("MatMul", "x", "half")], SQUARE, OUT)


def scores_of_16_million() -> ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "z"], ["scores"], "first"),
        helper.make_node("Softmax", ["scores"], ["weights"], "softmax"),
        one("MatMul", "weights", "x"),
    ]
    inputs = [value("x", [4096, 64]), value("z", [64, 4096])]
    return graph(nodes, inputs, [value("y", [4096, 64])])


Case = tuple[Callable[[], ModelProto | bytes], dict[str, Any], type[AaptError], str, str]
BROKEN: dict[str, Case] = {
    "the old order of uint8": (
        uint8_moved_before_its_cast, {}, BundleError,
        "Transpose node 'turn': first input has type UInt8", "only where they enter or leave",
    ),
    "uint8 inside": (
        uint8_cast_before_it_is_moved, {}, BundleError,
        "Cast node 'early': legalUINT8: TensorRT does not support UINT8", "only where they enter",
    ),
    "attention in float32": (
        lambda: graph([one("Attention", "q", "k", "v")], HEADS, [value("y", [1, 4, 64, 64])]), {},
        BundleError, "Attention operation was not supported", "--precision bf16",
    ),
    "two types": (
        two_types, {}, BundleError,
        "MatMul node 'odd': IMatrixMultiplyLayer must have same input types", "types in the graph",
    ),
    "a shape": (
        lambda: graph([one("MatMul", "x", "z")], [*SQUARE, value("z", [9, 8])], OUT), {},
        BundleError, "MatMul node 'odd': last dimension of input0 = 8", "shapes in the graph",
    ),
    "shapes of a sum": (
        lambda: graph([one("Add", "x", "z")], [*SQUARE, value("z", [9, 8])], OUT), {},
        BundleError, "Add node 'odd': broadcast dimensions", "shapes in the graph",
    ),
    "no file of weights": (
        lambda: outside("absent.bin", 16384), {}, BundleError,
        "Failed to open file", "copy bundles whole",
    ),
    "a short file of weights": (
        lambda: outside("short.bin", 16384), {}, BundleError, "out of range", "copy bundles whole",
    ),
    "weights outside": (
        lambda: outside("../short.bin", 100), {}, BundleError,
        "Relative paths", "copy bundles whole",
    ),
    "an empty file": (lambda: b"", {}, BundleError, "has no outputs", "export the bundle again"),
    "no outputs": (
        lambda: graph([one("Relu", "x")], SQUARE, []), {}, BundleError, "has no outputs", "export",
    ),
    "half a file": (
        lambda: scores_of_16_million().SerializeToString()[:60], {}, BundleError,
        "Failed to parse the ONNX model", "export the bundle again",
    ),
    "an operator that does not exist": (
        lambda: graph([one("Nonsense", "x")], SQUARE, OUT), {}, BundleError,
        "Nonsense node 'odd': creator", "one version of aapt_deploy",
    ),
    "a shape that is not fixed": (
        lambda: graph([one("Relu", "x")], [value("x", ["n", 8])], [value("y", ["n", 8])]), {},
        BundleError, "without a fixed shape: x [-1, 8]", "must be static",
    ),
    "fp8 on an older GPU": (
        lambda: cases.fp8_product().model, {"sms": (80,)}, MachineError,
        "fp8_e4m3", "SM 89 or newer",
    ),
    "float32 on Turing": (
        lambda: graph([one("MatMul", "x", "x")], SQUARE, OUT), {"sms": (75,)}, MachineError,
        "FP32 GEMM is not supported", "SM 80 or newer",
    ),
    "no scratch memory": (
        scores_of_16_million, {"workspace_bytes": 1000}, MachineError,
        "within workspace limit", "aapt plan",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_graph_is_one_line_with_its_cause_and_a_cure(
    api: Any, tmp_path: Path, case: str
) -> None:
    make, settings, kind, said, cure = BROKEN[case]
    (tmp_path / "short.bin").write_bytes(bytes(100))
    made = make()
    path = tmp_path / "broken.onnx"
    path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    with pytest.raises(AaptError) as caught:
        built(api, path, **settings)
    text = str(caught.value)
    assert type(caught.value) is kind and said in text and cure in caught.value.hint, (
        text, caught.value.hint,
    )  # fmt: skip
    assert "\n" not in text and text.count(said) == 1, text
    assert "cudaError" not in text and "/_src/" not in text and ".cpp:" not in text, text


# --- a machine without a driver ---


def test_a_plan_that_is_opened_without_a_driver_names_the_driver(
    api: Any, bundle: Path, tmp_path: Path
) -> None:
    lowered = lower(Bundle.open(bundle), "encoder", "fp32", NATIVE_FORM, None, tmp_path)
    file = tmp_path / "encoder.plan"
    file.write_bytes(built(api, lowered.path).plan)
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has a driver")
    with pytest.raises(MachineError, match=r"cannot load plan .*CUDA driver") as caught:
        api.open_plan(file)
    assert "NVIDIA driver" in caught.value.hint
    assert api.validity(file) == ("INVALID", [])  # it cannot know
    file.write_bytes(b"not a plan" * 100)
    assert api.validity(file) == ("INVALID", ["MALFORMED_ENGINE"])
    with pytest.raises(BundleError, match="cannot load plan") as damaged:
        api.open_plan(file)
    assert "build the engine again" in damaged.value.hint
    file.write_bytes(b"")
    for name in (file, tmp_path / "missing.plan"):
        with pytest.raises(BundleError, match="cannot be read"):
            api.open_plan(name)


# --- progress ---


class Told:
    """Progress of a build; `at_step` is called from TensorRT's thread."""

    def __init__(self, at_step: Callable[[], None] = lambda: None) -> None:
        self.phases: list[tuple[str, int]] = []
        self.open: list[str] = []
        self.steps, self.at_step = 0, at_step

    def phase(self, name: str, parent: str | None, steps: int) -> None:
        assert parent is None or parent in self.open
        self.phases.append((name, steps))
        self.open.append(name)

    def step(self, name: str, step: int) -> None:
        self.steps += 1
        self.at_step()

    def done(self, name: str) -> None:
        self.open.remove(name)


def test_progress_is_passed_on(api: Any, bundle: Path, tmp_path: Path) -> None:
    lowered = lower(Bundle.open(bundle), "decoder", "fp32", NATIVE_FORM, None, tmp_path)
    told = Told()
    api.build(lowered.path, api.Settings(0, 2 * GB, sms=(89,)), told)
    assert told.phases[0][0] == "Building engine" and told.steps > 10 and told.open == []


def test_a_failing_progress_bar_ends_the_build_and_is_told(
    api: Any, bundle: Path, tmp_path: Path
) -> None:
    def fail() -> None:
        raise OSError("the terminal is gone")

    lowered = lower(Bundle.open(bundle), "decoder", "fp32", NATIVE_FORM, None, tmp_path)
    told = Told(fail)
    with pytest.raises(OSError, match="terminal"):
        api.build(lowered.path, api.Settings(0, 2 * GB, sms=(89,)), told)
    assert told.steps == 1


# --- the command ---


def test_build_engine_makes_plans_that_wait_for_their_gpu(
    aapt: Any, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ran = aapt(
        "build-engine", bare, "--backend", "tensorrt-rtx", "--precision", "bf16", "--sm", "89,12.0"
    )
    assert ran.code == 0, ran.err
    assert "for SM 89, 120, which is not here: plans are built and not run" in ran.err
    assert "not run" in ran.err and "building decoder" in ran.err
    entry = Bundle.open(bare).engines["tensorrt-rtx-bf16"]
    assert entry["step_ms"] is None and entry["parity"] == {} and entry["psnr_db"] is None
    assert {tuple(receipt["sms"]) for receipt in entry["receipts"].values()} == {(89, 120)}
    assert Bundle.open(bare).verify() > 0
    assert not list((tmp_path / "cache").rglob("*.plan")), "a plan that the bundle has now is kept"
    if not Path("/proc/driver/nvidia/version").exists():
        ran = aapt("stream", bare, "--backend", "tensorrt-rtx", "-o", tmp_path / "x.mp4")
        assert ran.code == 5 and "never compared" in ran.err and "no NVIDIA driver" in ran.error


COMMAND = ("-m", "aapt_deploy", "build-engine")
OPTIONS = ("--backend", "tensorrt-rtx", "--precision", "fp32", "--sm", "89")


def started(bundle: Path, cache: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *COMMAND, str(bundle), *OPTIONS],
        env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_of_two_builds_in_one_bundle_one_builds(bare: Path, tmp_path: Path) -> None:
    both = [started(bare, tmp_path / "cache") for _ in range(2)]
    told = [process.communicate(timeout=300) for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 7], [0, 0]), told  # [0, 0] where the first was done before the second came
    assert "tensorrt-rtx-fp32" in Bundle.open(bare).engines and Bundle.open(bare).verify()
    assert all("Traceback" not in err for _, err in told)


MOMENTS = (
    "lowering generator", "building generator", "building generator: Building engine",
    "building prompt", "building decoder: Building engine",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_build_that_is_stopped_leaves_the_bundle_as_it_was_and_resumes(
    bare: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """At five moments of one build, each of which goes on where the last one stopped."""
    before = {path: path.read_bytes() for path in bare.rglob("*") if path.is_file()}
    seen = []
    for words in MOMENTS:
        process = started(bare, tmp_path / "cache")
        assert process.stderr is not None
        for line in process.stderr:
            if words in line:
                break
        began = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        seen.append(round(time.monotonic() - began, 2))
        assert process.returncode == 128 + number, (words, out, err)
        assert "Traceback" not in err and "error:" not in err, err
        left = {path for path in bare.rglob("*") if path.is_file()} - before.keys()
        assert {path.name for path in left} <= {".lock"}, (words, left)
        assert all(path.read_bytes() == content for path, content in before.items())
    print(f"{number.name}: seconds to end {seen}")
    process = started(bare, tmp_path / "cache")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "is built already" in err, err
    assert Bundle.open(bare).verify() and not list((tmp_path / "cache").rglob("*.plan"))
