"""What TensorRT says and what the user is told to do."""

import pytest

from aapt_deploy.backends.trt.remedies import REMEDIES, UNKNOWN, NodeError, refusal, sentences


def hint(said: str) -> str:
    return refusal("TensorRT cannot build x.onnx", [], [said]).hint


SAID = (  # words as the documentation and public reports have them
    ("Networks with FP8 Q/DQ layers require hardware with FP8 support", "SM 89"),
    ("Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)", "smaller profile"),
    ("[cudaResources.cpp] CUDA error 2 : out of memory", "smaller profile"),
    (
        "Error Code 10: Could not find any implementation for node {ForeignNode[a...b]}",
        "--attention native",
    ),
    (
        "could not find any supported formats consistent with input/output data types",
        "one version of aapt_deploy",
    ),
    (
        "Plugin not found, are the plugin name, version, and namespace correct?",
        "one version of aapt_deploy",
    ),
    ("IPluginV3::onShapeChange: error code 4: status -1", "older than the kernels"),
    ("ptxas fatal: Unsupported .version; PTX JIT compilation failed", "565"),
    ("No importer registered for op: TensorScatter", "newer TensorRT"),
    ("Failed to open file: generator.onnx.data", "export the bundle again"),
    ("network has dynamic inputs, but no optimization profile has been defined", "static"),
    (
        "Error Code 1: Serialization (Serialization assertion stdVersionRead == "
        "kSERIALIZATION_VERSION failed.)",
        "another TensorRT",
    ),
    (
        "The engine plan file is generated on an incompatible device, expecting compute 9.0 got "
        "compute 8.9",
        "another GPU",
    ),
    ("CUDA initialization failure with error: 35", "update the NVIDIA driver"),
    ("an illegal memory access was encountered", "aapt doctor --tensorrt"),
    ("No space left on device", "free some space"),
)


@pytest.mark.parametrize(("said", "wanted"), SAID)
def test_what_is_known_comes_with_what_can_be_done(said: str, wanted: str) -> None:
    assert wanted in hint(said)


def test_what_is_not_known_is_passed_on() -> None:
    assert hint("a new sort of trouble") == UNKNOWN


def test_every_hint_is_one_line_and_every_row_is_reached() -> None:
    assert all(
        "\n" not in remedy.hint and remedy.hint == remedy.hint.strip() for remedy in REMEDIES
    )
    assert len({hint(said) for said, _ in SAID}) >= 13


def test_the_cause_comes_first_with_its_node_and_nothing_twice() -> None:
    """A driver's absence is told with every failure, and the parser repeats its errors."""
    absent = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (cudaError 35: old)"
    node = NodeError(
        "MatMul", "w", f"Invalid Node - w\nError Code 4: Shape Error (w: odd)\n{absent}"
    )
    kept = ["ModelImporter.cpp:140: While parsing node number 3:", absent, "something else"]
    told = refusal("it cannot read x", [node], kept)
    assert str(told) == "it cannot read x: MatMul node 'w': odd"
    assert str(refusal("it cannot start", [], [absent])) == "it cannot start: cudaError 35: old"
    assert str(refusal("it cannot start", [], [])) == "it cannot start: it gave no reason"


def test_a_message_loses_its_places_in_the_source() -> None:
    text = (
        "IBuilder::build: Error Code 1: Myelin ([tactic.cpp:16: pick] no tactics; "
        "[tactic.cpp:26: run] Error. In compileGraph at /_src/x/y.cpp:2012)\nsame\nsame"
    )
    assert sentences(text) == ["no tactics; Error", "same"]
