"""What several test files share.

One tiny bundle with every engine is made once; the command line runs inside this process.

The generator's weights are random, but tamed: its linear predictor pulls every latent towards zero.
So frames stay in the visible range however long a rollout is, and a difference between two engines
is not hidden by white or black.
"""

import dataclasses
import logging
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from aapt_deploy import profiles
from aapt_deploy.backends import build, torch_eager
from aapt_deploy.backends.ort import build as build_ort
from aapt_deploy.backends.trial import BuildOptions
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.bundle.scales import Scales
from aapt_deploy.cli import commands
from aapt_deploy.export import calibrate, export
from aapt_deploy.models import checkpoint
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.models.checkpoint import Checkpoint
from aapt_deploy.profiles import Profile
from tests.support import once, wan
from tests.support.commands import Ran
from tests.support.cuda_emulator import Driver
from tests.support.errors import errors_in_words as errors_in_words
from tests.support.opening import silent
from tests.support.tiny import FEW_BLOCKS, Exported, Made, frames_of, make_checkpoint, picture
from tests.support.trt_plans import by_onnx, opened_over

# A shell starts its background jobs with Ctrl-C ignored, and processes started from there inherit
# that: those under test must hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny() -> Profile:
    return profiles.load("tiny-cpu")


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory, tiny: Profile) -> Checkpoint:
    """The checkpoint that `bundle` is made of. Do not change it."""
    write = lambda folder: make_checkpoint(folder / "tiny.safetensors", tiny).path
    return checkpoint.load(once.made(tmp_path_factory, "checkpoint", write))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, loaded: Checkpoint) -> Made:
    """Exported, and built for onnxruntime (fp32, int8) and torch.

    It has one thread: threads that wait for a busy core take seconds.
    """

    def make(folder: Path) -> Made:
        path, said = folder / "bundle", list[str]()
        logging.getLogger(
            "torch.__trace"
        ).propagate = False  # thousands of lines, each kept by pytest
        parity = export.export_bundle(loaded, path, False, said.append)
        shutil.copytree(path, path.with_name("bare"))
        with pytest.MonkeyPatch.context() as patch:
            for module in (build_ort, torch_eager):
                patch.setattr(module, "cores", lambda: 1)
            opened, options = Bundle.open(path), BuildOptions(said.append)
            engines = [
                build.build_engine(opened, backend, None, options)
                for backend in ("onnxruntime", "torch")
            ]
        return Made(path, parity, [*engines[0], *engines[1]], said)

    return once.made(tmp_path_factory, "made", make)


@pytest.fixture(scope="session")
def bundle(made: Made) -> Path:
    """The shared bundle. Do not change it; ask for `copied` where a test does."""
    return made.path


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """The bundle once more, for a test that damages it."""
    return Path(shutil.copytree(bundle, tmp_path / "copied"))


@pytest.fixture
def bare(made: Made, tmp_path: Path) -> Path:
    """The bundle as `export` leaves it, without engines; the test's own."""
    return Path(shutil.copytree(made.path.with_name("bare"), tmp_path / "bare"))


@pytest.fixture(scope="session")
def wan_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Wan family's tiny preset with the fixtures' weights, imported, exported and built.

    Do not change it.
    """

    def make(folder: Path) -> Path:
        path = folder / "bundle"
        stored = wan.imported("wan-tiny-cpu", folder / "tiny.safetensors")
        export.export_bundle(stored, path, False, lambda text: None)
        with pytest.MonkeyPatch.context() as patch:
            for module in (build_ort, torch_eager):
                patch.setattr(module, "cores", lambda: 1)
            for backend in ("onnxruntime", "torch"):
                options = BuildOptions(lambda text: None)
                build.build_engine(Bundle.open(path), backend, None, options)
        return path

    return once.made(tmp_path_factory, "wan", make)


# Three blocks, of which the default rules quantise the middle one.


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory, tiny: Profile) -> Checkpoint:
    """A checkpoint of three blocks with heads of 64 channels, which the FP8 cache takes.

    Do not change it.
    """
    model = dataclasses.replace(tiny.model, depth=3, dim=128)
    profile = tiny.replace(model=model)
    write = lambda folder: make_checkpoint(folder / "three.safetensors", profile).path
    return checkpoint.load(once.made(tmp_path_factory, "three", write))


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory, three: Checkpoint) -> Scales:
    make = lambda folder: calibrate.calibrate(checkpoint.load(three.path), silent)
    return once.made(tmp_path_factory, "calibrated", make)


@pytest.fixture(scope="session")
def exported(
    tmp_path_factory: pytest.TempPathFactory, three: Checkpoint, calibrated: Scales
) -> Exported:
    def make(folder: Path) -> Exported:
        stored = checkpoint.stored(three.path)
        rows = export.export_bundle(stored, folder / "bundle", False, silent, calibrated)
        return Exported(folder / "bundle", rows)

    return once.made(tmp_path_factory, "exported", make)


@pytest.fixture(scope="session")
def exported_frames(exported: Exported) -> list[np.ndarray]:
    """Frames of the exported graphs in ONNX Runtime, FP8 products included."""
    opened = Bundle.open(exported.path)
    engines = opened_over(
        Driver(),
        opened.profile,
        {name: by_onnx(exported.path / f"{name}.onnx") for name in signatures(opened.profile)},
    )
    frames = frames_of(engines, opened, FEW_BLOCKS, 3)
    engines.close()
    return frames


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build for one thread only, as `made` does."""
    for module in (build_ort, torch_eager):
        monkeypatch.setattr(module, "cores", lambda: 1)


@pytest.fixture
def image(tmp_path: Path, tiny: Profile) -> Path:
    """A picture file of the right shape, twice the size."""
    from aapt_deploy.video.pictures import write_image

    path = tmp_path / "start.png"
    write_image(path, picture(2 * tiny.video.width, 2 * tiny.video.height, 3))
    return path


@pytest.fixture
def aapt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ran]]:
    """Run the command line in this process: `aapt("stream", bundle, "-o", file)`."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["aapt", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            commands.main()
        code = ended.value.code
        assert isinstance(code, int)
        return Ran(code, *capsys.readouterr())

    yield run
    torch.set_num_threads(1)
