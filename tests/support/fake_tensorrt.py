"""A fake TensorRT whose plans are the lowered graphs, over an emulated device."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from aapt_deploy.backends.trt import cuda
from aapt_deploy.backends.trt.doctor import receipts
from aapt_deploy.backends.trt.doctor.receipts import Proof
from aapt_deploy.backends.trt.flavour import PROPER
from aapt_deploy.backends.trt.lower_fp8_attention import ATTENTION as FP8_ATTENTION
from aapt_deploy.backends.trt.lower_fp8_attention import TRT_DOMAIN
from aapt_deploy.backends.trt.lower_products import fp8_products
from aapt_deploy.backends.trt.plan_file import PlanLayer
from aapt_deploy.backends.trt.plans import Settings
from aapt_deploy.ops.block_causal_attention import NAME, kernels
from aapt_deploy.profiles import Profile
from tests.support import cuda_emulator
from tests.support.cuda_emulator import Driver
from tests.support.lowered_graphs import computed
from tests.support.native_fp8 import computed_fp8

VERSION = "11.4.0.106"
KINDS = {
    TensorProto.FLOAT: "FLOAT", TensorProto.INT32: "INT32", TensorProto.INT64: "INT64",
    TensorProto.UINT8: "UINT8", TensorProto.BFLOAT16: "BF16",
    TensorProto.FLOAT8E4M3FN: "FP8",
}  # fmt: skip


def kind_of(value: onnx.ValueInfoProto) -> str:
    return KINDS[value.type.tensor_type.elem_type]


@dataclass(frozen=True)
class Made:
    plan: memoryview
    timing_cache: bytes


class TensorRT:
    """The fake module: a plan is the graph's bytes."""

    def __init__(self, profile: Profile) -> None:
        self.driver, self.version, self.profile = Driver(), VERSION, profile
        self.built: list[str] = []
        self.settings: list[Settings] = []
        self.at_build: Callable[[str], None] = lambda graph: None
        self.change: Callable[[str, dict[str, np.ndarray]], None] = lambda graph, outputs: None
        self.layers: Callable[[list[PlanLayer]], list[PlanLayer]] = lambda layers: layers

    def build(
        self, graph: Path, settings: Settings, progress: Any, failures: Any, messages: Any
    ) -> Made:
        self.at_build(graph.stem)
        self.built.append(graph.stem)
        self.settings.append(settings)
        return Made(memoryview(graph.stem.encode().ljust(16) + graph.read_bytes()), b"timings")

    def open_plan(self, file: Path) -> cuda_emulator.Plan:
        content = file.read_bytes()
        graph, model = content[:16].decode().strip(), onnx.load_from_string(content[16:])
        coded = any(node.domain == TRT_DOMAIN for node in model.graph.node)
        coded |= graph == "prompt" and "FP8" in map(kind_of, model.graph.output)
        run = (computed_fp8 if coded else computed)(model, self.profile.block_tokens)

        def compute(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            found = dict(run(given))
            self.change(graph, found)
            return found

        tensors = [
            cuda_emulator.Tensor(
                v.name,
                side,
                kind_of(v),
                tuple(d.dim_value for d in v.type.tensor_type.shape.dim),
            )
            for side, values in ((True, model.graph.input), (False, model.graph.output))
            for v in values
        ]
        plan = cuda_emulator.Plan(self.driver, tensors, compute)
        kinds = {"Attention": "fmha", FP8_ATTENTION: "fmha", "MatMul": "gemm"}
        kinds |= {f"{NAME}{part}": "PluginV3" for part in ("", "Pack", "Attend")}
        eight = {name for names in fp8_products(model).values() for name in names}
        types = {
            node.name: ("FP8" if node.name in eight else "Float",) for node in model.graph.node
        }
        layers = [
            PlanLayer(node.name, kinds.get(node.op_type, "kgen"), "", types[node.name], ("Float",))
            for node in model.graph.node
        ]
        plan.layers = lambda: self.layers(layers)  # type: ignore[method-assign]
        return plan


@pytest.fixture
def here(
    tiny: Profile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one_core: None
) -> Iterator[TensorRT]:
    fake = TensorRT(tiny)
    module: Any = ModuleType("aapt_deploy.backends.trt.api")
    module.version, module.build, module.open_plan = (
        lambda: fake.version,
        fake.build,
        fake.open_plan,
    )
    module.Settings, module.Messages = Settings, lambda: None
    module.FLAVOUR = PROPER
    monkeypatch.setitem(sys.modules, "aapt_deploy.backends.trt.api", module)
    monkeypatch.setattr(cuda, "with_driver", lambda: cuda.Device(fake.driver))
    monkeypatch.setattr(
        "aapt_deploy.backends.trt.opening.with_driver", lambda: cuda.Device(fake.driver)
    )
    monkeypatch.setattr(cuda, "driver_release", lambda: "580.65.06")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("aapt_deploy.backends.trial.TUNING_BLOCKS", 2)
    yield fake
    assert not (
        fake.driver.held or fake.driver.pinned or fake.driver.streams or fake.driver.graphs
    ), "something was left behind"


def receipt(here: TensorRT, *names: str) -> None:
    device = cuda.Device(here.driver)
    receipts.save(
        device.gpu(here.version, kernels.source_hash()),
        [Proof(name, True, "", 1.0) for name in names],
    )
    device.close()
