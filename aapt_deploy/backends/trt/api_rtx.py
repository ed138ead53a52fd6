"""The calls that only TensorRT-RTX has. api.py makes them when that is the flavour.

    set_targets       compute capabilities of a plan
    runtime_config    just-in-time compiled code that is kept between starts; CUDA graphs
    validity          whether a plan can run on this GPU, before it is opened

`trt` is the bindings module. None of this has run on a GPU yet; building has.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aapt_deploy.backends.trt.doctor.receipts import write_whole


def set_targets(trt: Any, config: Any, sms: Sequence[int]) -> None:
    """Build one plan for all of `sms`. Without this, it would be for SM 80."""
    config.num_compute_capabilities = len(sms)
    for index, sm in enumerate(sms):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)


def runtime_config(trt: Any, engine: Any, kept: Path | None, captured: bool) -> tuple[Any, Any]:
    """Return the configuration of a context, and its cache of compiled code.

    `kept` is the file of an earlier run. A damaged one, or another GPU's, counts as missing.
    `captured` if the caller captures CUDA graphs; else TensorRT-RTX does.
    """
    config = engine.create_runtime_config()
    strategies = trt.CudaGraphStrategy
    config.cuda_graph_strategy = strategies.DISABLED if captured else strategies.WHOLE_GRAPH_CAPTURE
    cache = config.create_runtime_cache()
    if kept is not None and kept.is_file():
        cache.deserialize(kept.read_bytes())
    config.set_runtime_cache(cache)
    return config, cache


def capturable(context: Any, stream: int) -> bool:
    return bool(context.is_stream_capturable(stream))


def keep(cache: Any, file: Path) -> None:
    """Write what was compiled, for the next start. Raises OSError."""
    write_whole(file, memoryview(cache.serialize()))


def validity(trt: Any, runtime: Any, plan: bytes) -> tuple[str, list[str]]:
    """Return "VALID", "SUBOPTIMAL" or "INVALID", and the names of what is wrong."""
    answer, bits = runtime.get_engine_validity(plan)
    kinds = trt.EngineInvalidityDiagnostics
    names = (name for name in dir(kinds) if name.isupper())
    wrong = [name for name in names if int(bits) & int(getattr(kinds, name))]
    return str(answer.name), sorted(wrong)
