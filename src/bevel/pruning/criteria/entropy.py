"""Entropy of a unit's pooled activation over the images: one that answers alike tells them nothing.

score_c = -sum_b p_b log p_b, with p_b the share of the images whose mean over the map of unit c
falls into bin b.

The paper cuts the range between the smallest and the largest value into equal bins, which has to be
known before. Here bins are 2^e wide and begin at multiples of that, with the smallest e for which
the values seen so far fall into at most `BINS` bins, so between half of them and all cover the
range. Such bins lie in each other, so they merge without error when the range grows, and what comes
out depends neither on the order of the images nor on the batches they come in.

Luo and Wu, "An Entropy-based Pruning Method for CNN Compression", 2017.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEEDS = "images"
COMPARABLE = False

BINS = 128
"""Most bins of a unit; the paper takes 100."""

FINEST = -60
"""The smallest exponent of a bin's width."""


def start() -> Histogram:
    """Empty histograms."""
    return Histogram()


class Histogram:
    """For each unit a histogram of its pooled activation, whose bins widen as values come."""

    def __init__(self) -> None:
        self.exponent = self.first = self.counts = torch.zeros(0, dtype=torch.int64)

    def update(self, maps: Tensor) -> None:
        """Count some images: (N, units, rows, columns)."""
        pooled = maps.double().mean((2, 3))
        low, high = pooled.amin(0), pooled.amax(0)
        if len(self.counts):
            known = self._range()
            low, high = torch.minimum(low, known[0]), torch.maximum(high, known[1])
        exponent = _exponent(low, high)
        if len(self.counts):
            exponent = torch.maximum(exponent, self.exponent)
        first = (low / _width(exponent)).floor()
        places = (pooled / _width(exponent)).floor() - first
        counts = torch.zeros(len(low), BINS, dtype=torch.int64, device=maps.device)
        counts.scatter_add_(1, places.long().T, torch.ones_like(places.T, dtype=torch.int64))
        if len(self.counts):
            moved = (self._starts() * _width(self.exponent - exponent)[:, None]).floor()
            moved = (moved - first[:, None]).long()
            counts.scatter_add_(1, moved.clamp(max=BINS - 1), self.counts)  # beyond, all are empty
        self.exponent, self.first, self.counts = exponent, first, counts

    def _starts(self) -> Tensor:
        """Where bins begin, in widths: (units, BINS)."""
        return self.first[:, None] + torch.arange(BINS, device=self.first.device)

    def _range(self) -> tuple[Tensor, Tensor]:
        """Where the first and the last bin that is not empty begin: (units,) each."""
        last = BINS - 1 - self.counts.flip(1).bool().long().argmax(1, keepdim=True)
        width = _width(self.exponent)
        return self.first * width, self._starts().gather(1, last)[:, 0] * width

    def scores(self) -> Tensor:
        """Entropy of each unit's histogram, in nats."""
        shares = self.counts.double() / self.counts.sum(1, keepdim=True)
        entropy: Tensor = torch.special.entr(shares).sum(1)
        return entropy


def _width(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)


def _exponent(low: Tensor, high: Tensor) -> Tensor:
    """The smallest exponents with which `BINS` bins hold everything between, int64."""
    span = ((high - low) / BINS).clamp(min=2.0**FINEST)
    exponent = span.log2().floor().long().clamp(min=FINEST)
    for _ in range(2):  # where bins begin may take one more
        width = _width(exponent)
        exponent = exponent + ((high / width).floor() - (low / width).floor() >= BINS)
    return exponent
