"""Export of large generators: time and memory, in a process of their own."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.models import random_weights
from aapt_deploy.profiles import Profile
from tests.support.commands import ENVIRONMENT

EXPORT = """
import json, resource, sys
from pathlib import Path
from aapt_deploy.export import export
from aapt_deploy.models import checkpoint
source, target = Path(sys.argv[1]), Path(sys.argv[2])
rows = export.export_bundle(checkpoint.stored(source), target, False, lambda text: None)
used = resource.getrusage(resource.RUSAGE_SELF)
# Not ru_maxrss: that begins with the memory of the process which started this one.
status = Path("/proc/self/status").read_text().splitlines()
(peak,) = [int(line.split()[1]) for line in status if line.startswith("VmHWM")]
cpu_s = used.ru_utime + used.ru_stime
cases = [row.case for row in rows if row.ok]
print(json.dumps({"peak": 1024 * peak, "cpu_s": cpu_s, "cases": cases}))
"""


def run(profile: Profile, folder: Path) -> tuple[int, dict[str, float]]:
    """Parameters, and what an export of random weights took."""
    count = random_weights.random_checkpoint(profile, folder / "c.safetensors", 0)
    command = [sys.executable, "-c", EXPORT, str(folder / "c.safetensors"), str(folder / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    print(f"{count / 1e6:.0f} M parameters: {found}")
    return count, found


@pytest.mark.slow
def test_a_hundred_million_parameters_take_a_minute_and_three_times_their_weights(
    tiny: Profile, tmp_path: Path
) -> None:
    """CPU seconds equal the time on a quiet machine; memory includes Python and PyTorch."""
    count, found = run(
        tiny.replace(model=dataclasses.replace(tiny.model, dim=768, depth=7, heads=12)), tmp_path
    )
    assert 95e6 < count < 105e6
    assert found["cpu_s"] < 60
    assert found["peak"] < 3 * 4 * count


@pytest.mark.slow
def test_a_billion_parameters_are_streamed_into_their_files(tiny: Profile, tmp_path: Path) -> None:
    """The check takes most of the memory; it has one graph twice, never both graphs."""
    if shutil.disk_usage(tmp_path).free < 12e9:
        pytest.skip("needs 12 GB of disk")
    try:
        count, found = run(
            tiny.replace(model=dataclasses.replace(tiny.model, dim=2048, depth=10, heads=16)),
            tmp_path,
        )
        assert count > 1e9
        assert found["peak"] < 2 * 4 * count
        opened = Bundle.open(tmp_path / "bundle")
        assert (
            opened.manifest["files"]["generator.onnx.data"]["bytes"]
            > 2e9
            > opened.manifest["files"]["generator.onnx"]["bytes"] * 1000
        )
    finally:
        shutil.rmtree(tmp_path)
