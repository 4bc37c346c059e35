"""Allocators: how many channels each group keeps. One file each; the file name is the name.

An allocator's module has `NEEDS_CALIBRATION` and `allocate(problem)`, which returns the kept rows
per ranked group. A *row* is what is removed at once: one unit, or one unit of every block where
blocks must keep equal counts.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from bevel.core.errors import PruningError, one_line
from bevel.core.limits import unit_of
from bevel.graph.couplings import Analysis, ChannelGroup
from bevel.pruning.quantities import Macs, Params, Quantity

LAST_SHARE = 0.1
"""Every group keeps at least this share of its channels."""

PROBES = 8
"""Allocators that measure do so at no more than this many widths of a group."""


REASONS = 3
"""An error says of no more than this many groups why they stay whole."""


def thinned(count: int, most: int) -> np.ndarray:
    """Positions of no more than `most` of `count` things, evenly spread, with both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


@dataclass(frozen=True, eq=False)
class RankedGroup:
    """A prunable group with its rows in the order they would go.

    Attributes:
        index: position in `Analysis.groups`.
        name: the group's name.
        rows: (n, units per row) unit positions, lowest score first.
        scores: (n,) scores of the rows, ascending.
        levels: the row counts that may be kept, descending; the first is n.
        step: all levels but the first are multiples of this.
        narrow: why there is no level but the first, where there is none.
    """

    index: int
    name: str
    rows: np.ndarray
    scores: np.ndarray
    levels: np.ndarray
    step: int
    narrow: str

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @cached_property
    def _ascending(self) -> np.ndarray:
        return self.levels[::-1]

    def fit(self, wanted: float) -> int:
        """The smallest allowed number of rows that keeps at least `wanted`."""
        return int(self._ascending[self._ascending.searchsorted(min(wanted, self.size) - 1e-9)])

    def above(self, level: int) -> int | None:
        """The next larger allowed number of rows, or None."""
        position = int(self._ascending.searchsorted(level, side="right"))
        return int(self._ascending[position]) if position < len(self.levels) else None

    def keep_mask(self, kept: int) -> np.ndarray:
        """Boolean mask over the group's units that keeps the best `kept` rows."""
        mask = np.ones(self.rows.size, dtype=bool)
        mask[self.rows[: self.size - kept].reshape(-1)] = False
        return mask


def inside_runs(analysis: Analysis) -> set[int]:
    """The groups whose units lie inside the runs of others, as the channels of a head do."""
    runs: dict[tuple[str, int, int], np.ndarray] = {}
    for group in analysis.groups:
        for axis in group.axes if group.runs else ():
            key = (axis.tensor, axis.dim, axis.units.ndim)
            runs[key] = runs.get(key, False) | (axis.units >= 0)
    return {
        index
        for index, group in enumerate(analysis.groups)
        if not group.runs
        and any(
            bool(((axis.units >= 0) & runs[key]).any())
            for axis in group.axes
            if (key := (axis.tensor, axis.dim, axis.units.ndim)) in runs
        )
    }


def rank(
    index: int, group: ChannelGroup, scores: np.ndarray, align: int, *, inside: bool = False
) -> RankedGroup:
    """Order a group's rows by score, and list the widths that `align` allows.

    The width that has to be a multiple of `align` is that of all blocks together; of a group
    `inside` runs it is the width of one run, so that it stays aligned however many runs go.
    Whole runs go one by one.
    """
    if group.blocks is None:
        order = np.argsort(scores, kind="stable")
        rows, row_scores = order[:, None], scores[order]
    else:
        within = np.argsort(scores[group.blocks], axis=1, kind="stable")
        rows = np.take_along_axis(group.blocks, within, axis=1).T
        row_scores = scores[rows].mean(axis=1)
    n, blocks = rows.shape
    multiple = f"is a multiple of {align}"
    if group.runs:
        step, narrow = 1, "nothing of it is left if it shrinks"
    elif inside:
        step, narrow = align, f"no width below {n} of each run {multiple}"
    else:
        step = align // math.gcd(align, blocks)
        equal = f" in {blocks} equal blocks" if blocks > 1 else ""
        narrow = f"no width below {rows.size}{equal} {multiple}"
    least = max(step, math.ceil(LAST_SHARE * n))
    multiples = np.arange(n // step * step, 0, -step)
    levels = np.unique(np.r_[n, multiples[multiples >= least]])[::-1]
    return RankedGroup(index, group.name, rows, row_scores, levels, step, narrow)


def rank_all(analysis: Analysis, scores: Mapping[int, np.ndarray], align: int) -> list[RankedGroup]:
    """Every group that has scores, ranked, whether or not it has a smaller width."""
    inside = inside_runs(analysis)
    return [
        rank(index, analysis.groups[index], value, align, inside=index in inside)
        for index, value in sorted(scores.items())
        if analysis.groups[index].frozen is None
    ]


Degradation = Callable[[Sequence[tuple[RankedGroup, int]]], Sequence[float]]


@dataclass(frozen=True, eq=False)
class Problem:
    """What an allocator is asked.

    Attributes:
        analysis: the network.
        groups: the groups that may shrink.
        limits: what may remain as fractions of the original, by the quantity's name; "channels" are
            those of `groups`.
        degradation: for ranked groups, each with a number of kept rows, how much worse the
            network is with only that group pruned; those of one call are measured side by side.
            None without calibration data.
        notes: what stays whole and why, dearest first; for the error where the limits cannot be
            met.
        quantities: what the limits are on, where it is not MACs or parameters.
        comparable: whether a score means the same in every group, as `COMPARABLE` of criteria says.
    """

    analysis: Analysis
    groups: Sequence[RankedGroup]
    limits: Mapping[str, float]
    degradation: Degradation | None = None
    notes: Sequence[str] = ()
    quantities: Mapping[str, Quantity] = field(default_factory=dict)
    comparable: bool = True
    _original: dict[str, float] = field(init=False, default_factory=dict)
    _full: np.ndarray = field(init=False)
    _indices: np.ndarray = field(init=False)
    _blocks: np.ndarray = field(init=False)
    _sizes: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        def numbers(values: Sequence[int]) -> np.ndarray:
            return np.array(values, dtype=np.int64)

        found = {
            "_full": self.analysis.full(),
            "quantities": {
                "macs": Macs(self.analysis, ""),
                "params": Params(self.analysis, ""),
                **self.quantities,
            },
            "_indices": numbers([group.index for group in self.groups]),
            "_blocks": numbers([group.rows.shape[1] for group in self.groups]),
            "_sizes": numbers([group.rows.size for group in self.groups]),
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def all_kept(self) -> np.ndarray:
        """Kept rows when nothing is removed."""
        return np.array([group.size for group in self.groups], dtype=np.int64)

    def fraction(self, name: str, kept: np.ndarray) -> float:
        """What remains of one quantity, as a fraction of the original."""
        units = np.asarray(kept, dtype=np.int64) * self._blocks
        if name == "channels":
            return float(units.sum() / max(self._sizes.sum(), 1))
        return self._amount(name, units) / self.original(name)

    def original(self, name: str) -> float:
        """How much of a quantity there is when nothing is removed."""
        if name not in self._original:
            self._original[name] = max(self.quantities[name].at(self._full), 1e-9)
        return self._original[name]

    def _amount(self, name: str, units: np.ndarray) -> float:
        kept = self._full.copy()
        kept[self._indices] = units
        return self.quantities[name].at(kept)

    def fractions(self, kept: np.ndarray) -> dict[str, float]:
        """What remains of each quantity, as fractions of the original."""
        return {name: self.fraction(name, kept) for name in (*self.quantities, "channels")}

    def meets(self, kept: np.ndarray) -> bool:
        """Whether every limit holds."""
        return all(
            self.fraction(name, kept) <= limit + 1e-12 for name, limit in self.limits.items()
        )

    def first_that_meets(
        self, candidates: Sequence[float], at: Callable[[float], np.ndarray]
    ) -> np.ndarray:
        """Bisect candidates, ordered from gentle to harsh, for the first that meets the limits.

        Raises:
            PruningError: not even the last does.
        """
        found = self.first_threshold(candidates, at)
        if found is None:
            raise self._unreachable(at(candidates[-1]) if len(candidates) else self.all_kept())
        return at(found)

    def first_threshold(
        self, candidates: Sequence[float], at: Callable[[float], np.ndarray]
    ) -> float | None:
        """The first candidate that meets the limits; None if not even the last does."""
        low, high = 0, len(candidates) - 1
        if high < 0 or not self.meets(at(candidates[high])):
            return None
        while low < high:
            middle = (low + high) // 2
            if self.meets(at(candidates[middle])):
                high = middle
            else:
                low = middle + 1
        return candidates[low]

    def refill(self, kept: np.ndarray, worth: Callable[[RankedGroup, int], float]) -> np.ndarray:
        """Give back what the limits still allow, the most worthwhile first.

        A bisection removes in steps, so it ends below the limits. `worth(group, level)` says how
        much is gained by keeping that many rows.
        """
        kept = kept.copy()
        heap: list[tuple[float, int, int]] = []

        def offer(position: int) -> None:
            level = self.groups[position].above(int(kept[position]))
            if level is not None:
                worthy = worth(self.groups[position], level)
                heapq.heappush(heap, (-worthy, position, level))

        for position in range(len(self.groups)):
            offer(position)
        while heap:
            _, position, level = heapq.heappop(heap)
            before = kept[position]
            kept[position] = level
            if self.meets(kept):
                offer(position)
            else:
                kept[position] = before
        return kept

    def _unreachable(self, kept: np.ndarray) -> PruningError:
        """Why the limits cannot be met: what can be reached, and the dearest reasons."""
        fractions = self.fractions(kept)
        asked = ", ".join(f"{n} <= {self._said(n, limit)}" for n, limit in self.limits.items())
        reach = ", ".join(f"{name} {self._said(name, fractions[name])}" for name in self.limits)
        reasons = "; ".join(one_line(note, 130) for note in self.notes[:REASONS])
        more = len(self.notes) - REASONS
        reasons += f"; and {more} more" if more > 0 else ""
        return PruningError(
            f"asked for {asked}, but only {reach} can be reached"
            + (f" (kept whole, dearest first: {reasons})" if reasons else "")
            + f"; what shrinks keeps at least {LAST_SHARE:.0%} of its channels; ask for less, or "
            "lower align",
            reachable=fractions,
        )

    def _said(self, name: str, fraction: float) -> str:
        """A fraction of a quantity, with the amount where it has a unit."""
        unit = unit_of(name)
        amount = f" ({fraction * self.original(name):.4g} {unit})" if unit else ""
        return f"{100 * fraction:.3g}%{amount}"


class Allocator(Protocol):
    """What an allocator's module offers."""

    NEEDS_CALIBRATION: bool

    def allocate(self, problem: Problem) -> np.ndarray:
        """Kept rows per group of `problem.groups`, int64 of shape (groups,).

        Raises:
            PruningError: the limits cannot be met.
        """
