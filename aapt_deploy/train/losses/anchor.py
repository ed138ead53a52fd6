"""Predict a stream's light, colour and contrast, and measure how far a latent has strayed.

Ridge regression, fitted in closed form on the clips. Features are the prompt's words and the first
frame's figures; targets are the same figures of a later frame. What later frames of true clips
deviate by is the natural spread. Only what is beyond a band of it counts as strayed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aapt_deploy.train.losses.flow import Latents

GRID = (3, 4)  # places of a picture whose levels are looked at
# Pairs of frames of a clip, as parts of its length.
PAIRS = ((0.0, 1.0), (0.0, 0.7), (0.1, 0.8), (0.3, 1.0))
RIDGE = 3.0


@dataclass(frozen=True)
class Anchor:
    """A linear guess of a frame's figures.

    Figures are levels [C, *GRID] and the logarithm of the deviation around them [C].
    """

    weights: Tensor  # [features, C * places + C]
    spread: Tensor  # [C * places + C] of true frames around the guess
    words: int  # of the vocabulary

    def to(self, device: torch.device) -> "Anchor":
        return Anchor(self.weights.to(device), self.spread.to(device), self.words)

    def excess(
        self, latent: Tensor, text: Tensor, first: Tensor, band: float
    ) -> tuple[Tensor, Tensor]:
        """Return what is beyond `band` spreads; zero for what is natural.

        Of levels [N, C, *GRID] and of log deviations [N, C].
        latent, first [N, C, h, w]: a frame, and the stream's first; text: ids [N, L].
        """
        off = _figures(latent) - _features(text, first, self.words) @ self.weights
        beyond = off - off.clamp(-band * self.spread, band * self.spread)
        c = latent.shape[1]
        return beyond[:, :-c].unflatten(1, (c, *GRID)), beyond[:, -c:]

    def pulled(self, target: Tensor, levels: Tensor, deviations: Tensor, pull: float) -> Tensor:
        """Return `target` [N, C, h, w] with the part `pull` of an excess taken back."""
        moved = target - pull * smooth(levels, target)
        base = coarse(moved)
        return base + (-pull * deviations).exp()[..., None, None] * (moved - base)


def fit_anchor(latents: Latents) -> Anchor:
    """Fit the anchor of a set of clips."""
    m, words = (
        latents.z.shape[1] - 1,
        int(latents.tokens.max()) + 1 if latents.tokens.numel() else 0,
    )
    pairs = [
        (latents.z[:, round(a * m)].float(), latents.z[:, round(b * m)].float()) for a, b in PAIRS
    ]
    x = torch.cat([_features(latents.tokens, first, words) for first, _ in pairs])
    y = torch.cat([_figures(later) for _, later in pairs])
    weights = torch.linalg.solve(x.mT @ x + RIDGE * torch.eye(x.shape[1]), x.mT @ y)
    return Anchor(weights, (y - x @ weights).std(0), words)


def coarse(z: Tensor) -> Tensor:
    """The levels of z [N, C, h, w], spread over the picture again: same shape."""
    return smooth(F.adaptive_avg_pool2d(z, GRID), z)


def smooth(levels: Tensor, like: Tensor) -> Tensor:
    """Levels [N, C, *GRID] at the size of a picture: [N, C, h, w]."""
    return F.interpolate(levels, size=like.shape[-2:], mode="bilinear")


def _figures(z: Tensor) -> Tensor:
    """[N, C, h, w] -> [N, C * places + C]"""
    levels = F.adaptive_avg_pool2d(z, GRID)
    return torch.cat(
        [levels.flatten(1), (z - smooth(levels, z)).std((2, 3)).clamp_min(1e-3).log()], dim=1
    )


def _features(text: Tensor, first: Tensor, words: int) -> Tensor:
    """Return the prompt's words, and the first frame's rows, levels and deviations.

    No columns: what is where in a row does not last.
    """
    c = first.shape[1]
    figures = _figures(first)
    levels = figures[:, :-c].unflatten(1, (c, *GRID))
    said = F.one_hot(text, words).sum(1).to(first) if words else first.new_zeros(len(first), 0)
    return torch.cat(
        [said, levels.mean(3).flatten(1), figures[:, -c:], first.new_ones(len(first), 1)], dim=1
    )
