"""How ranges become scales: the observers that calibration runs.

Activations take the smallest and largest value seen, or a range that cuts rare values off: the
share of a percentile, or where the squared error of the rounded values is least.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e.observer import MinMaxObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantizer import QuantizationSpec

from bevel.quantization.annotate import IntegerTypes

SMALLEST_SCALE = 2.0**-12
"""Least weight scale of a channel, as a fraction of the layer's largest."""

PERCENTILE = 99.99
"""Percent of the values that lie below the upper end of a range, and above the lower."""

BINS = 2048
SAMPLE = 2**19
"""Most values that a histogram takes of one tensor, evenly spread over it; the ends see all."""

CUTS = 80
"""Ends that the MSE observer tries on each side, from the whole range down."""


class ChannelObserver(PerChannelMinMaxObserver):  # type: ignore[misc]  # torchao is untyped
    """One symmetric scale per output channel, none of them vanishingly small.

    A runtime stores a bias as int32 in units of input scale times weight scale. A channel whose
    weights are all but zero would make that unit so small that its bias overflows.
    """

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, each of shape (channels,)."""
        scale, zero_point = super().calculate_qparams()
        return torch.clamp(scale, min=float(scale.max()) * SMALLEST_SCALE), zero_point


class HistogramObserver(MinMaxObserver):  # type: ignore[misc]  # torchao is untyped
    """Counts values in bins over the range seen so far; a subclass chooses the range from them."""

    histogram: Tensor

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("histogram", torch.zeros(BINS, dtype=torch.float64))

    def forward(self, x_orig: Tensor) -> Tensor:
        """Count the values of a tensor of any shape, and return it."""
        before = float(self.min_val), float(self.max_val)
        super().forward(x_orig)
        low, high = float(self.min_val), float(self.max_val)
        if x_orig.numel() == 0 or low == high:
            return x_orig
        if before != (low, high) and before[0] < before[1]:
            self.histogram = _rebinned(self.histogram, before, (low, high))
        values = x_orig.detach().flatten()
        step = -(-values.numel() // SAMPLE)
        counts = torch.histc(values[::step].float(), BINS, low, high)
        self.histogram += counts.double() * step
        return x_orig

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the chosen range."""
        low, high = self.chosen_range()
        return self._calculate_qparams(  # type: ignore[no-any-return]
            torch.tensor(low), torch.tensor(high)
        )

    def chosen_range(self) -> tuple[float, float]:
        """Its ends; values outside are cut to them."""
        raise NotImplementedError

    def _centres(self) -> Tensor:
        """The middle of each bin, (BINS,)."""
        low, high = float(self.min_val), float(self.max_val)
        width = (high - low) / BINS
        return low + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)


class PercentileObserver(HistogramObserver):
    """The range that all but a share of the values lie in, at each end."""

    def chosen_range(self) -> tuple[float, float]:
        """Its ends; values outside are cut to them."""
        low, high = float(self.min_val), float(self.max_val)
        total = float(self.histogram.sum())
        if not total:
            return low, high
        below = self.histogram.cumsum(0)
        rare = total * (1 - PERCENTILE / 100)
        width = (high - low) / BINS
        first = int(torch.searchsorted(below, rare))
        last = int(torch.searchsorted(below, total - rare))
        return low + first * width, low + min(last + 1, BINS) * width


class ErrorObserver(HistogramObserver):
    """The range in which the mean squared error of the rounded values is least."""

    def chosen_range(self) -> tuple[float, float]:
        """Its ends; values outside are cut to them."""
        low, high = float(self.min_val), float(self.max_val)
        if not float(self.histogram.sum()):
            return low, high
        shares = torch.linspace(1, 1 / CUTS, CUTS, dtype=torch.float64)
        if low >= 0 or high <= 0:
            ends = torch.stack([low * shares, high * shares], 1)
        else:
            both = torch.stack([low * shares, high * shares], 1)
            best = both[int(self._errors(both).argmin())]
            # From the best cut of both ends alike, each end goes its own way.
            lower = torch.stack([low * shares, best[1].expand(CUTS)], 1)
            best = lower[int(self._errors(lower).argmin())]
            ends = torch.stack([best[0].expand(CUTS), high * shares], 1)
        chosen = ends[int(self._errors(ends).argmin())]
        return float(chosen[0]), float(chosen[1])

    def _errors(self, ends: Tensor) -> Tensor:
        """Squared error of each of the ranges (ranges, 2), summed over the values: (ranges,)."""
        low, high = ends.float().unbind(1)
        scale, zero_point = (part[:, None].double() for part in self._calculate_qparams(low, high))
        centres = self._centres()[None]
        steps = torch.round(centres / scale) + zero_point
        rounded = (steps.clamp(self.quant_min, self.quant_max) - zero_point) * scale
        errors: Tensor = ((rounded - centres) ** 2 * self.histogram[None]).sum(1)
        return errors


OBSERVERS: dict[str, type[MinMaxObserver]] = {
    "minmax": MinMaxObserver,
    "percentile": PercentileObserver,
    "mse": ErrorObserver,
}


def u8s8(observer: str = "mse") -> IntegerTypes:
    """uint8 activations, per tensor, with a zero point; int8 weights, per channel, symmetric.

    Args:
        observer: what the range of an activation is: minmax, percentile or mse.
    """
    return IntegerTypes(
        activations=QuantizationSpec(
            dtype=torch.uint8,
            observer_or_fake_quant_ctr=OBSERVERS[observer],
            quant_min=0,
            quant_max=255,
            qscheme=torch.per_tensor_affine,
        ),
        weights=_channel_weights(),
    )


def s8s8(observer: str = "mse") -> IntegerTypes:
    """int8 activations, per tensor, and int8 weights, per channel, all symmetric.

    Args:
        observer: what the range of an activation is: minmax, percentile or mse.
    """
    return IntegerTypes(
        activations=QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=OBSERVERS[observer],
            quant_min=-128,
            quant_max=127,
            qscheme=torch.per_tensor_symmetric,
        ),
        weights=_channel_weights(),
    )


def _channel_weights() -> QuantizationSpec:
    """int8, one symmetric scale per output channel."""
    return QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=ChannelObserver,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )


def _rebinned(histogram: Tensor, before: tuple[float, float], after: tuple[float, float]) -> Tensor:
    """The same counts over a wider range: each bin goes where its middle lies."""
    low, high = after
    width = (before[1] - before[0]) / BINS
    centres = before[0] + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)
    index = ((centres - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
    return torch.zeros_like(histogram).index_add_(0, index, histogram)
