"""Measure pictures and their motion without a network that would have to be downloaded.

A flight is measured on the last frame of each block, deterministically. Change and motion are taken
from one block's last frame to the next one's. Within a block frames move unevenly, because a latent
shows its first ones best (docs/log.md).

`features` is a convolution net with fixed random weights. It is too simple to name what it sees. It
tells two crowds of pictures apart (Frechet distance). With a linear layer fitted on renders, it
tells dusk from noon.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from aapt_deploy.models.aapt.prompts import ATTRIBUTES, Look
from aapt_deploy.video import metrics

LUMA = torch.from_numpy(metrics.LUMA).float()
COARSE = 8  # pixels
CHANNELS = (3, 24, 32, 48)  # of the feature net, by level
# Principal components that the Frechet distance sees, of a crowd of 30 flights. A flight is one
# look at a world, however many pictures it has.
COMPONENTS = 10
RIDGE = 0.03  # of the classifier, relative to a feature's variance
RESAMPLES = 200  # draws of flights that a standard error comes from
LEVELS = ((8, 6), (4, 6), (2, 4))  # of the motion estimate: reduction, iterations


class Track(NamedTuple):
    """A flight, measured block by block; n rows each."""

    gradient: np.ndarray  # [n] mean absolute luma difference of neighbouring pixels
    colour: np.ndarray  # [n, 3] channel means, 0..255
    change: np.ndarray  # [n] mean absolute luma difference from the last frame of the block before
    motion: np.ndarray  # [n, 3] right and down in pixels, zoom; from the same frame
    flow: (
        np.ndarray
    )  # [n] what that motion comes to over the picture: root mean square displacement in pixels
    features: np.ndarray  # [n, F]
    coarse: np.ndarray  # [n, C] luma in blocks of 8 pixels, zero mean, unit length

    def rows(self, chosen: slice) -> "Track":
        return Track(*(part[chosen] for part in self))


def stacked(tracks: list[Track]) -> Track:
    """The rows of several tracks one below the other."""
    return Track(*(np.concatenate(parts) for parts in zip(*tracks, strict=True)))


def measure_frames(shown: np.ndarray, before: np.ndarray | None = None) -> Track:
    """Measure the last frames of n blocks, uint8 [n, H, W, 3].

    before [H, W, 3]: the last frame of the block before them. Without it the first one is still.
    """
    frames = torch.from_numpy(shown).float()  # [n, H, W, 3]
    luma = frames @ LUMA  # [n, H, W]
    past = torch.cat(
        [luma[:1] if before is None else torch.from_numpy(before[None]).float() @ LUMA, luma[:-1]]
    )
    gradient = luma.diff(dim=1).abs().mean((1, 2)) + luma.diff(dim=2).abs().mean((1, 2))
    coarse = F.avg_pool2d(luma[:, None], COARSE).flatten(1)
    coarse = coarse - coarse.mean(1, keepdim=True)
    moved = motion(past, luma)
    flow = (
        moved[:, 0] ** 2
        + moved[:, 1] ** 2
        + moved[:, 2] ** 2 * (luma.shape[1] ** 2 + luma.shape[2] ** 2) / 12
    ).sqrt()
    parts = (
        gradient, frames.mean((1, 2)), (luma - past).abs().mean((1, 2)), moved, flow,
        features(frames.permute(0, 3, 1, 2)),
        coarse / coarse.norm(dim=1, keepdim=True).clamp_min(1e-6),
    )  # fmt: skip
    return Track(*(part.numpy().astype(np.float64) for part in parts))


def motion(before: Tensor, after: Tensor) -> Tensor:
    """Estimate how pictures [n, H, W] move as a whole, [n, 3]: right, down, zoom.

    The point at u, from the centre, goes to u + (right, down) + zoom u. Least squares on brightness
    by Gauss-Newton, coarse to fine. A picture without texture does not move.
    """
    found = torch.zeros(len(before), 3)
    for reduction, iterations in LEVELS:
        a, b = (F.avg_pool2d(x[:, None], reduction) for x in (before, after))
        h, w = a.shape[2:]
        y, x = (torch.arange(n) - (n - 1) / 2 for n in (h, w))
        y, x = torch.meshgrid(y, x, indexing="ij")  # [h, w], reduced pixels from the centre
        for _ in range(iterations):
            right, down, zoom = (
                p[:, None, None]
                for p in (found / torch.tensor([reduction, reduction, 1.0])).unbind(1)
            )
            grid = torch.stack(
                [(x + right + zoom * x) * 2 / w, (y + down + zoom * y) * 2 / h], dim=-1
            )
            warped = F.grid_sample(b, grid, align_corners=False, padding_mode="border")[:, 0]
            inside = (grid.abs().amax(-1) < 1).float()
            gy, gx = torch.gradient(warped, dim=(1, 2))
            slopes = (
                torch.stack([gx, gy, gx * x + gy * y], dim=-1) * inside[..., None]
            )  # [n, h, w, 3]
            normal = torch.einsum("nhwi,nhwj->nij", slopes, slopes) + 1e-3 * torch.eye(3)
            toward = torch.einsum("nhwi,nhw->ni", slopes, a[:, 0] - warped)
            found = found + torch.linalg.solve(normal, toward) * torch.tensor(
                [reduction, reduction, 1.0]
            )
    return found


def features(images: Tensor) -> Tensor:
    """Compute the features [n, F] of images [n, 3, H, W] in 0..255.

    They are the mean responses of each channel of each level, for both halves of the picture.
    """
    rng = np.random.default_rng(0)
    x, found = images / 127.5 - 1, []
    for inputs, outputs in pairwise(CHANNELS):
        weights = rng.standard_normal((outputs, inputs, 5, 5)) / np.sqrt(25 * inputs / 2)
        bias = rng.uniform(-0.5, 0.5, outputs)
        w, b = (torch.from_numpy(array).float() for array in (weights, bias))
        x = F.relu(F.conv2d(x, w, b, stride=2, padding=2))
        half = x.shape[2] // 2
        found += [x[:, :, :half].mean((2, 3)), x[:, :, half:].mean((2, 3))]
    return torch.cat(found, dim=1)


class Crowd:
    """True pictures, and how far from them other pictures are as a crowd."""

    def __init__(self, true: np.ndarray, flights: int = 3 * COMPONENTS) -> None:
        """true [n, F]: features of renders from `flights` worlds.

        Each component needs three worlds.
        """
        self.mean, components = true.mean(0), max(1, min(COMPONENTS, flights // 3))
        _, spread, axes = np.linalg.svd(
            (true - self.mean) / np.sqrt(len(true)), full_matrices=False
        )
        # Whitened: every random filter sees brightness, which would drown the rest.
        # The floor keeps noise small.
        self.axes = axes[:components].T / np.maximum(spread[:components], 1e-3 * spread[0])
        self.true = self.project(true)

    def project(self, features: np.ndarray) -> np.ndarray:
        """[m, F] -> [m, components], in units of the true deviations."""
        projected: np.ndarray = (features - self.mean) @ self.axes
        return projected

    def distance(self, made: np.ndarray) -> float:
        """Return the Frechet distance of made [m, F] to the true crowd, per component.

        It is 0 for the crowd itself.
        """
        components: int = self.true.shape[1]
        return frechet(self.true, self.project(made)) / components


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Frechet distance of Gaussians fitted to a [n, C] and b [m, C].

    |mean a - mean b|^2 + tr(A + B - 2 (A B)^1/2)
    """
    root = _root(np.atleast_2d(np.cov(a, rowvar=False)))
    other = np.atleast_2d(np.cov(b, rowvar=False))
    cross = np.trace(_root(root @ other @ root))
    return float(
        ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(root @ root) + np.trace(other) - 2 * cross
    )


def _root(matrix: np.ndarray) -> np.ndarray:
    """Square root of a symmetric positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    root: np.ndarray = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    return root


class Classifier:
    """Read a prompt's attributes off a picture's features.

    One ridge regression onto all words, fitted on renders.
    """

    def __init__(self, true: np.ndarray, looks: list[Look]) -> None:
        """true [n, F]: features of renders; looks: what each shows."""
        self.mean, self.deviation = true.mean(0), true.std(0) + 1e-6
        x = self._design(true)
        gram = x.T @ x / len(x) + RIDGE * np.eye(x.shape[1])
        self.weights = np.linalg.solve(
            gram,
            x.T @ np.concatenate([_one_hot(looks, name) for name in ATTRIBUTES], axis=1) / len(x),
        )

    def _design(self, features: np.ndarray) -> np.ndarray:
        z = (features - self.mean) / self.deviation
        return np.concatenate([np.ones((len(z), 1)), z, z**2 / 2], axis=1)

    def obedience(self, features: np.ndarray, looks: list[Look]) -> dict[str, float]:
        """Share of pictures, features [n, F], in which each attribute is read as prompted."""
        scores, first, shares = self._design(features) @ self.weights, 0, {}
        for name, words in ATTRIBUTES.items():
            read = scores[:, first : first + len(words)].argmax(1)
            shares[name] = float(
                (read == [words.index(getattr(look, name)) for look in looks]).mean()
            )
            first += len(words)
        return shares


def _one_hot(looks: list[Look], name: str) -> np.ndarray:
    words = ATTRIBUTES[name]
    hot: np.ndarray = np.array(
        [[getattr(look, name) == word for word in words] for look in looks], np.float64
    )
    return hot


class Response(NamedTuple):
    """How pictures answer the camera."""

    # [4, 3]: motion per unit of yaw, strafe, pitch, forward; NaN for a command that never changes
    gains: np.ndarray

    @classmethod
    def fit(cls, commands: np.ndarray, moved: np.ndarray) -> "Response":
        """Least squares of motion [n, 3] on commands [n, 4], with an offset."""
        return cls._solved(*_sums(commands, moved))

    @classmethod
    def resampled(cls, flights: Sequence[tuple[np.ndarray, np.ndarray]]) -> "list[Response]":
        """Fit RESAMPLES draws, with repetition, of the `flights` (commands, motion).

        Equal numbers of flights get the same draws.
        """
        left, right = (
            np.stack(parts) for parts in zip(*(_sums(*flight) for flight in flights), strict=True)
        )
        draws = np.random.default_rng(0).integers(len(flights), size=(RESAMPLES, len(flights)))
        return [cls._solved(left[drawn].sum(0), right[drawn].sum(0)) for drawn in draws]

    @classmethod
    def _solved(cls, left: np.ndarray, right: np.ndarray) -> "Response":
        """left [5, 5] and right [5, 3] of the normal equations."""
        varies = np.diag(left)[:4] - left[:4, 4] ** 2 / left[4, 4] > 1e-12 * left[4, 4]
        return cls(
            np.where(varies[:, None], np.linalg.lstsq(left, right, rcond=None)[0][:4], np.nan)
        )

    def against(self, true: "Response") -> dict[str, float]:
        """Return each command's gain on what it moves most, relative to the true pictures' gain.

        1 obeys, 0 ignores, NaN was not commanded.
        """
        with np.errstate(
            invalid="ignore", divide="ignore"
        ):  # true pictures may not have moved at all
            return {
                name: float(self.gains[i, j] / true.gains[i, j])
                for i, (name, j) in enumerate(MOVES.items())
            }

    def correlation(self, commands: np.ndarray, moved: np.ndarray) -> dict[str, float]:
        """Correlate the motion that this response expects with the measured motion.

        NaN if nothing is expected to change, or nothing does.
        """
        expected = commands @ np.nan_to_num(self.gains)  # [n, 3]
        with np.errstate(invalid="ignore", divide="ignore"):
            return {
                name: float(np.corrcoef(expected[:, j], moved[:, j])[0, 1])
                for j, name in enumerate(("right", "down", "zoom"))
            }


def _sums(commands: np.ndarray, moved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sides of the normal equations: [5, 5] and [5, 3], the offset last."""
    design = np.concatenate([commands, np.ones((len(commands), 1))], axis=1)
    return design.T @ design, design.T @ moved


MOVES = {"yaw": 0, "strafe": 0, "pitch": 1, "forward": 2}  # command -> column of a motion
