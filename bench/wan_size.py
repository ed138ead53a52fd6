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
main()
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


def ran(arguments: list[str]) -> dict[str, Any]:
    """Run `aapt`; return seconds, peak memory and its JSON."""
    start = time.monotonic()
    command = [sys.executable, "-c", RUN, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "command": arguments[0], "exit_code": process.returncode,
        "seconds": round(time.monotonic() - start, 1), "peak_gb": round(usage.ru_maxrss / 1e6, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1), "json": json.loads(out or "null"),
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
        weights = drawn(network, part)
        whole = {"generator_ema": {f"model.{k}": v for k, v in weights.items()}}
        torch.save(weights if part.option else whole, files[part.option])
        del weights, whole
    made, bundle = folder / "made.safetensors", folder / "bundle"
    options = [word for option, path in files.items() if option for word in (option, str(path))]
    steps = [
        ["import", str(files[""]), "-o", str(made), "--preset", preset, *options],
        ["plan", preset],
        ["export", str(made), "-o", str(bundle)],
    ]
    found = [ran([*step, "--json"]) for step in steps]
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
