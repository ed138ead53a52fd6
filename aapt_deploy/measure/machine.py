"""What a record says about the machine it was made on."""

import platform
from pathlib import Path

from aapt_deploy import __version__
from aapt_deploy.backends.cpu import cores


def machine() -> dict[str, str | int]:
    """CPU, cores, system and versions."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    system = f"{platform.system()} {platform.machine()}"
    return {
        "cpu": model,
        "cores": cores(),
        "system": system,
        "python": platform.python_version(),
        "aapt_deploy": __version__,
    }
