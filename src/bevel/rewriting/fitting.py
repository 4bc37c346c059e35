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


@dataclass(frozen=True)
class Bend:
    """relu(s x + t) + e, each number per channel: (channels,)."""

    scale: Tensor
    shift: Tensor
    offset: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Of (channels, samples)."""
        bent = torch.relu(self.scale[:, None] * x + self.shift[:, None])
        return bent + self.offset[:, None]


def fit_relu(x: Tensor, y: Tensor, *, offset: bool) -> Bend:
    """Scale s > 0, shift t and offset e of each channel, so that relu(s x + t) + e is closest to y.

    relu(s x + t) = s relu(x - b) for a bend b = -t / s. For each b on a grid the best s, with e or
    without, is that of the line through (relu(x - b), y); the best b is taken.

    Args:
        x: (channels, samples).
        y: what the dear function makes of it, of the same shape.
        offset: whether an e other than 0 is allowed.

    Returns:
        The best of each channel; s = 1, t = 0 where no bend helps.
    """
    x, y = x.double(), y.double()
    plain = torch.relu(x)
    level = (y - plain).mean(1) if offset else torch.zeros(len(x)).double()
    best = (plain + level[:, None] - y).square().sum(1)
    scale, shift = torch.ones(len(x)).double(), torch.zeros(len(x)).double()
    nothing = torch.zeros(len(x), 1).double()
    height = y.mean(1, keepdim=True) if offset else nothing
    for bend in BENDS:
        bent = torch.relu(x - bend)
        centre = bent.mean(1, keepdim=True) if offset else nothing
        squares = (bent - centre).square().sum(1)
        s = ((bent - centre) * (y - height)).sum(1) / squares.clamp(min=1e-12)
        e = (height - s[:, None] * centre)[:, 0]
        error = (s[:, None] * bent + e[:, None] - y).square().sum(1)
        better = (error < best) & (s > 0) & (squares > 1e-12)
        best, level = torch.where(better, error, best), torch.where(better, e, level)
        scale, shift = torch.where(better, s, scale), torch.where(better, -s * bend, shift)
    return Bend(scale.float(), shift.float(), level.float())


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Sum of squared differences over the sum of squares."""
    squares = float(wanted.double().square().sum())
    return float((found.double() - wanted.double()).square().sum()) / max(squares, 1e-30)


def by_channel(samples: Tensor) -> Tensor:
    """(images, channels, positions) to (channels, samples)."""
    return samples.transpose(0, 1).flatten(1)
