"""What a budget can limit without running anything: how much of it is left at which widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from bevel.graph.cost import Total
from bevel.graph.couplings import Analysis

WEIGHT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int8-weights": 1}
ACTIVATION_BYTES = WEIGHT_BYTES | {"int8-weights": 4}
VECTOR_BYTES = WEIGHT_BYTES | {"int8": 4, "int8-weights": 4}
"""Bytes of one number by precision; of int8, vectors are biases in int32 and scales of weights."""


KB = 1000


class Quantity(Protocol):
    """Something of which a network has an amount."""

    def at(self, units: np.ndarray) -> float:
        """The amount when each group of the analysis keeps so many units, (groups,) int64."""
        ...


Build = Callable[[Analysis, str], Quantity]
"""Makes the quantity of a network, for a target's precision."""


class Macs:
    """Multiply-accumulates of one image."""

    def __init__(self, analysis: Analysis, _: str) -> None:
        self._shares, (self._total, _params) = analysis.shares, analysis.totals

    def at(self, units: np.ndarray) -> float:
        """As `Analysis.cost` rounds them."""
        return round(self._total.at(self._shares(units)))


class Params:
    """Stored parameters."""

    def __init__(self, analysis: Analysis, _: str) -> None:
        self._shares, (_macs, self._total) = analysis.shares, analysis.totals

    def at(self, units: np.ndarray) -> float:
        """As `Analysis.cost` rounds them."""
        return round(self._total.at(self._shares(units)))


class SizeKb:
    """The weights' kilobytes in an exported file: of weights in the precision, of vectors in 32
    bits (a batch norm's two are, folded, a bias and what int8 needs as the weight's scale).

    What a file holds besides, the graph, does not shrink with the widths and is not in it.
    """

    def __init__(self, analysis: Analysis, precision: str) -> None:
        dims = np.array([len(analysis.shapes[term.tensor]) for term in analysis.params])
        self._bytes = np.where(dims > 1, WEIGHT_BYTES[precision], VECTOR_BYTES[precision])
        self._shares, (_macs, self._total) = analysis.shares, analysis.totals

    def at(self, units: np.ndarray) -> float:
        """In kilobytes."""
        return float(self._bytes @ self._total.each(self._shares(units))) / KB


class PeakMemoryKb:
    """The largest sum of activations that are alive at once, running call by call, one image.

    Weights and what a kernel needs for itself are not in it; see `bevel.graph.lifetimes` for what
    shares memory.
    """

    def __init__(self, analysis: Analysis, precision: str) -> None:
        held = analysis.activations
        self._total = Total([activation.elements for activation in held])
        own = ACTIVATION_BYTES[precision]
        self._bytes = np.array(
            [own if a.dtype.is_floating_point else a.dtype.itemsize for a in held], dtype=float
        )
        self._first = np.array([a.first for a in held], dtype=np.int64)
        self._after = np.array([a.last + 1 for a in held], dtype=np.int64)
        self._shares = analysis.shares

    def at(self, units: np.ndarray) -> float:
        """In kilobytes."""
        sizes = self._bytes * self._total.each(self._shares(units))
        if not len(sizes):
            return 0.0
        calls = int(self._after.max()) + 1
        change = np.bincount(self._first, sizes, calls) - np.bincount(self._after, sizes, calls)
        return float(change.cumsum().max()) / KB


KNOWN: Mapping[str, Build] = {
    "macs": Macs,
    "params": Params,
    "size_kb": SizeKb,
    "peak_memory_kb": PeakMemoryKb,
}
