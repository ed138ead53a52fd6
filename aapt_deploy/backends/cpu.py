"""Read from this CPU what engines depend on: its cores and its int8 arithmetic."""

import os
import platform
from pathlib import Path

WEIGHT_BITS = 8  # of an int8 weight, if products are added exactly
SAFE_WEIGHT_BITS = 7  # if the sum of two products must fit into 16 bits


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def adds_int8_exactly() -> bool:
    """Return whether this CPU sums four uint8 x int8 products without overflow.

    An x86 CPU without VNNI adds them in 16 bits, which overflow.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags.split())
