"""What this CPU can do, as far as engines depend on it: its cores, and whether it adds int8 products exactly."""

import os
import platform
from pathlib import Path

WEIGHT_BITS, SAFE_WEIGHT_BITS = 8, 7  # of an int8 weight, where products are added exactly, and where the sum of two must fit into 16 bits


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def adds_int8_exactly() -> bool:
    """Whether this CPU multiplies uint8 by int8 and adds four products without losing any: an x86 needs VNNI, without it 16 bits overflow."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    info = Path("/proc/cpuinfo")
    flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "") if info.exists() else ""
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags.split())
