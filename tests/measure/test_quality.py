"""Test `aapt quality`: known losses have their size, real engines pass or fail."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aapt_deploy.bundle.bundle import Bundle, _describe
from aapt_deploy.errors import MachineError, OutputError, ProfileError, UsageError, VerdictError
from aapt_deploy.measure import quality
from aapt_deploy.measure.machine import machine
from aapt_deploy.measure.quality import Loss, compare, gradient, luma, ssim
from aapt_deploy.profiles import Quality, loads
from aapt_deploy.rollout.engine import Engine, Engines
from tests.support.bundles import rewrite_manifest
from tests.support.commands import Ran
from tests.support.opening import open_engines, silent, unexpected
from tests.support.tiny import Exported

Change = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
THRESHOLDS = dataclasses.asdict(Quality())


class Spoilt:
    """Real engines, one of whose graphs answers with something else."""

    backend, precision, overlapped = "onnxruntime", "spoilt", False

    def __init__(self, engines: Engines, graph: str, change: Change) -> None:
        self.engines, self.graph, self.change = engines, graph, change

    @property
    def generator(self) -> Engine:
        return self["generator"]

    def __getitem__(self, graph: str) -> Engine:
        return (
            SpoiltEngine(self.engines[graph], self.change)
            if graph == self.graph
            else self.engines[graph]
        )

    def close(self) -> None:
        self.engines.close()


class SpoiltEngine:
    def __init__(self, engine: Engine, change: Change) -> None:
        self.engine, self.change = engine, change

    def reset(self, **state: np.ndarray) -> None:
        self.engine.reset(**state)

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        return self.change(self.engine.run(**inputs))

    def commit(self, block: int) -> None:
        self.engine.commit(block)


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> Callable[[str, Change], Loss]:
    """Compare fp32 with itself, one graph of the candidate spoilt."""

    def run(graph: str, change: Change) -> Loss:
        opened = iter([False, True])

        def open_one(bundle: Bundle, name: str, warn: object) -> Engines:
            engines = open_engines(bundle, "onnxruntime", "fp32")
            return Spoilt(engines, graph, change) if next(opened) else engines

        monkeypatch.setattr(quality, "_open", open_one)
        return compare(Bundle.open(bundle), "a", "b", 1, unexpected, silent)

    return run


def test_an_engine_against_its_like_loses_nothing(spoil: Callable[[str, Change], Loss]) -> None:
    loss = spoil("generator", lambda out: out)
    assert loss.latent_error == [0.0] * 6 and loss.drift == 0 and loss.failures == []
    assert loss.seconds[0].ssim == 1 and loss.seconds[0].psnr_db == loss.decoder_psnr_db > 100


def test_a_known_error_of_the_latent_is_found_at_its_size(
    spoil: Callable[[str, Change], Loss],
) -> None:
    """Five hundredths on every pass: the error of one pass, not what a rollout makes of it."""
    loss = spoil("generator", lambda out: out | {"clean": out["clean"] * np.float32(1.05)})
    assert loss.latent_error == pytest.approx([0.05] * 6, rel=1e-4)
    assert loss.seconds[0].psnr_db < 60 and loss.decoder_psnr_db > 100


def test_a_known_error_of_the_decoder_is_found_at_its_size(
    spoil: Callable[[str, Change], Loss],
) -> None:
    loss = spoil(
        "decoder",
        lambda out: (
            out | {"frames": np.where(out["frames"] > 127, out["frames"] - 3, out["frames"] + 3)}
        ),
    )
    assert loss.decoder_psnr_db == pytest.approx(20 * np.log10(255 / 3), abs=0.01)
    assert (
        loss.frame_psnr_db == pytest.approx([20 * np.log10(255 / 3)] * 24, abs=0.01)
        and len(loss.frame_ssim) == 24
    )
    assert (
        np.mean(loss.frame_ssim) == pytest.approx(loss.seconds[0].ssim, abs=1e-4)
        and max(loss.frame_ssim) < 1
    )
    assert loss.latent_error == [0.0] * 6


def test_flat_and_still_blocks_are_counted(spoil: Callable[[str, Change], Loss]) -> None:
    flat = spoil("decoder", lambda out: out | {"frames": np.full_like(out["frames"], 90)})
    assert flat.flat_blocks == flat.still_blocks == flat.blocks == 12, (
        "six from each of two start frames"
    )
    assert any("are flat" in text for text in flat.failures) and any(
        "stand still" in text for text in flat.failures
    )


def test_real_engines_are_within_the_thresholds(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    eager = compare(opened, "onnxruntime-fp32", "torch-fp32", 2, unexpected, silent)
    int8 = compare(opened, "onnxruntime-fp32", "onnxruntime-int8", 2, unexpected, silent)
    assert eager.failures == int8.failures == []
    assert max(eager.latent_error) < 1e-4 < max(int8.latent_error)
    assert eager.decoder_psnr_db > 50 > int8.decoder_psnr_db > 25, (
        "random weights spread their values widely"
    )
    assert len(int8.seconds) == 2 and int8.blocks == 24 and len(int8.latent_error) == 12


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("latent_error", [0.2, 0.3], "latent error 0.2500 is above 0.1"),
        ("latent_error", [0.0, float("nan")], "latent error nan"),
        ("seconds", [quality.Second(29.5, 0.95, 1, 1)], "PSNR 29.5 dB is below 30.0"),
        ("seconds", [quality.Second(40.0, 0.85, 1, 1)], "SSIM 0.8500 is below 0.9"),
        ("drift", 0.16, "drift 0.160 is above 0.15"),
        ("drift_per_s", 0.06, "drift of 0.060 per second is above 0.05"),
        ("flat_blocks", 1, "1 of 2 blocks are flat"),
        ("still_blocks", 2, "2 of 2 blocks stand still"),
    ],
)
def test_each_threshold_fails_alone(field: str, value: object, words: str) -> None:
    good = Loss(
        "p",
        "a",
        "b",
        [quality.Second(40.0, 0.95, 1.0, 1.0)],
        [0.01, 0.02],
        50.0,
        0.01,
        0.001,
        0,
        0,
        2,
        THRESHOLDS,
        {},
    )
    assert good.failures == []
    (failure,) = dataclasses.replace(good, **{field: value}).failures
    assert words in failure


def test_ssim_by_hand() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0, 255, (2, 12, 16))
    expected = []
    for i in range(12 - 7):
        for j in range(16 - 7):
            x, y = (p[i : i + 8, j : j + 8] for p in (a, b))
            cov = ((x - x.mean()) * (y - y.mean())).mean()
            lights = (2 * x.mean() * y.mean() + 6.5025) / (x.mean() ** 2 + y.mean() ** 2 + 6.5025)
            expected.append(lights * (2 * cov + 58.5225) / (x.var() + y.var() + 58.5225))
    assert ssim(a, b) == pytest.approx(np.mean(expected), abs=1e-9)
    assert ssim(a, a) == pytest.approx(1)


def test_a_video_of_less_than_a_block_a_second_is_judged_block_by_block(copied: Path) -> None:
    profile = copied / "profile.toml"
    profile.write_text(profile.read_text().replace("fps = 24", "fps = 2"))
    rewrite_manifest(
        copied, lambda manifest: manifest["files"].update({"profile.toml": _describe(profile)})
    )
    opened = Bundle.open(copied)
    assert opened.profile.video.fps == 2
    loss = compare(opened, "onnxruntime-fp32", "onnxruntime-int8", 3, unexpected, silent)
    assert len(loss.seconds) == len(loss.latent_error) == 3 and loss.blocks == 6, (
        "three from each of two start frames"
    )


def test_the_reference_may_be_another_bundle_s_of_the_same_checkpoint(
    bundle: Path, copied: Path, exported: Exported
) -> None:
    opened, other = Bundle.open(bundle), Bundle.open(copied)
    same = compare(opened, "onnxruntime-fp32", "onnxruntime-fp32", 1, unexpected, silent, other)
    assert same.failures == [] and max(same.latent_error) == 0
    with pytest.raises(UsageError, match="compared with itself"):
        compare(
            opened,
            "onnxruntime-fp32",
            "onnxruntime-fp32",
            1,
            unexpected,
            silent,
            Bundle.open(bundle),
        )
    with pytest.raises(UsageError, match="not of one checkpoint and profile"):
        compare(
            opened,
            "torch-fp32",
            "onnxruntime-fp32",
            1,
            unexpected,
            silent,
            Bundle.open(exported.path),
        )


# --- the command ---


def test_the_command_reports_plots_and_passes(
    aapt: Callable[..., Ran], bundle: Path, tmp_path: Path
) -> None:
    ran = aapt(
        "quality",
        bundle,
        "--precision",
        "int8",
        "--seconds",
        1,
        "--plot",
        tmp_path / "q.png",
        "--json",
    )
    assert ran.code == 0, ran.err
    record = json.loads(ran.out)
    assert (
        record["failures"] == []
        and record["candidate"] == "onnxruntime-int8"
        and len(record["latent_error"]) == 6
    )
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")
    assert "within the profile's thresholds" in ran.err


@pytest.mark.parametrize(
    ("place", "code", "words"),
    [
        ("nodir/q.png", OutputError.exit_code,
         "nodir/q.png cannot be written: No such file or directory"),
        ("file/q.png", OutputError.exit_code, "file/q.png cannot be written: Not a directory"),
        ("folder.png", OutputError.exit_code, "folder.png exists and is not a regular file"),
        ("q.xyz", UsageError.exit_code, "q.xyz has the suffix '.xyz' of no picture"),
        ("q", UsageError.exit_code, "has the suffix ''"),
    ],
)  # fmt: skip
def test_a_plot_that_cannot_be_written_is_refused_before_anything_is_measured(
    aapt: Callable[..., Ran], bundle: Path, tmp_path: Path, place: str, code: int, words: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    ran = aapt(
        "quality",
        bundle,
        "--precision",
        "int8",
        "--seconds",
        1,
        "--plot",
        tmp_path / place,
        "--json",
    )
    assert ran.code == code and words in ran.error
    assert len(ran.err.splitlines()) == 2 and ran.out == "", "nothing was compared"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_missing_matplotlib_is_told_before_anything_is_measured(
    aapt: Callable[..., Ran], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] or [
        "matplotlib"
    ]:
        monkeypatch.setitem(sys.modules, name, None)
    ran = aapt("quality", bundle, "--seconds", 1, "--plot", tmp_path / "q.png")
    assert (
        ran.code == MachineError.exit_code
        and "'matplotlib" in ran.error
        and "aapt_deploy[train]" in ran.err
    )
    assert len(ran.err.splitlines()) == 2 and list(tmp_path.iterdir()) == []


def test_a_plot_that_fails_in_the_end_costs_neither_the_figures_nor_an_older_plot(
    aapt: Callable[..., Ran], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of a file refuses the picture as a full disk does."""
    resource = pytest.importorskip("resource")
    (tmp_path / "q.png").write_bytes(b"older")
    limit, drawn = resource.getrlimit(resource.RLIMIT_FSIZE), quality.plot

    def plot_on_a_full_disk(loss: Loss, kind: str) -> bytes:
        picture = drawn(loss, kind)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        return picture

    monkeypatch.setattr(quality, "plot", plot_on_a_full_disk)
    try:
        ran = aapt(
            "quality",
            bundle,
            "--precision",
            "int8",
            "--seconds",
            1,
            "--plot",
            tmp_path / "q.png",
            "--json",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (
        ran.code == OutputError.exit_code
        and ran.error == f"plot {tmp_path}/q.png cannot be written: File too large"
    )
    assert json.loads(ran.out)["failures"] == [] and "within the profile's thresholds" in ran.err
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("q.png", b"older")]


@pytest.mark.parametrize(("suffix", "begins"), [(".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_a_plot_is_what_its_suffix_says(tmp_path: Path, suffix: str, begins: bytes) -> None:
    good = Loss(
        "p",
        "a",
        "b",
        [quality.Second(40.0, 0.95, 1.0, 1.0)],
        [0.01, 0.02],
        50.0,
        0.01,
        0.001,
        0,
        0,
        2,
        THRESHOLDS,
        {},
    )
    quality.plotter(tmp_path / f"q{suffix}")(good)
    assert (tmp_path / f"q{suffix}").read_bytes().startswith(begins)


def test_a_missed_threshold_of_the_profile_is_exit_3(
    aapt: Callable[..., Ran], copied: Path
) -> None:
    profile = copied / "profile.toml"
    text = profile.read_text()
    profile.write_text(text[: text.index("[quality]")] + "[quality]\npsnr_db = 120.0\n")
    rewrite_manifest(
        copied, lambda manifest: manifest["files"].update({"profile.toml": _describe(profile)})
    )
    ran = aapt("quality", copied, "--precision", "int8", "--seconds", 1)
    assert ran.code == VerdictError.exit_code, ran.err
    assert "DB IS BELOW 120.0" in ran.err and ran.out == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ("--reference", "onnxruntime-int8", "--precision", "int8"),
            UsageError.exit_code,
            "onnxruntime-int8 is compared with itself",
        ),
        (
            ("--reference", "tensorrt-fp8", "--precision", "int8"),
            UsageError.exit_code,
            "no engine 'tensorrt-fp8'",
        ),
        (("--precision", "fp64"), UsageError.exit_code, "precision 'fp64' does not exist"),
        (("--reference", "nope"), UsageError.exit_code, "'nope' names no engine"),
        (
            ("--reference", "onnxruntime-bf16"),
            UsageError.exit_code,
            "precision 'bf16' does not exist for onnxruntime",
        ),
    ],
)
def test_wrong_engines_are_named(
    aapt: Callable[..., Ran], bundle: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    ran = aapt("quality", bundle, *arguments)
    assert ran.code == code and words in ran.error


def test_the_section_is_optional_and_checked(bundle: Path) -> None:
    text = (bundle / "profile.toml").read_text()
    without = text[: text.index("[quality]")]
    assert loads(without, "x").quality == Quality()
    assert loads(without + "[quality]\nssim = 0.99\n", "x").quality == Quality(ssim=0.99)
    with pytest.raises(ProfileError, match=r"quality.drift = nan is not a positive number"):
        loads(without + "[quality]\ndrift = nan\n", "x")
    with pytest.raises(ProfileError, match=r"unknown key 'quality.vmaf'"):
        loads(without + "[quality]\nvmaf = 90.0\n", "x")


# --- figures by hand ---


@pytest.mark.parametrize(("shift", "brightness"), [(20, 1.25), (-20, 0.75)])
def test_a_change_of_brightness_leaves_sharpness_as_it_is(shift: int, brightness: float) -> None:
    """Frames of grey levels 60 to 100, all lighter or all darker: edges stay as they are."""
    rng = np.random.default_rng(0)
    picture = rng.integers(60, 101, (4, 32, 64, 1), dtype=np.uint8).repeat(3, -1)
    a, b = luma(picture), luma((picture.astype(int) + shift).astype(np.uint8))
    _, figures = quality._figures(
        np.concatenate([a[:1], a]), np.concatenate([b[:1], b]), np.zeros(4)
    )
    sharpness, bright, *_ = figures
    assert sharpness == pytest.approx(1, abs=1e-9)
    assert bright == pytest.approx(1 + shift / a.mean()) == pytest.approx(brightness, abs=0.01)


def test_drift_is_that_of_brightness_where_sharpness_stays(
    spoil: Callable[[str, Change], Loss],
) -> None:
    lighter = lambda frames: np.minimum(frames, 255 - 40) + np.uint8(40)
    loss = spoil("decoder", lambda out: out | {"frames": lighter(out["frames"])})
    (second,) = loss.seconds
    assert second.brightness > 1.1 and abs(second.brightness - 1) > abs(second.sharpness - 1)
    assert loss.drift == pytest.approx(abs(second.brightness - 1), abs=1e-4)


def seconds_of(sharpness: list[float], brightness: list[float]) -> list[quality.Second]:
    return [quality.Second(40.0, 0.95, *pair) for pair in zip(sharpness, brightness, strict=True)]


@pytest.mark.parametrize(
    ("sharpness", "brightness", "slope"),
    [
        ([1.0, 1.0, 1.0], [1.0, 1.1, 1.2], 0.1),
        ([1.0, 0.8, 0.6], [1.0, 1.1, 1.2], 0.2),
        ([1.0, 1.3], [1.0, 0.6], 0.4),
        ([0.5], [2.0], 0.0),
    ],
)
def test_the_slope_is_the_steeper_one_of_sharpness_and_brightness(
    sharpness: list[float], brightness: list[float], slope: float
) -> None:
    assert quality._slope(seconds_of(sharpness, brightness)) == pytest.approx(slope)


def test_the_figures_of_a_block_by_hand() -> None:
    """Two frames of 8x9 with the frame before.

    The candidate is twice as bright and twice as sharp.
    """
    ramp = np.arange(72.0).reshape(8, 9)
    a = np.stack([ramp, ramp + 1, ramp + 3])
    b = 2 * a
    b[-1] += 10
    pictures, (sharp, bright, change_a, change_b, deviation) = quality._figures(
        a, b, np.array([5.0, 7.0])
    )
    assert pictures[:, 0].tolist() == [5, 7]
    assert pictures[:, 1] == pytest.approx([ssim(a[1], b[1]), ssim(a[2], b[2])])
    assert sharp == pytest.approx(2)
    assert bright == pytest.approx(b[1:].mean() / a[1:].mean())
    assert (change_a, change_b) == pytest.approx((3, 16))
    assert deviation == pytest.approx(b[-1].std())
    assert gradient(a) == pytest.approx(1 + 9)


def test_a_black_reference_divides_nothing() -> None:
    black, white = np.zeros((3, 8, 8)), np.full((3, 8, 8), 255.0)
    _, (sharp, bright, *_) = quality._figures(black, white, np.zeros(2))
    assert np.isfinite([sharp, bright]).all() and sharp == 0 and bright == pytest.approx(255e6)


def test_decibels_of_a_square_error() -> None:
    assert quality._decibels(255**2) == 0 and quality._decibels(255**2 / 100) == 20
    assert quality._decibels(0) == round(10 * np.log10(255**2 * 1e9), 2)
    rows = np.array(
        [[255**2 / 10, 0.8, 1.0, 1.2, 0, 0, 0], [3 * 255**2 / 10, 0.9, 2.0, 1.4, 0, 0, 0]]
    )
    assert quality._second(rows) == quality.Second(round(10 * np.log10(5), 2), 0.85, 1.5, 1.3)


def test_luma_is_bt601() -> None:
    frames = np.array([[[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]]], np.uint8)
    assert luma(frames)[0, 0] == pytest.approx([76.245, 149.685, 29.07, 255])


# --- the plot ---


def test_a_plot_has_every_curve_under_its_title(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four in a row, 1200 x 320 pixels, their titles small enough to stand side by side."""
    from matplotlib.figure import Figure

    drawn: list[tuple[Figure, str]] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _, format: drawn.append((figure, format)))
    seconds = [quality.Second(40.0, 0.95, 1.1, 0.9), quality.Second(30.0, 0.9, 1.2, 0.8)]
    loss = Loss(
        "p", "a", "b", seconds, [0.01, 0.02, 0.03], 50.0, 0.01, 0.001, 0, 0, 2, THRESHOLDS, {},
        [41.0, 42.0, 43.0, 44.0], [0.91, 0.92, 0.93, 0.94, 0.95],
    )  # fmt: skip
    assert quality.plot(loss, "svg") == b""
    ((figure, kind),) = drawn
    assert kind == "svg" and tuple(figure.get_size_inches()) == (12, 3.2)
    named = lambda line: str(line.get_label()).removeprefix("_child0")  # matplotlib's "no name"
    curves = {
        axes.get_title(): {named(line): list(line.get_ydata()) for line in axes.lines}
        for axes in figure.axes
    }
    assert curves == {
        "latent error, teacher-forced, by block": {"": [0.01, 0.02, 0.03]},
        "PSNR in dB, free-running, by frame": {"": [41.0, 42.0, 43.0, 44.0]},
        "SSIM, free-running, by frame": {"": [0.91, 0.92, 0.93, 0.94, 0.95]},
        "shares by second": {"sharpness": [1.1, 1.2], "brightness": [0.9, 0.8]},
    }
    assert {axes.title.get_fontsize() for axes in figure.axes} == {9}
    assert {line.get_marker() for axes in figure.axes for line in axes.lines} == {"."}
    assert [axes.get_legend() is not None for axes in figure.axes] == [False] * 3 + [True]
    columns = [axes.get_subplotspec().colspan.start for axes in figure.axes]
    assert columns == [0, 1, 2, 3] and figure.get_layout_engine() is not None


def test_what_is_wrong_with_the_engines_to_compare_is_told_with_what_there_is(
    bundle: Path, bare: Path
) -> None:
    opened = Bundle.open(bundle)
    built = ", ".join(sorted(opened.engines))
    with pytest.raises(UsageError, match="onnxruntime-fp32 is compared with itself") as caught:
        run(opened, "onnxruntime-fp32", "onnxruntime-fp32")
    assert caught.value.hint == f"engines of {bundle}: {built}"
    with pytest.raises(UsageError, match=f"{bundle} has no engine 'tensorrt-bf16'") as caught:
        run(opened, "tensorrt-bf16", "onnxruntime-fp32")
    assert caught.value.hint.startswith(f"built: {built}; ")
    with pytest.raises(UsageError, match="has no engine 'onnxruntime-int8'") as caught:
        run(Bundle.open(bare), "onnxruntime-int8", "onnxruntime-fp32")
    assert caught.value.hint.startswith("built: none; build it with: aapt build-engine")
    with pytest.raises(UsageError, match="'fp32' names no engine"):
        run(opened, "fp32", "onnxruntime-fp32")


def run(opened: Bundle, reference: str, candidate: str) -> Loss:
    return compare(opened, reference, candidate, 1, unexpected, silent)


def test_engines_are_closed_also_if_the_second_cannot_be_opened(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    opened = Bundle.open(bundle)

    class Opened:
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            closed.append(self.name)

    def open_one(holder: Bundle, name: str, warn: object) -> Opened:
        assert holder is opened and warn is unexpected
        if name == "missing":
            raise UsageError("missing", "none")
        return Opened(name)

    monkeypatch.setattr(quality, "_open", open_one)
    with pytest.raises(UsageError, match="missing"):
        run(opened, "a", "missing")
    assert closed == ["a"]
    monkeypatch.setattr(quality, "_compare", lambda *given: [e.name for e in given[2]])
    assert run(opened, "a", "b") == ["a", "b"] and closed == ["a", "b", "a"]  # type: ignore[comparison-overlap]


def test_the_frames_of_a_block_are_paired_with_the_frame_before() -> None:
    """Unequal streams end with the shorter; each block carries the last frame of the one before."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, 256, (n, 8, 9, 3), dtype=np.uint8)
    a, b = [draw(n) for n in (1, 4, 3, 2)], [draw(n) for n in (1, 4, 3, 2)]
    found = list(quality._pairs(iter(a), iter(b), 2))
    assert len(found) == 2 and len(list(quality._pairs(iter(a), iter(b[:2]), 2))) == 1
    for block, (left, right, errors) in enumerate(found, start=1):
        for mine, stream in ((left, a), (right, b)):
            wanted = luma(np.concatenate([stream[block - 1][-1:], stream[block]]))
            np.testing.assert_array_equal(mine, wanted)
        difference = a[block].astype(float) - b[block]
        np.testing.assert_allclose(errors, np.square(difference).mean((1, 2, 3)))


def test_the_record_holds_what_was_compared(spoil: Callable[[str, Change], Loss]) -> None:
    loss = spoil("generator", lambda out: out)
    record = json.loads(loss.json())
    assert (record["profile"], record["reference"], record["candidate"]) == ("tiny-cpu", "a", "b")
    assert record["thresholds"] == THRESHOLDS and record["machine"] == machine()
    assert record["failures"] == [] and record["blocks"] == 12
    assert len(record["frame_psnr_db"]) == len(record["frame_ssim"]) == 24
    assert record["frame_ssim"] == [1.0] * 24 and loss.drift_per_s == 0


def test_figures_are_rounded_for_the_record(spoil: Callable[[str, Change], Loss]) -> None:
    rng = np.random.default_rng(0)
    loss = spoil(
        "decoder", lambda out: out | {"frames": out["frames"] ^ rng.integers(0, 64, dtype=np.uint8)}
    )
    for values, digits in (
        (loss.latent_error, 6), (loss.frame_psnr_db, 2), (loss.frame_ssim, 4),
        ([loss.decoder_psnr_db, loss.seconds[0].psnr_db], 2),
        ([loss.drift, loss.drift_per_s, *vars(loss.seconds[0]).values()], 4),
    ):  # fmt: skip
        assert [round(value, digits) for value in values] == values
    assert loss.frame_ssim != [round(value, 3) for value in loss.frame_ssim]


def test_progress_names_the_start_and_the_length(bundle: Path) -> None:
    said: list[str] = []
    opened = Bundle.open(bundle)
    compare(opened, "onnxruntime-fp32", "onnxruntime-int8", 1, unexpected, said.append)
    assert said == ["1 of 2 starts, 1 s each", "2 of 2 starts, 1 s each"]
