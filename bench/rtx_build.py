"""Build one graph with TensorRT-RTX in this process, and measure it. `bench/rtx.py` starts it.

Reads {"graph", "settings"} as JSON from stdin; writes one line of JSON. Imports no torch and no
ONNX, so that the peak of resident memory is that of TensorRT and what it loads.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from aapt_deploy.backends.trt.flavour import RTX
from aapt_deploy.backends.trt.loading import api_of
from aapt_deploy.backends.trt.plans import Settings
from aapt_deploy.errors import AaptError


def peak_mb() -> float:
    """The most that was resident since this program began. `ru_maxrss` has its parent's, too."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM:"))
    return round(int(line.split()[1]) / 1024, 1)


def processor_s() -> float:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime


def build(graph: Path, settings: Settings) -> dict[str, Any]:
    """Build `graph`; return what it took. A refusal is a result too."""
    api = api_of(RTX)
    before_mb, before_s, began = peak_mb(), processor_s(), time.monotonic()
    made: dict[str, Any]
    try:
        built = api.build(graph, settings)
        made = {"plan_mb": round(len(built.plan) / 1e6, 3), "network_layers": built.network_layers}
    except AaptError as error:
        made = {"refused": str(error)}
    seconds, spent = time.monotonic() - began, processor_s() - before_s
    return made | {
        "build_s": round(seconds, 2), "processor_s": round(spent, 2),
        "peak_mb": peak_mb(), "peak_before_mb": before_mb,
    }  # fmt: skip


def main() -> None:
    given = json.load(sys.stdin)
    settings = given["settings"] | {"sms": tuple(given["settings"]["sms"])}
    print(json.dumps(build(Path(given["graph"]), Settings(**settings))))


if __name__ == "__main__":
    main()
