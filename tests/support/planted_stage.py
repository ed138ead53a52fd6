"""A stage of a bench with faults planted into it: planted_stage.py PLAN SCRIPT ARGUMENTS ..

PLAN is JSON: by stage, by a part of a part's name, what happens there. Some packages are missing
as well, as they are on the machines that benches run on. tests/bench/test_gpu.py runs this.
"""

import functools
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parents[2] / "bench"
MISSING = ("av", "cudnn", "flash_attn_interface", "modelopt", "pydantic", "pynvml", "tensorrt")


def hang() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(3600)


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def refuse() -> None:
    raise RuntimeError("CUDA error: an illegal instruction was encountered")


def see_only_the_block(true: Callable[..., Any]) -> Callable[..., Any]:
    """A wrong attention kernel: it takes every cache for empty."""

    @functools.wraps(true)
    def attend(inputs: list[Any], numbers: list[int], outputs: Any) -> Any:
        return true([*inputs[:5], inputs[5] * 0, *inputs[6:]], numbers, outputs)

    return attend


def main() -> None:
    plan, script = json.loads(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    sys.path[:0] = [str(BENCH), str(BENCH.parent), str(BENCH.parent / "tests")]
    for name in MISSING:
        sys.modules[name] = None  # type: ignore[assignment]
    faults = plan.get(sys.argv[sys.argv.index("--stage") + 1], {})
    import stages

    true = stages.Parts.run

    def run(parts: Any, name: str, call: Callable[[], Any], seconds: float | None = None) -> Any:
        fault = next((what for key, what in faults.items() if key in name), None)
        if fault is None:
            return true(parts, name, call, seconds)
        what = {"hang": hang, "stall": hang, "crash": crash, "refuse": refuse}[fault]
        return true(parts, name, what, 2 if fault == "hang" else None)

    stages.Parts.run = run  # type: ignore[method-assign]
    if faults.get("kernel") == "wrong":
        import attention_small

        attention_small.attend = see_only_the_block(attention_small.attend)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
