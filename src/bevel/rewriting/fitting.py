"""Cheap functions that come closest to dear ones, by least squares on calibration images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BENDS = torch.linspace(-3, 3, 49, dtype=torch.float64)
"""Where a ReLU may bend; the functions that it stands for bend between these."""


@dataclass(frozen=True)
class Error:
    """Squared error at a site relative to the squares of what it should give.

    Attributes:
        naive: of the cheap layer put in place as it is.
        fitted: of what bevel puts there.
    """

    naive: float
    fitted: float


def fit_relu(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scale s and shift t of each channel, so that relu(s x + t) is closest to y.

    relu(s x + t) = s relu(x - b) for a bend b = -t / s: for each b on a grid the best s is known in
    closed form, <relu(x - b), y> / <relu(x - b), relu(x - b)>, and the best b is taken.

    Args:
        x: (channels, samples).
        y: what the dear function makes of it, of the same shape.

    Returns:
        s > 0 and t, each (channels,). A channel that no bend helps keeps s = 1, t = 0.
    """
    x, y = x.double(), y.double()
    best = (torch.relu(x) - y).square().sum(1)
    scale, shift = torch.ones(len(x)).double(), torch.zeros(len(x)).double()
    for bend in BENDS:
        bent = torch.relu(x - bend)
        squares = bent.square().sum(1)
        s = (bent * y).sum(1) / squares.clamp(min=1e-12)
        error = (s[:, None] * bent - y).square().sum(1)
        better = (error < best) & (s > 0) & (squares > 1e-12)
        best = torch.where(better, error, best)
        scale, shift = torch.where(better, s, scale), torch.where(better, -s * bend, shift)
    return scale.float(), shift.float()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Sum of squared differences over the sum of squares."""
    squares = float(wanted.double().square().sum())
    return float((found.double() - wanted.double()).square().sum()) / max(squares, 1e-30)


def by_channel(samples: Tensor) -> Tensor:
    """(images, channels, positions) to (channels, samples)."""
    return samples.transpose(0, 1).flatten(1)
