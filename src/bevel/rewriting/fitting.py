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
    x, order = x.double().contiguous().sort(dim=1)
    y = y.double().gather(1, order)
    plain = torch.relu(x)
    level = (y - plain).mean(1) if offset else torch.zeros(len(x)).double()
    error = (plain + level[:, None] - y).square().sum(1)
    first = torch.searchsorted(x, BENDS.expand(len(x), -1).contiguous())  # where relu(x - b) starts
    ones, x_, squares, y_, products = (
        _sums_from(values, first) for values in (torch.ones_like(x), x, x * x, y, x * y)
    )
    # Sums of r = relu(x - b), r r and r y over the samples: (channels, bends).
    r, rr, ry = x_ - BENDS * ones, squares - 2 * BENDS * x_ + BENDS**2 * ones, products - BENDS * y_
    count = x.shape[1]
    height = y.mean(1, keepdim=True) if offset else torch.zeros(len(x), 1).double()
    if offset:
        rr, ry = rr - r * r / count, ry - r * height
    total = (y - height).square().sum(1, keepdim=True)
    fits = (rr > 1e-12) & (ry > 0)
    scales = torch.where(fits, ry / rr.clamp(min=1e-12), 0)
    errors, best = torch.where(fits, total - scales * ry, torch.inf).min(1)
    s, b = scales.gather(1, best[:, None])[:, 0], BENDS[best]
    e = height[:, 0] - s * r.gather(1, best[:, None])[:, 0] / count if offset else level
    helps = errors < error
    return Bend(
        torch.where(helps, s, 1.0).float(),
        torch.where(helps, -s * b, 0.0).float(),
        torch.where(helps, e, level).float(),
    )


def _sums_from(values: Tensor, first: Tensor) -> Tensor:
    """Sums of each row from some positions on: (rows, columns), (rows, n) -> (rows, n)."""
    sums = torch.zeros(len(values), values.shape[1] + 1).double()
    sums[:, :-1] = values.flip(1).cumsum(1).flip(1)
    return sums.gather(1, first)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Sum of squared differences over the sum of squares."""
    squares = float(wanted.double().square().sum())
    return float((found.double() - wanted.double()).square().sum()) / max(squares, 1e-30)


def by_channel(samples: Tensor) -> Tensor:
    """(images, channels, positions) to (channels, samples)."""
    return samples.transpose(0, 1).flatten(1)
