"""What a record says about its machine, with and without Linux's own files."""

import os
import platform
from pathlib import Path

import pytest

from aapt_deploy import __version__
from aapt_deploy.backends import cpu
from aapt_deploy.measure import machine as module
from aapt_deploy.measure.machine import machine

CPUINFO = "processor\t: 0\nmodel name\t: A CPU: 3 GHz \nmodel name\t: Another\nflags\t: fpu vme\n"


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /proc/cpuinfo."""
    file = tmp_path / "cpuinfo"
    for place in (module, cpu):
        monkeypatch.setattr(place, "Path", {"/proc/cpuinfo": file}.__getitem__)
    return file


def test_a_record_names_the_machine(cpuinfo: Path) -> None:
    cpuinfo.write_text(CPUINFO)
    assert machine() == {
        "cpu": "A CPU: 3 GHz", "cores": cpu.cores(), "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}", "aapt_deploy": __version__,
    }  # fmt: skip


@pytest.mark.parametrize("content", [None, "flags\t: fpu\n"])
@pytest.mark.parametrize(("processor", "named"), [("Apple M9", "Apple M9"), ("", "arm64")])
def test_a_machine_without_a_model_in_its_files_is_asked_otherwise(
    cpuinfo: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, processor: str, named: str
) -> None:
    if content is not None:
        cpuinfo.write_text(content)
    monkeypatch.setattr(platform, "processor", lambda: processor)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert machine()["cpu"] == named


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7} if pid == 0 else {})
    assert cpu.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cpu.cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpu.cores() == 1


@pytest.mark.parametrize(
    ("name", "content", "exact"),
    [
        ("x86_64", None, False), ("x86_64", CPUINFO, False), ("AMD64", CPUINFO, False),
        ("x86_64", "vendor\t: avx_vnni\nflags\t: fpu\n", False),
        ("x86_64", "flags\t: fpu avx_vnni sse\n", True), ("amd64", "flags\t: avx512_vnni\n", True),
        ("x86_64", "flags\t: fpu\nflags\t: avx_vnni\n", False), ("aarch64", None, True),
        ("arm64", CPUINFO, True),
    ],
)  # fmt: skip
def test_an_x86_cpu_adds_int8_products_exactly_only_with_vnni(
    cpuinfo: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | None, exact: bool
) -> None:
    if content is not None:
        cpuinfo.write_text(content)
    monkeypatch.setattr(platform, "machine", lambda: name)
    assert cpu.adds_int8_exactly() is exact
