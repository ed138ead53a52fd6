"""What a record says about the machine it was made on."""

import os
import platform
from pathlib import Path

from aapt_deploy import __version__

LONGEST_MS = 1e9  # that a record may say anything took, eleven days: sums of such times stay finite
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


def machine() -> dict[str, str | int]:
    """CPU, cores, system and versions."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    system = f"{platform.system()} {platform.machine()}"
    return {"cpu": model, "cores": cores(), "system": system, "python": platform.python_version(), "aapt_deploy": __version__}
