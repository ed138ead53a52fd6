"""Measure what FP8 costs the embedded checkpoint in pictures.

Writes docs/measurements/fp8-demo-<date>.json.

python bench/fp8_quality.py [--seconds 5]: exports in FP8 (calibrating), builds ONNX Runtime's FP8
engine and torch in bf16, and compares the two by `aapt quality`. A CPU does it, in about five
minutes of two cores; no time is recorded. ONNX Runtime computes attention in float32, so that the
FP8 cache of our kernels is not in these figures.
"""

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aapt_deploy import assets

ROOT = Path(__file__).parent.parent


def aapt(*arguments: object) -> dict[str, Any]:
    """Run a command that may end with a bad verdict; its JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "aapt_deploy", *map(str, arguments), "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode not in (0, 3):
        raise SystemExit(f"aapt {arguments[0]} ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=5)
    seconds = parser.parse_args().seconds
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    with TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        exported = aapt("export", "-o", bundle, "--precision", "fp8")
        aapt("build-engine", bundle)
        aapt("build-engine", bundle, "--backend", "torch", "--precision", "bf16")
        quality = aapt(
            "quality",
            bundle,
            "--precision",
            "fp8",
            "--reference",
            "torch-bf16",
            "--seconds",
            seconds,
        )
    record = {
        "what": "FP8 against bf16, embedded checkpoint, on a CPU", "date": date, "git": git,
        "checkpoint_sha256": assets.checkpoint_sha256(),
        "seed": 0, "coverage": exported["coverage"], "parity": exported["parity"],
        "quality": quality,
    }  # fmt: skip
    path = ROOT / "docs" / "measurements" / f"fp8-demo-{date}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
