"""What several test files share: one tiny bundle with every engine, made once, and the command line inside this process.

The generator's weights are random, but tamed: its linear predictor pulls every latent towards zero, so that frames stay in the visible range
however long a rollout is, and a difference between two engines is not hidden by white or black.
"""

import dataclasses
import itertools
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from aapt_deploy import build, build_ort, cli, export, initialise, profiles, quantize
from aapt_deploy.bundle import Bundle
from aapt_deploy.camera import CRUISE, Velocity
from aapt_deploy.engine import eager
from aapt_deploy.engines import Engines
from aapt_deploy.models import checkpoint
from aapt_deploy.models.checkpoint import Checkpoint, StartFrame
from aapt_deploy.models.generator import Generator
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout import Steering, rollout
from aapt_deploy.scales import Scales
from aapt_deploy.starts import Start, start
from aapt_deploy.trial import Built, Options

# A shell starts its background jobs with Ctrl-C ignored, and processes started from there inherit that: those under test must hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
PROMPTS = {"dunes": "desert at noon, clear", "woods": "forest in autumn at night, foggy"}


def picture(width: int, height: int, hue: int) -> np.ndarray:
    """A smooth picture: uint8 [H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [0.5 + 0.4 * np.sin(6 * x + hue + channel) * np.cos(5 * y + channel) for channel in range(3)]
    return (255 * np.stack(waves, -1)).astype(np.uint8)


def tame(generator: Generator) -> None:
    """Set the linear predictor to -0.8 x the previous latent (in units of the step's deviation)."""
    profile = generator.profile
    channels, patch = profile.video.latent_channels, profile.model.patch
    with torch.no_grad():
        generator.skip.weight.zero_()  # [C * patch * patch, noisy C + previous C + 6, patch, patch]
        for channel, i, j in itertools.product(range(channels), range(patch), range(patch)):
            generator.skip.weight[(channel * patch + i) * patch + j, channels + channel, i, j] = -0.8


def make_checkpoint(path: Path, profile: Profile, seed: int = 0) -> Checkpoint:
    """A checkpoint of random weights with two start frames."""
    initialise.random_checkpoint(profile, path, seed)
    drawn = checkpoint.load(path)
    tame(drawn.generator)
    video = profile.video
    frames = {name: StartFrame(torch.from_numpy(picture(video.width, video.height, i)), prompt) for i, (name, prompt) in enumerate(PROMPTS.items())}
    checkpoint.save(path, profile, drawn.generator, drawn.vae, {"stage": "random"}, frames)
    return checkpoint.load(path)


@pytest.fixture(scope="session")
def tiny() -> Profile:
    return profiles.load("tiny-cpu")


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory, tiny: Profile) -> Checkpoint:
    """The checkpoint that `bundle` is made of. Do not change it."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors", tiny)


class Made(NamedTuple):
    """The shared bundle, and what making it reported."""

    path: Path
    parity: list[export.Parity]
    built: list[Built]
    said: list[str]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, loaded: Checkpoint) -> Made:
    """Exported, and built for onnxruntime (fp32, int8) and torch, on one thread: threads that wait for a busy core take seconds."""
    path, said = tmp_path_factory.mktemp("made") / "bundle", []
    logging.getLogger("torch.__trace").propagate = False  # thousands of lines, each kept by pytest
    parity = export.export_bundle(loaded, path, False, said.append)
    shutil.copytree(path, path.with_name("bare"))
    with pytest.MonkeyPatch.context() as patch:
        for module in (build_ort, eager):
            patch.setattr(module, "cores", lambda: 1)
        opened = Bundle.open(path)
        options = Options(said.append)
        built = [made for backend in ("onnxruntime", "torch") for made in build.build_engine(opened, backend, None, options)]
    return Made(path, parity, built, said)


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


# Three blocks, of which the default rules quantise the middle one.


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory, tiny: Profile) -> Checkpoint:
    """A checkpoint of three blocks with heads of 64 channels, which the FP8 cache takes. Do not change it."""
    model = dataclasses.replace(tiny.model, depth=3, dim=128)
    return make_checkpoint(tmp_path_factory.mktemp("three") / "three.safetensors", tiny.replace(model=model))


@pytest.fixture(scope="session")
def calibrated(three: Checkpoint) -> Scales:
    return quantize.calibrate(checkpoint.load(three.path), lambda text: None)


class Exported(NamedTuple):
    """The FP8 bundle of `three`. Do not change it."""

    path: Path
    rows: list[export.Parity]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, three: Checkpoint, calibrated: Scales) -> Exported:
    path = tmp_path_factory.mktemp("fp8") / "bundle"
    return Exported(path, export.export_bundle(checkpoint.stored(three.path), path, False, lambda text: None, calibrated))


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build for one thread only, as `made` does."""
    for module in (build_ort, eager):
        monkeypatch.setattr(module, "cores", lambda: 1)


@pytest.fixture
def image(tmp_path: Path, tiny: Profile) -> Path:
    """A picture file of the right shape, twice the size."""
    from aapt_deploy.video import write_image

    path = tmp_path / "start.png"
    write_image(path, picture(2 * tiny.video.width, 2 * tiny.video.height, 3))
    return path


def turning(block: int) -> Velocity:
    return Velocity(CRUISE.forward, yaw=0.25 if block % 3 else -0.25, pitch=0.05)


def frames_of(engines: Engines, opened: Bundle, blocks: int, seed: int = 0, text: Callable[[int], np.ndarray] | None = None) -> list[np.ndarray]:
    """The start image and `blocks` blocks of a rollout that turns."""
    begin: Start = start(opened, "dunes", None)
    steer = lambda block: Steering(turning(block), begin.text if text is None else text(block))
    return list(itertools.islice(rollout(engines, opened.profile, begin.image, steer, seed), 1 + blocks))


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The text of the only `error:` line, which must be followed by the only `hint:` line and nothing else."""
        lines = self.err.splitlines()
        assert sum(line.startswith("error: ") for line in lines) == 1, self.err
        assert sum(line.startswith("hint: ") for line in lines) == 1, self.err
        assert "Traceback" not in self.err
        assert lines[-2].startswith("error: "), self.err
        assert lines[-1].startswith("hint: ") and lines[-1] != "hint: ", self.err
        return lines[-2].removeprefix("error: ")


@pytest.fixture
def aapt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ran]]:
    """Run the command line in this process: `aapt("stream", bundle, "-o", file)`."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["aapt", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        assert isinstance(code, int)
        return Ran(code, *capsys.readouterr())

    yield run
    torch.set_num_threads(1)


COMMAND = [sys.executable, "-W", "error", "-m", "aapt_deploy"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
