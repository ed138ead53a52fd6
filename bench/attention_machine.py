"""What takes part in bench/attention.py, and NVIDIA's checks over a few of its launches."""

import functools
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from stages import HOW, NO_GPU, Parts

from aapt_deploy.measure.machine import machine as host
from aapt_deploy.ops.block_causal_attention import kernels

BENCH = Path(__file__).parent / "attention.py"
SANITIZER_S = 50  # of each check
PACKAGES = (
    "torch", "triton", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cudnn-cu13",
    "nvidia-cudnn-frontend", "flash-attn-3", "sageattention",
)  # fmt: skip


def machine(parts: Parts) -> None:
    if not HOW.small:
        parts.run("gpu", the_gpu)
        parts.run("code", code)
    parts.run("host", host)
    parts.run("packages", packages)


def the_gpu() -> dict[str, Any]:
    """Ends the stage where there is no Hopper GPU."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit(NO_GPU)
    p = torch.cuda.get_device_properties(0)
    return {
        "name": p.name, "multiprocessors": p.multi_processor_count,
        "memory_gib": round(p.total_memory / 2**30, 1), "driver": driver(),
    }  # fmt: skip


def driver() -> str | None:
    """The driver's release, if it can be asked for."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def code() -> dict[str, Any]:
    """All variants, compiled here so that no later stage has to."""
    forms = {f"D = 128, {name}": (128, variant) for name, variant in kernels.VARIANTS.items()}
    forms["D = 64"] = (64, kernels.Variant())
    start = time.perf_counter()
    made = {n: kernels.compiled(dim, None, v.defines(dim)) for n, (dim, v) in forms.items()}
    used = {n: [x for x in c.report.splitlines() if "Used" in x] for n, c in made.items()}
    return {
        "nvrtc": made["D = 64"].nvrtc,
        "compile_s": round(time.perf_counter() - start, 2),
        "assembler": used,
        "sha256": kernels.source_hash(),
    }


def packages() -> dict[str, str | None]:
    found: dict[str, str | None] = {"cuda of torch": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def sanitizer(parts: Parts) -> None:
    for check in ("memcheck", "racecheck"):
        parts.run(check, functools.partial(sanitized, check))


def sanitized(check: str) -> dict[str, Any]:
    """One of NVIDIA's checks over a few launches. A GPU that it does not know proves nothing."""
    places = (None, "/usr/local/cuda/bin")
    tool = next(filter(None, (shutil.which("compute-sanitizer", path=p) for p in places)), None)
    if not tool:
        return {"ran": False, "why": "compute-sanitizer is not installed"}
    ours_alone = ["--error-exitcode", "77", "--kernel-regex", "kns=aapt_"]
    command = [tool, "--tool", check, *ours_alone, sys.executable, str(BENCH), "--stage", "few"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SANITIZER_S, check=False,
            env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"ran": False, "why": f"took longer than {SANITIZER_S} s"}
    text = done.stdout + done.stderr
    known = "not supported" not in text and "Unable to" not in text
    told = [line for line in text.splitlines() if line.startswith("=========")]
    ok = not (done.returncode == 77 and known)
    return {"ran": known, "exit_code": done.returncode, "said": told[:40] or text[-800:], "ok": ok}
