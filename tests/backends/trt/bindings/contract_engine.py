"""The whole engine through strict fakes: every call to TensorRT and the CUDA driver.

It runs over a ring that wraps. TensorRT's runtime classes are fakes made from this release's
stubs. The CUDA driver is tests/support/cuda_emulator.py, which checks every call against the
real bindings' signatures. Both write into one journal, which is compared with a golden one.
Nothing is computed.
"""

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from aapt_deploy.errors import MachineError
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.ops.block_causal_attention import NEXT, Ring, hopper_fp8, kernels
from tests.support.bindings import GOLDEN, type_stubs
from tests.support.bindings.build_rig import small
from tests.support.bindings.recorder import Recorder, Stubs
from tests.support.cuda_emulator import Driver

TYPES = {"float32": "FLOAT", "int32": "INT32", "int64": "INT64", "uint8": "UINT8"}
BLOCKS = 4  # the ring has two places: blocks 2 and 3 overwrite 0 and 1
CACHED = ("k_cache", "v_cache", "k_block", "v_block")


class Rig:
    """The engine over fakes of one release."""

    def __init__(
        self,
        trt: ModuleType,
        release: str,
        monkeypatch: pytest.MonkeyPatch,
        folder: Path,
        layout: str,
    ) -> None:
        stubs = Stubs(type_stubs.type_stubs(release) / "tensorrt" / "__init__.pyi")
        self.recorder, self.driver, self.profile = Recorder(trt, stubs, {}), Driver(), small()
        self.driver.journal = self.recorder.journal
        self.api = importlib.import_module("aapt_deploy.backends.trt.api")
        self.engine = importlib.import_module("aapt_deploy.backends.trt.engine")
        monkeypatch.setattr(trt, "Runtime", self.recorder.constructor("Runtime"))
        self.trt, self.tensors = trt, list[tuple[str, bool, str, tuple[int, ...]]]()
        self.layout = layout
        self.recorder.script |= {
            "Runtime.deserialize_cuda_engine": self._deserialise,
            "ICudaEngine.num_io_tensors": lambda: len(self.tensors),
            "ICudaEngine.get_tensor_name": lambda index: self.tensors[index][0],
            "ICudaEngine.device_memory_size_v2": 4096,
            "ICudaEngine.get_tensor_mode": (
                lambda name: getattr(trt.TensorIOMode, "INPUT" if self._one(name)[1] else "OUTPUT")
            ),
            "ICudaEngine.get_tensor_dtype": lambda name: getattr(trt.DataType, self._one(name)[2]),
            "ICudaEngine.get_tensor_shape": lambda name: self._one(name)[3],
            "EngineInspector.get_engine_information": (
                '{"Layers": [{"Name": "a", "LayerType": "PluginV3", "TacticName": "aapt"}]}'
            ),
        }  # fmt: skip
        plans = {}
        for graph in signatures(self.profile):
            file = folder / f"{graph}.plan"
            file.write_bytes(graph.encode())
            plans[graph] = self.api.open_plan(file)
        self.opened = len(self.recorder.journal)
        device = importlib.import_module("aapt_deploy.backends.trt.cuda").Device(self.driver)
        options = self.engine.RunOptions(
            scales=self._scales(), launch=lambda head_dim: self._launch
        )
        functions = {
            name: self.driver.CUfunction(1000 + index) for index, name in enumerate(kernels.ABI)
        }
        self.kernels = kernels.Kernels(self.driver, None, functions)
        self.engines = self.engine.TrtEngines(self.profile, plans, device, "fp8_e4m3", options)

    def _deserialise(self, plan: Any) -> Any:
        graph = bytes(plan).decode()
        signature = signatures(self.profile)[graph]
        kinds = [(spec, True) for spec in (*signature.inputs, *signature.state)] + [
            (spec, False) for spec in signature.outputs
        ]
        self.tensors = [(spec.name, is_input, *self._stored(spec)) for spec, is_input in kinds]
        if graph != "generator":
            self.tensors += [
                (spec.name + NEXT, False, "FLOAT", spec.shape) for spec in signature.state
            ]
        return self.recorder.make("ICudaEngine")

    def _stored(self, spec: Any) -> tuple[str, tuple[int, ...]]:
        if spec.name.startswith(CACHED) and self.layout == "hopper_fp8":
            return "FP8", hopper_fp8.image_shape(
                self.profile.model.heads, spec.shape[1], self.profile.head_dim
            )
        if spec.name.startswith((*CACHED, "text_")):
            return "BF16", spec.shape
        return TYPES[spec.dtype], spec.shape

    def _one(self, name: str) -> tuple[str, bool, str, tuple[int, ...]]:
        return next(tensor for tensor in self.tensors if tensor[0] == name)

    def _scales(self) -> list[hopper_fp8.Scales]:
        heads, dim = self.profile.model.heads, self.profile.head_dim
        one = hopper_fp8.Scales(
            np.ones(heads, np.float32),
            np.ones(heads, np.float32),
            np.zeros((heads, dim), np.float32),
            np.ones((heads, dim), np.float32),
        )
        return [one] * self.profile.model.depth

    def _launch(self, kernel: str, inputs: Any, numbers: Any, outputs: Any, stream: int) -> None:
        shown = [" ".join(map(self.driver.show, part)) for part in (inputs, numbers, outputs)]
        self.recorder.journal.append(f"{kernel}: {' | '.join(shown)}")
        self.kernels(kernel, inputs, numbers, outputs, stream)

    def stream(self) -> None:
        """A start and BLOCKS blocks, as the rollout asks for them."""
        engines, note = self.engines, self.recorder.journal.append
        generator, decoder = engines["generator"], engines["decoder"]
        given = {
            spec.name: np.zeros(spec.shape, spec.dtype)
            for spec in signatures(self.profile)["generator"].inputs
            if spec.name != "cache_len"
        }
        note("-- start")
        generator.reset()
        decoder.reset()
        latent = engines["encoder"].run(
            image=np.zeros(signatures(self.profile)["encoder"].inputs[0].shape, np.uint8)
        )["latent"]
        decoder.run(latent=latent)
        note("-- a prompt")
        generator.reset(
            **engines["prompt"].run(text=np.zeros((1, self.profile.text.tokens), np.int64))
        )
        for block in range(BLOCKS):
            note(f"-- block {block}")
            clean = generator.run(block=block, **given)["clean"]
            note(f"   cache_len {generator.inputs.arrays['cache_len'][0]}")
            generator.commit(block)
            if self.layout == "hopper_fp8":
                note(f"   slot {generator.cache.slot[0]}")
            decoder.run(latent=clean)

    def golden(self, name: str, write: bool, since: int = 0) -> None:
        lines: list[list[Any]] = []
        for raw in self.recorder.journal[since:]:
            line = re.sub(
                r"\d{14,}", lambda found: self.driver.show(int(found[0])), raw
            )  # addresses that TensorRT was given
            if lines and lines[-1][0] == line:
                lines[-1][1] += 1
            else:
                lines.append([line, 1])
        text = "".join(
            f"{line}\n" if count == 1 else f"{line} x {count}\n" for line, count in lines
        )
        file = GOLDEN / f"{name}.txt"
        if write:
            GOLDEN.mkdir(exist_ok=True)
            file.write_text(text)
        assert text == file.read_text()


@pytest.fixture
def write(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--write-golden"))


@pytest.mark.parametrize("layout", ["hopper_fp8", "token_major"])
def test_a_stream_is_these_calls(
    trt: ModuleType,
    release: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    layout: str,
    write: bool,
) -> None:
    rig = Rig(trt, release, monkeypatch, tmp_path, layout)
    rig.stream()
    rig.recorder.journal.append("-- close")
    rig.engines.close()
    rig.golden(f"stream-{layout}", write, rig.opened)


def test_every_block_launches_the_same_graphs_and_only_its_numbers_differ(
    trt: ModuleType, release: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rig = Rig(trt, release, monkeypatch, tmp_path, "hopper_fp8")
    rig.stream()
    journal = rig.recorder.journal
    blocks = "\n".join(journal[journal.index("-- block 0") :]).split("-- block ")[1:]
    launched = [
        [
            line
            for line in block.splitlines()
            if line.startswith(("cuGraphLaunch", "IExecutionContext", "cuLaunchKernel"))
        ]
        for block in blocks
    ]
    assert launched[0] == launched[2] and launched[1] == launched[3]
    assert (
        launched[0][:2] == launched[1][:2] and launched[0][2] != launched[1][2]
    )  # the decoder's memory alternates
    ring = Ring.of(rig.profile)
    for block, text in enumerate(blocks):
        assert (
            f"cache_len {ring.place(block).cache_len}\n" in text
            and f"slot {ring.place(block).slot}\n" in text
        )
    rig.engines.close()


def test_layer_times_are_these_calls(
    trt: ModuleType, release: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write: bool
) -> None:
    rig = Rig(trt, release, monkeypatch, tmp_path, "hopper_fp8")
    reported: list[Any] = []

    def report() -> bool:
        reported.append(len(reported))
        profiler = next(reversed(profilers))
        profiler.report_layer_time("a", 2.0)
        profiler.report_layer_time("b", float(len(reported)))
        return True

    profilers: list[Any] = []
    made = rig.api.LayerTimes
    monkeypatch.setattr(rig.api, "LayerTimes", lambda: profilers.append(made()) or profilers[-1])
    rig.recorder.script["IExecutionContext.report_to_profiler"] = report
    begun = len(rig.recorder.journal)
    found = rig.engines.layer_times(3)
    rig.golden("layers", write, begun)
    first = found["generator"]
    assert [(row.name, row.kind, row.tactic, row.ms) for row in first] == [
        ("a", "PluginV3", "aapt", 2.0),
        ("b", "", "", 2.0),
    ]
    rig.recorder.script["IExecutionContext.report_to_profiler"] = False
    with pytest.raises(MachineError, match="layer times"):
        rig.engines.layer_times(1)
    rig.engines.close()


def test_a_plan_that_cannot_be_captured_is_told_and_everything_is_given_back(
    trt: ModuleType, release: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers = [True, False]
    with monkeypatch.context() as patch:
        real = Recorder.reply

        def reply(self: Recorder, key: str, *rest: Any) -> Any:
            return (
                answers.pop(0)
                if key == "IExecutionContext.execute_async_v3" and answers
                else real(self, key, *rest)
            )

        patch.setattr(Recorder, "reply", reply)
        with pytest.raises(MachineError, match="TensorRT cannot run the plan"):
            Rig(trt, release, patch, tmp_path, "hopper_fp8")
