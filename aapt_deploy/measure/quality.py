"""Compare two engines of a checkpoint, by pass and over a rollout (`aapt quality`).

    teacher-forced   both get the same inputs, block by block, along the reference's rollout; each
                     keeps its own cache. Error of the clean latent, relative to the latent's own
                     size, and of the frames decoded from it
    free-running     each on its own from the same start and noise: PSNR and SSIM by frame and
                     second, and whether sharpness and brightness leave the reference's. Two
                     rollouts part after some seconds without either being worse, so pictures are
                     compared for the first only
    degenerate       blocks that are flat, or that stand still while the reference's move

The profile's [quality] sets the thresholds. `aapt train evaluate` tests if a checkpoint is good.
"""

import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from aapt_deploy.backends.table import BACKENDS, open_engines, refuse_unknown, to_get
from aapt_deploy.backends.trial import Report, left_and_right
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.bundle.files import refuse_irregular, whole, writing
from aapt_deploy.errors import UsageError
from aapt_deploy.measure.machine import machine
from aapt_deploy.rollout.engine import Engines, Tapped
from aapt_deploy.rollout.starts import all_starts
from aapt_deploy.video.metrics import LUMA, psnr_db

SSIM_WINDOW = 8  # pixels
FLAT = 1.0  # deviation of luma, in levels, below which a picture shows nothing
PICTURES = (".png", ".svg", ".pdf")  # suffixes of plots
STILL = 0.1  # share of the reference's change between blocks below which a block stands still


@dataclass(frozen=True)
class Second:
    """Free-running, over one second and all starts."""

    psnr_db: float
    ssim: float
    sharpness: float  # mean gradient over the reference's
    brightness: float  # mean luma over the reference's


@dataclass(frozen=True)
class Loss:
    """What the candidate loses."""

    profile: str
    reference: str  # "<backend>-<precision>"
    candidate: str
    seconds: list[Second]
    latent_error: list[float]  # teacher-forced, by block, over all starts
    decoder_psnr_db: float  # teacher-forced: frames decoded from the reference's latents
    drift: float  # largest |sharpness - 1| or |brightness - 1| of a second
    drift_per_s: float  # largest slope of these shares over the rollout, per second (least squares)
    flat_blocks: int
    still_blocks: int
    blocks: int
    thresholds: dict[str, float]
    machine: dict[str, str | int]
    # free-running, frame by frame, over all starts
    frame_psnr_db: list[float] = field(default_factory=list)
    frame_ssim: list[float] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """Describe each threshold that is missed."""
        t, first, error = self.thresholds, self.seconds[0], float(np.mean(self.latent_error))
        psnr, similar, drift, per_s = first.psnr_db, first.ssim, self.drift, self.drift_per_s
        blocks = f"of {self.blocks} blocks"
        found = [  # a NaN passes no threshold
            (error <= t["latent_error"], f"latent error {error:.4f} is above {t['latent_error']}"),
            (psnr >= t["psnr_db"], f"PSNR {psnr:.1f} dB is below {t['psnr_db']}"),
            (similar >= t["ssim"], f"SSIM {similar:.4f} is below {t['ssim']}"),
            (drift <= t["drift"], f"drift {drift:.3f} is above {t['drift']}"),
            (
                per_s <= t["drift_per_s"],
                f"drift of {per_s:.3f} per second is above {t['drift_per_s']}",
            ),
            (not self.flat_blocks, f"{self.flat_blocks} {blocks} are flat"),
            (not self.still_blocks, f"{self.still_blocks} {blocks} stand still"),
        ]
        return [text for passed, text in found if not passed]

    def json(self) -> str:
        return json.dumps({**asdict(self), "failures": self.failures})


class Twins:
    """A tap that makes the same calls to a second engine.

    The rollout gets the reference's answers. The tap stores how the other's differ.
    """

    def __init__(self, candidate: Engines) -> None:
        self.candidate = candidate
        self.passes: list[float] = []  # errors of the block in progress, by pass
        self.errors: list[float] = []  # per block, the mean of its passes
        self.decoded: list[float] = []  # mean square error of a block's frames

    def __call__(
        self, graph: str, method: str, call: Callable[..., Any], arguments: dict[str, Any]
    ) -> Any:
        expected = call(**arguments)
        found = getattr(self.candidate[graph], method)(**arguments)
        if (graph, method) == ("generator", "run"):
            a, b = expected["clean"].astype(np.float64), found["clean"]
            self.passes.append(float(np.sqrt(np.square(b - a).mean() / np.square(a).mean())))
        elif (graph, method) == ("generator", "commit"):
            self.errors.append(float(np.mean(self.passes)))
            self.passes.clear()
        elif (graph, method) == ("decoder", "run"):
            difference = expected["frames"].astype(np.float64) - found["frames"]
            self.decoded.append(float(np.square(difference).mean()))
        return expected


def compare(
    bundle: Bundle, reference: str, candidate: str, seconds: int, warn: Report, report: Report,
    elsewhere: Bundle | None = None,
) -> Loss:  # fmt: skip
    """Compare two engines of `bundle`, "<backend>-<precision>", from every start frame.

    The reference may be an engine of another bundle, `elsewhere`.

    Raises UsageError if the bundle lacks the engine, if an engine is compared with itself, or if
    the bundles are of two checkpoints.
    """
    alone = elsewhere is None or elsewhere.path.resolve() == bundle.path.resolve()
    if reference == candidate and alone:
        raise UsageError(
            f"{candidate} is compared with itself",
            f"engines of {bundle.path}: {', '.join(sorted(bundle.engines))}",
        )
    if elsewhere is not None and (
        _source(elsewhere) != _source(bundle) or elsewhere.profile != bundle.profile
    ):
        raise UsageError(
            f"{elsewhere.path} and {bundle.path} are not of one checkpoint and profile",
            "export both from the same checkpoint",
        )
    with contextlib.ExitStack() as stack:
        opened = []
        for holder, name in ((elsewhere or bundle, reference), (bundle, candidate)):
            opened.append(_open(holder, name, warn))
            stack.callback(opened[-1].close)
        return _compare(bundle, (reference, candidate), opened, seconds, report)


def _source(bundle: Bundle) -> Any:
    """Return the hash of the checkpoint that a bundle was made of."""
    return bundle.manifest["source"]["sha256"]


def _open(bundle: Bundle, name: str, warn: Report) -> Engines:
    backend, _, precision = name.rpartition("-")
    if not backend:
        raise UsageError(
            f"{name!r} names no engine",
            "engines are named BACKEND-PRECISION, for example onnxruntime-fp32",
        )
    refuse_unknown(backend, precision)
    if name not in bundle.engines and BACKENDS[backend].needs_build:
        built = ", ".join(sorted(bundle.engines)) or "none"
        raise UsageError(
            f"bundle {bundle.path} has no engine {name!r}",
            f"built: {built}; {to_get(bundle, backend, precision)}",
        )
    return open_engines(bundle, backend, precision, warn)


def _compare(
    bundle: Bundle, names: tuple[str, str], opened: list[Engines], seconds: int, report: Report
) -> Loss:
    profile, starts = bundle.profile, all_starts(bundle)
    # blocks; a slower video is judged block by block
    per_second = max(1, profile.video.fps // profile.frames_per_block)
    blocks = seconds * per_second
    forced, decoded, free, frames = [], [], [], []
    for number, begin in enumerate(starts, start=1):
        reference, candidate = opened
        twins = Twins(candidate)
        for _ in islice(left_and_right(Tapped(reference, twins), profile, begin), 1 + blocks):
            pass
        forced.append(twins.errors[-blocks:])
        decoded.append(np.mean(twins.decoded[1:]))
        streams = [left_and_right(engines, profile, begin) for engines in opened]
        found = [_figures(*pair) for pair in _pairs(streams[0], streams[1], blocks)]
        rows = [[*pictures.mean(0), *others] for pictures, others in found]
        free.append(np.array(rows))  # [blocks, 7]
        frames.append(np.concatenate([pictures for pictures, _ in found]))  # [frames, 2]
        report(f"{number} of {len(starts)} starts, {seconds} s each")
    figures = np.stack(free)  # [starts, blocks, 7]
    seconds_of = [figures[:, i : i + per_second] for i in range(0, blocks, per_second)]
    by_second = [_second(rows.reshape(-1, figures.shape[2])) for rows in seconds_of]
    shares = [share for s in by_second for share in (s.sharpness, s.brightness)]
    reference_change, change, deviation = figures[..., 4], figures[..., 5], figures[..., 6]
    by_frame = np.mean(frames, axis=0)  # [frames, 2]
    return Loss(
        profile=profile.name,
        reference=names[0],
        candidate=names[1],
        seconds=by_second,
        latent_error=[round(float(e), 6) for e in np.mean(forced, axis=0)],
        decoder_psnr_db=_decibels(float(np.mean(decoded))),
        drift=round(max(abs(share - 1) for share in shares), 4),
        drift_per_s=round(_slope(by_second), 4),
        flat_blocks=int((deviation < FLAT).sum()),
        still_blocks=int((change < STILL * reference_change).sum()),
        blocks=deviation.size,
        thresholds=asdict(profile.quality),
        machine=machine(),
        frame_psnr_db=[_decibels(float(e)) for e in by_frame[:, 0]],
        frame_ssim=[round(float(x), 4) for x in by_frame[:, 1]],
    )


def _pairs(
    reference: Iterator[np.ndarray], candidate: Iterator[np.ndarray], blocks: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield blocks of luma [1 + T, H, W] of both, and the square errors [T] of the frames.

    Each block has the frame before it in front.
    """
    before = [luma(next(stream))[-1:] for stream in (reference, candidate)]
    for a, b in islice(zip(reference, candidate, strict=False), blocks):
        pair = luma(a), luma(b)
        errors = np.square(a.astype(np.float64) - b).mean((1, 2, 3))
        yield np.concatenate([before[0], pair[0]]), np.concatenate([before[1], pair[1]]), errors
        before = [pair[0][-1:], pair[1][-1:]]


def _figures(
    a: np.ndarray, b: np.ndarray, square_errors: np.ndarray
) -> tuple[np.ndarray, list[float]]:
    """Return [square error, SSIM] of every frame, [T, 2], and the figures of the block.

    The latter are sharpness, brightness, change of a, change of b, deviation of b.
    a, b: luma [1 + T, H, W] with the frame before; square_errors [T].
    """
    similar = [ssim(x, y) for x, y in zip(a[1:], b[1:], strict=True)]
    changes = [float(np.abs(x[-1] - x[0]).mean()) for x in (a, b)]
    sharp = gradient(b[1:]) / max(gradient(a[1:]), 1e-6)
    bright = float(b[1:].mean() / max(a[1:].mean(), 1e-6))
    return np.stack([square_errors, similar], 1), [sharp, bright, *changes, float(b[-1].std())]


def _second(rows: np.ndarray) -> Second:
    shares = (round(float(x), 4) for x in rows[:, 1:4].mean(0))
    return Second(_decibels(float(rows[:, 0].mean())), *shares)


def _slope(seconds: list[Second]) -> float:
    """Return the largest slope of sharpness or brightness against the reference, per second.

    It is 0 for a single second.
    """
    if len(seconds) < 2:
        return 0.0
    curves = ([s.sharpness for s in seconds], [s.brightness for s in seconds])
    return max(abs(float(np.polyfit(range(len(seconds)), curve, 1)[0])) for curve in curves)


def _decibels(square_error: float) -> float:
    return round(psnr_db(square_error), 2)


def luma(frames: np.ndarray) -> np.ndarray:
    """Return luma float64 [T, H, W], 0..255 (BT.601), of uint8 [T, H, W, 3]."""
    y: np.ndarray = frames @ LUMA
    return y


def gradient(y: np.ndarray) -> float:
    """Return the mean absolute difference of neighbouring pixels of luma [T, H, W]."""
    return float(np.abs(np.diff(y, axis=1)).mean() + np.abs(np.diff(y, axis=2)).mean())


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Return the structural similarity of two luma pictures [H, W], 0..255.

    Over all 8x8 windows (Wang et al. 2004).
    """
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ma, mb, aa, bb, ab = (_box(x) for x in (a, b, a * a, b * b, a * b))
    va, vb, cov = aa - ma * ma, bb - mb * mb, ab - ma * mb
    return float(
        ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))).mean()
    )


def _box(x: np.ndarray) -> np.ndarray:
    """Mean over every window of 8x8: [H, W] -> [H - 7, W - 7]."""
    total = np.pad(x, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    n = SSIM_WINDOW
    mean: np.ndarray = (total[n:, n:] - total[:-n, n:] - total[n:, :-n] + total[:-n, :-n]) / n**2
    return mean


def plotter(path: Path | None) -> Callable[[Loss], None]:
    """Return a function that plots a Loss to `path`; for None, one that does nothing.

    Suffix, matplotlib and writability are checked now, before anything is measured.

    Raises UsageError if the suffix is not a picture's, OutputError if no file can be written, and
    ModuleNotFoundError without matplotlib. The function raises OutputError, and leaves an older
    picture as it was.
    """
    if path is None:
        return lambda loss: None
    if path.suffix.lower() not in PICTURES:
        raise UsageError(
            f"--plot {path} has the suffix {path.suffix!r} of no picture",
            f"suffixes: {', '.join(PICTURES)}",
        )
    import matplotlib.backends.backend_agg  # noqa: F401  it is here, or is not

    with _writing(path):
        refuse_irregular(path)
        tempfile.TemporaryFile(dir=path.parent).close()  # can a file be written there?
    return lambda loss: _save(plot(loss, path.suffix[1:].lower()), path)


def _save(picture: bytes, path: Path) -> None:
    with _writing(path), whole(path) as temporary:
        temporary.write_bytes(picture)


def _writing(path: Path) -> contextlib.AbstractContextManager[None]:
    return writing(f"plot {path}", "choose another path, in a folder that exists")


def plot(loss: Loss, kind: str) -> bytes:
    """Plot errors by block, figures by frame and by second, as one picture.

    `kind` as in PICTURES, without the dot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    curves = {
        "latent error, teacher-forced, by block": [("", loss.latent_error)],
        "PSNR in dB, free-running, by frame": [("", loss.frame_psnr_db)],
        "SSIM, free-running, by frame": [("", loss.frame_ssim)],
        "shares by second": [
            ("sharpness", [s.sharpness for s in loss.seconds]),
            ("brightness", [s.brightness for s in loss.seconds]),
        ],
    }
    for axes, (title, lines) in zip(figure.subplots(1, 4), curves.items(), strict=True):
        for label, values in lines:
            axes.plot(values, marker=".", label=label)
        axes.set_title(title, fontsize=9)
    figure.axes[-1].legend()
    file = io.BytesIO()
    figure.savefig(file, format=kind)
    return file.getvalue()
