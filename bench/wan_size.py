"""Time and memory of import, plan and export for a published size, with random weights.

    python bench/wan_size.py FOLDER OUT.json [PRESET]

Writes a generator and a VAE as their authors do (float32, PyTorch files) into FOLDER, then runs the
commands one by one. Peak memory is the kernel's: it counts pages of mapped files as well. FOLDER
needs about five times the file. The record is OUT.json. AAPT_BENCH_FREE_GB caps what export's
check takes for free memory.
"""

import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aapt_deploy import __version__, profiles
from aapt_deploy.measure.machine import machine
from aapt_deploy.models.family import family_of
from aapt_deploy.models.sources import Part

# With less free memory, export checks a smaller copy, and a shared machine stays usable.
RUN = """
import os
from aapt_deploy.__main__ import main
if "AAPT_BENCH_FREE_GB" in os.environ:
    from aapt_deploy.export import export
    export.free_memory_bytes = lambda: int(1e9 * float(os.environ["AAPT_BENCH_FREE_GB"]))
try:
    main()
finally:  # not ru_maxrss, which begins with the memory of the process that started this one
    lines = open("/proc/self/status").read().splitlines()
    peak = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
    open(os.environ["AAPT_BENCH_PEAK"], "w").write(peak)
"""


def drawn(network: nn.Module, part: Part) -> dict[str, Tensor]:
    """Random tensors under the published names."""
    shapes, weights = network.state_dict(), dict[str, Tensor]()
    for ours, source in part.sources.items():
        for name in source.theirs:
            shape = source.shape(tuple(shapes[ours].shape))
            scale = 0.05 if len(shape) < 2 else 1 / math.sqrt(math.prod(shape[1:]))
            norm = "norm" in name and name.endswith("weight")
            weights[name] = torch.ones(shape) if norm else torch.randn(shape) * scale
    return weights


def ran(arguments: list[str], peak: Path) -> dict[str, Any]:
    """Run `aapt`; return seconds, peak memory and its JSON."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", RUN, *arguments]
    environment = os.environ | {"AAPT_BENCH_PEAK": str(peak)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    said = json.loads(done.stdout or "{}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "command": arguments[0], "exit_code": done.returncode,
        "seconds": round(time.monotonic() - start, 1), "cpu_s": round(cpu_s, 1),
        "peak_gb": round(1024 * int(peak.read_text()) / 1e9, 2),
        "json": {k: v for k, v in said.items() if k not in ("bundle", "checkpoint")},  # paths
    }  # fmt: skip


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    preset = sys.argv[3] if len(sys.argv) > 3 else "causal-forcing-1step-832x480-4090"
    profile = profiles.load(preset)
    networks = family_of(profile).networks()
    with torch.device("meta"):
        built = networks.build(profile)
    files = {"": folder / "generator.pt"}
    for network, part in zip(built, networks.parts(profile), strict=True):
        files.setdefault(part.option, folder / "vae.pth")
        if files[part.option].exists():
            continue
        weights = drawn(network, part)
        whole = {"generator_ema": {f"model.{k}": v for k, v in weights.items()}}
        torch.save(weights if part.option else whole, files[part.option])
        del weights, whole
    made, bundle = folder / "made.safetensors", folder / "bundle"
    options = [word for option, path in files.items() if option for word in (option, str(path))]
    steps = [
        ["import", str(files[""]), "-o", str(made), "--force", "--preset", preset, *options],
        ["plan", preset],
        ["export", str(made), "-o", str(bundle), "--force"],
    ]
    found = [ran([*step, "--json"], folder / "peak") for step in steps]
    file_gb = round(files[""].stat().st_size / 1e9, 3)
    record = {
        "what": __doc__.splitlines()[0] if __doc__ else "", "version": __version__,
        "preset": preset, "file_gb": file_gb, "checkpoint_gb": round(made.stat().st_size / 1e9, 3),
        "import_peak_over_file": round(found[0]["peak_gb"] / file_gb, 2),
        "steps": found, "machine": machine(),
    }  # fmt: skip
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({step["command"]: (step["seconds"], step["peak_gb"]) for step in found}))


if __name__ == "__main__":
    main()
