"""The command line: the whole path, every mistake with its exit code, and the cost of --help."""

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import aapt_deploy
from aapt_deploy import __main__ as entry
from aapt_deploy import cli
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.cli import commands, measure
from aapt_deploy.models import checkpoint, random_weights
from aapt_deploy.models.checkpoint import Checkpoint
from tests.support import ROOT
from tests.support.commands import COMMAND, ENVIRONMENT, Ran

Aapt = Callable[..., Ran]
HEAVY = {"torch", "onnx", "onnxscript", "onnxruntime", "av", "numpy", "tensorrt", "safetensors"}


def test_ctrl_c_while_the_command_line_is_being_imported_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Interrupted:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "aapt_deploy.cli.commands":
                raise KeyboardInterrupt

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "so that SIGTERM keeps its handler")
    monkeypatch.delitem(sys.modules, "aapt_deploy.cli.commands")
    monkeypatch.delattr(cli, "commands")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as left:
        entry.main()
    assert left.value.code == 130


def test_the_whole_path(aapt: Aapt, tmp_path: Path, image: Path, one_core: None) -> None:
    """Each command exits with 0, prints one line of JSON and makes what the next one takes."""
    weights, bundle = tmp_path / "r.safetensors", tmp_path / "bundle"
    ran = aapt("init", "tiny-cpu", "-o", weights)
    assert (ran.code, ran.out) == (0, ""), ran.err
    assert f"{weights}: 0.2 M parameters, 0.3 MB" in ran.err

    ran = aapt("export", weights, "-o", bundle, "--json")
    assert ran.code == 0, ran.err
    exported = json.loads(ran.out)
    assert exported["bundle"] == str(bundle)
    assert len(exported["parity"]) == 7
    assert all(row["ok"] for row in exported["parity"])
    assert ran.err.count(" ok") == 7
    assert f"bundle: {bundle}" in ran.err

    ran = aapt("build-engine", bundle, "--json")
    assert ran.code == 0, ran.err
    engines = json.loads(ran.out)["engines"]
    assert [engine["key"] for engine in engines] == ["onnxruntime-fp32", "onnxruntime-int8"]
    assert "PSNR dB vs fp32" in ran.err
    assert f"{engines[1]['psnr_db']:.1f}" in ran.err

    ran = aapt("profile", bundle, "--blocks", 10, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["blocks"] == 10

    ran = aapt(
        "stream", bundle, "-o", tmp_path / "x.mp4", "--seconds", 0.5, "--image", image, "--json"
    )
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["frames"] == 12
    assert (tmp_path / "x.mp4").stat().st_size > 500
    Bundle.open(bundle).verify()


# --- help


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["stream", "--help"], ["train", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    asked = [COMMAND[0], "-X", "importtime", *COMMAND[1:], *arguments]
    done = subprocess.run(asked, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    imported = {
        line.rsplit("|", 1)[1].strip().split(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "typer" in imported
    assert imported & HEAVY == set()
    assert done.stdout


@pytest.mark.slow
def test_help_is_there_at_once() -> None:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "aapt_deploy", "--help"],
            env=ENVIRONMENT,
            capture_output=True,
            check=True,
        )
        times.append(time.perf_counter() - began)
    assert min(times) < 0.4, times


def test_version_and_help(aapt: Aapt) -> None:
    assert aapt("--version") == (0, f"aapt {aapt_deploy.__version__}\n", "")
    ran = aapt("--help")
    assert (ran.code, ran.err) == (0, "")
    for command in (
        "export",
        "build-engine",
        "profile",
        "stream",
        "demo",
        "doctor",
        "init",
        "train",
    ):
        assert f"  {command}" in ran.out
        assert aapt(command, "--help").code == 0


@pytest.mark.parametrize("arguments", [(), ("train",)])
def test_a_group_without_a_command_shows_its_help(aapt: Aapt, arguments: tuple[str, ...]) -> None:
    ran = aapt(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "Usage: aapt" in ran.err
    assert "Commands:" in ran.err
    assert "error:" not in ran.err


# --- mistakes: one error line, one hint line, one exit code


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("bogus", 2, "No such command 'bogus'"),
        ("--bogus", 2, "No such option"),
        ("stream", 2, "Missing argument 'BUNDLE'"),
        ("stream BUNDLE", 2, "Missing option '--out'"),
        ("stream BUNDLE -o x.mp4 --seconds soon", 2, "Invalid value for '--seconds'"),
        ("stream BUNDLE -o x.mp4 --seconds nan", 2, "--seconds nan is not a positive length"),
        ("stream BUNDLE -o x.mp4 --seconds -3", 2, "--seconds -3.0 is not a positive length"),
        ("stream BUNDLE -o x.mp4 --seed -1", 2, "Invalid value for '--seed'"),
        ("stream BUNDLE -o x.mp4 --prompt klingon", 2, "prompt word 'klingon'"),
        ("stream BUNDLE -o x.mp4 --image nobody", 2, "start frame 'nobody' does not exist"),
        ("stream BUNDLE -o x.mp4 --image none.png", 4, "image none.png: No such file"),
        ("stream BUNDLE -o x.mp4 --controls none.jsonl", 4, "controls none.jsonl: No such file"),
        ("stream BUNDLE -o - --format mp4", 2, "mp4 cannot go to stdout"),
        ("stream BUNDLE -o x.txt", 2, "the suffix '.txt' names no video format"),
        ("stream BUNDLE -o no/such/folder/x.mp4", 6, "there is no folder"),
        (
            "stream BUNDLE -o /dev/full --format y4m --seconds 1",
            6,
            "/dev/full: cannot be written: No space left",
        ),
        ("stream BUNDLE -o x.mp4 --backend cuda", 2, "backend 'cuda' does not exist"),
        ("stream BUNDLE -o x.mp4 --backend torch-cuda", 2, "backend 'torch-cuda' does not exist"),
        ("stream BUNDLE -o x.mp4 --precision fp8", 4, "no onnxruntime engine in fp8"),
        (
            "stream BUNDLE -o x.mp4 --precision fp16",
            2,
            "precision 'fp16' does not exist for onnxruntime",
        ),
        ("stream BUNDLE -o precious/x.mkv", 6, "precious is not a folder"),
        ("stream BUNDLE -o precious/a/x.mkv", 6, "precious is not a folder"),
        ("stream nowhere -o x.mp4", 4, "bundle nowhere is not a directory"),
        ("stream . -o x.mp4", 4, "has no manifest.json"),
        ("profile BUNDLE --blocks 3", 2, "Invalid value for '--blocks'"),
        ("profile nowhere", 4, "bundle nowhere is not a directory"),
        ("profile BUNDLE --backend tensorflow", 2, "backend 'tensorflow' does not exist"),
        ("build-engine nowhere", 4, "bundle nowhere is not a directory"),
        ("build-engine BUNDLE --backend cuda", 2, "backend 'cuda' cannot be built"),
        ("build-engine BUNDLE --precision int4", 2, "precision 'int4' does not exist"),
        ("export CKPT -o BUNDLE", 6, "exists"),
        ("export CKPT -o .", 6, "exists and is not a bundle; it is left as it is"),
        ("export CKPT -o . --force", 6, "exists and is not a bundle; it is left as it is"),
        ("export CKPT -o CKPT/below", 6, "cannot be written: Not a directory"),
        (
            "export none.safetensors -o b",
            4,
            "checkpoint none.safetensors cannot be read: No such file",
        ),
        ("export . -o b", 4, "cannot be read: Is a directory"),
        ("export CKPT -o b --sha256 00", 4, "expected 00"),
        ("export CKPT -o b --precision int8", 2, "graphs cannot be exported in 'int8'"),
        ("export CKPT -o b --scales s.json", 2, "--scales s.json is for fp8 graphs"),
        ("export CKPT -o b --precision fp8 --scales none.json", 4, "none.json"),
        ("plan none", 4, "profile 'none' is neither a file nor a shipped preset"),
        ("plan .", 4, "has no manifest.json"),
        ("diff none.json none.json", 4, "none.json"),
        ("diff none.json", 2, "Missing argument 'B'"),
        ("quality nowhere", 4, "bundle nowhere is not a directory"),
        ("quality BUNDLE --plot x.txt", 2, "x.txt"),
        ("quality BUNDLE --seconds 0", 2, "Invalid value for '--seconds'"),
        ("quality BUNDLE --reference-bundle nowhere", 4, "bundle nowhere is not a directory"),
        ("train data clips --profile none", 4, "profile 'none' is neither a file"),
        ("train run clips --distilled CKPT", 2, "--distilled stands in for a stage after --from"),
        ("train run clips --recipe best", 2, "best"),
        ("train evaluate nowhere -o e", 4, "bundle nowhere is not a directory"),
        ("train all", 2, "Missing argument 'folder'"),
        ("doctor --bogus", 2, "No such option"),
        ("init none", 4, "profile 'none' is neither a file nor a shipped preset"),
        ("init tiny-cpu -o no/such/folder/r.safetensors", 6, "cannot be written"),
        ("init tiny-cpu -o CKPT", 6, "exists"),
        (
            "init tiny-cpu -o r.safetensors --seed 18446744073709551616",
            2,
            "--seed 18446744073709551616 is above 18446744073709551615",
        ),
        ("demo -o CKPT", 6, "cannot be written"),
        ("demo --seconds nan", 2, "--seconds nan"),
    ],
)
def test_mistakes(
    aapt: Aapt,
    bundle: Path,
    loaded: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious").touch()
    names = {"BUNDLE": str(bundle), "CKPT": str(loaded.path)}
    ran = aapt(
        *[
            word
            if "/" in word and "CKPT" not in word
            else names.get(word, word.replace("CKPT", names["CKPT"]))
            for word in arguments.split()
        ]
    )
    assert message in ran.error
    assert (ran.code, ran.out) == (code, "")
    assert os.listdir(tmp_path) == ["precious"]


def test_a_damaged_bundle(aapt: Aapt, copied: Path, tmp_path: Path) -> None:
    generator = copied / Bundle.open(copied).engines["onnxruntime-fp32"]["graphs"]["generator"]
    os.truncate(generator, 100)
    for arguments in (("stream", copied, "-o", tmp_path / "x.mp4"), ("profile", copied)):
        ran = aapt(*arguments)
        assert ran.code == 4
        assert (
            f"bundle file {generator} does not match the manifest (bytes 100 instead of"
            in ran.error
        )
    (copied / "manifest.json").write_text("{}")
    ran = aapt("stream", copied, "-o", tmp_path / "x.mp4")
    assert ran.code == 4
    assert "is damaged" in ran.error
    assert not (tmp_path / "x.mp4").exists()


def test_a_bundle_that_is_being_built(aapt: Aapt, copied: Path) -> None:
    with Bundle.open(copied).add_engine("somebody-elses"):
        ran = aapt("build-engine", copied)
    assert ran.code == 7
    assert f"is being written by process {os.getpid()}" in ran.error


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 7, struct.pack("<Q", 2**62) + b"{}", b"\x80\x04pickle", b"{" * 1000]
)
def test_hostile_checkpoints(aapt: Aapt, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    ran = aapt("export", tmp_path / "x.safetensors", "-o", tmp_path / "b")
    assert ran.code == 4
    assert "x.safetensors" in ran.error
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("kept", [-1, -1000, 5000])
def test_truncated_checkpoints(aapt: Aapt, loaded: Checkpoint, tmp_path: Path, kept: int) -> None:
    (tmp_path / "x.safetensors").write_bytes(loaded.path.read_bytes()[:kept])
    ran = aapt("export", tmp_path / "x.safetensors", "-o", tmp_path / "b")
    assert ran.code == 4
    assert "x.safetensors" in ran.error


def test_a_checkpoint_that_is_there_is_replaced_only_when_asked(
    aapt: Aapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "trained.safetensors"
    out.write_bytes(b"hours of training")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "draw", None)  # refused before weights are drawn
        ran = aapt("init", "tiny-cpu", "-o", out)
    assert (ran.code, ran.out, ran.error) == (6, "", f"checkpoint {out} exists")
    assert "--force" in ran.err
    assert out.read_bytes() == b"hours of training"
    assert aapt("init", "tiny-cpu", "-o", out, "--force").code == 0
    assert checkpoint.load(out).profile.name == "tiny-cpu"
    ran = aapt("init", "tiny-cpu", "-o", tmp_path, "--force")
    assert (ran.code, ran.error) == (
        6,
        f"{tmp_path} exists and is not a regular file; it is left as it is",
    )
    assert os.listdir(tmp_path) == [out.name]


def test_weights_that_do_not_fit_into_memory_are_not_drawn(
    aapt: Aapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_weights, "free_memory_bytes", lambda: 4 * 4096)
    ran = aapt("init", "tiny-cpu", "-o", tmp_path / "r.safetensors")
    assert ran.code == 5
    assert "parameters" in ran.error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("preset", ["aapt-8b-736x416-h100", "aapt-8b-1280x720-h100"])
def test_a_large_preset_is_sized_before_memory_is_taken(
    aapt: Aapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    monkeypatch.setattr(random_weights, "free_memory_bytes", lambda: 2**20 * 4096)
    ran = aapt("init", preset, "-o", tmp_path / "r.safetensors")
    assert ran.code == 5
    assert f"{preset} has " in ran.error


def test_a_random_checkpoint_is_the_seeds(aapt: Aapt, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert (
            aapt("init", "tiny-cpu", "-o", tmp_path / f"{name}.safetensors", "--seed", seed).code
            == 0
        )
    a, b, c = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    weights = [
        content[8 + struct.unpack("<Q", content[:8])[0] :] for content in (a, b, c)
    ]  # what follows the header, whose order is free
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize(
    ("package", "modules", "arguments"),
    [
        ("onnx", ("backends.ort.build", "bundle.graph_file"), ("build-engine", "BUNDLE")),
        ("torch", ("models.random_weights",), ("init", "tiny-cpu")),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    aapt: Aapt,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    modules: tuple[str, ...],
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for module in modules:
        monkeypatch.delitem(sys.modules, f"aapt_deploy.{module}", raising=False)
    ran = aapt(*(bundle if word == "BUNDLE" else word for word in arguments))
    assert ran.code == 5
    assert ran.error == f"package '{package}' is not installed"
    assert "pip install 'aapt_deploy[export]'" in ran.err


@pytest.mark.parametrize(
    ("where", "arguments"),
    [
        ("_export", ("export",)), ("_build", ("build-engine", "x")),
        ("_stream", ("stream", "x", "-o", "y.mp4")), ("_run", ()),
    ],
)  # fmt: skip
def test_ctrl_c_is_130_and_says_nothing_more(
    aapt: Aapt, monkeypatch: pytest.MonkeyPatch, where: str, arguments: tuple[str, ...]
) -> None:
    def interrupt(*anything: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, where, interrupt)
    ran = aapt(*arguments)
    assert (ran.code, ran.out) == (130, "")
    assert "Traceback" not in ran.err
    assert "rror" not in ran.err


def test_ctrl_c_while_weights_are_drawn_leaves_no_file(
    aapt: Aapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*anything: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_drawn", interrupt)
    assert aapt("init", "tiny-cpu", "-o", tmp_path / "r.safetensors").code == 130
    assert os.listdir(tmp_path) == []


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*anything: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(measure, "measured_latency", bug)
    monkeypatch.setattr(sys, "argv", ["aapt", "profile", "x"])
    with pytest.raises(ZeroDivisionError):
        commands.main()


def test_a_reader_of_help_that_leaves_is_no_traceback() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m aapt_deploy --help | true"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
