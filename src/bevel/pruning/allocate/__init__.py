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
from typing import Protocol

import numpy as np

from bevel.core.errors import PruningError
from bevel.core.records import Cost
from bevel.graph.couplings import Analysis, ChannelGroup

LAST_SHARE = 0.1
"""Every group keeps at least this share of its channels."""

PROBES = 8
"""Allocators that measure do so at no more than this many widths of a group."""


@dataclass(frozen=True, eq=False)
class RankedGroup:
    """A prunable group with its rows in the order they would go.

    Attributes:
        index: position in `Analysis.groups`.
        name: the group's name.
        rows: (n, units per row) unit positions, lowest score first.
        scores: (n,) scores of the rows, ascending.
        levels: the row counts that may be kept, descending; the first is n.
    """

    index: int
    name: str
    rows: np.ndarray
    scores: np.ndarray
    levels: np.ndarray

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def fit(self, wanted: float) -> int:
        """The smallest allowed number of rows that keeps at least `wanted`."""
        enough = self.levels[self.levels >= min(wanted, self.size) - 1e-9]
        return int(enough[-1])

    def fixed_reason(self, align: int) -> str:
        """Why there is no smaller width."""
        blocks = self.rows.shape[1]
        equal = f" in {blocks} equal blocks" if blocks > 1 else ""
        return f"no width below {self.rows.size}{equal} is a multiple of {align}"

    def keep_mask(self, kept: int) -> np.ndarray:
        """Boolean mask over the group's units that keeps the best `kept` rows."""
        mask = np.ones(self.rows.size, dtype=bool)
        mask[self.rows[: self.size - kept].reshape(-1)] = False
        return mask


def rank(index: int, group: ChannelGroup, scores: np.ndarray, align: int) -> RankedGroup:
    """Order a group's rows by score, and list the widths that `align` allows."""
    if group.blocks is None:
        order = np.argsort(scores, kind="stable")
        rows, row_scores = order[:, None], scores[order]
    else:
        within = np.argsort(scores[group.blocks], axis=1, kind="stable")
        rows = np.take_along_axis(group.blocks, within, axis=1).T
        row_scores = scores[rows].mean(axis=1)
    n = len(rows)
    step = align // math.gcd(align, rows.shape[1])
    least = max(step, math.ceil(LAST_SHARE * n))
    multiples = np.arange(n // step * step, 0, -step)
    levels = np.unique(np.r_[n, multiples[multiples >= least]])[::-1]
    return RankedGroup(index, group.name, rows, row_scores, levels)


@dataclass(frozen=True, eq=False)
class Problem:
    """What an allocator is asked.

    Attributes:
        analysis: the network.
        groups: the groups that may shrink.
        limits: what may remain as fractions of the original: "macs", "params", "channels".
        degradation: for a ranked group and a number of kept rows, how much worse the network is
            with only that group pruned; None without calibration data.
    """

    analysis: Analysis
    groups: Sequence[RankedGroup]
    limits: Mapping[str, float]
    degradation: Callable[[RankedGroup, int], float] | None = None
    _original: Cost = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_original", self.analysis.cost())

    def all_kept(self) -> np.ndarray:
        """Kept rows when nothing is removed."""
        return np.array([group.size for group in self.groups], dtype=np.int64)

    def fractions(self, kept: np.ndarray) -> dict[str, float]:
        """What remains of each limited quantity, as fractions of the original."""
        units = self.analysis.full()
        channels = total = 0
        for group, rows in zip(self.groups, kept, strict=True):
            units[group.index] = rows * group.rows.shape[1]
            channels += int(units[group.index])
            total += group.rows.size
        cost = self.analysis.cost(units)
        return {
            "macs": cost.macs / max(self._original.macs, 1),
            "params": cost.params / max(self._original.params, 1),
            "channels": channels / max(total, 1),
        }

    def meets(self, kept: np.ndarray) -> bool:
        """Whether every limit holds."""
        fractions = self.fractions(kept)
        return all(fractions[name] <= limit + 1e-12 for name, limit in self.limits.items())

    def first_that_meets(
        self, candidates: Sequence[float], at: Callable[[float], np.ndarray]
    ) -> np.ndarray:
        """Bisect candidates, ordered from gentle to harsh, for the first that meets the limits.

        Raises:
            PruningError: not even the last does.
        """
        low, high = 0, len(candidates) - 1
        if high < 0 or not self.meets(at(candidates[high])):
            raise PruningError(
                self._unreachable(at(candidates[high]) if high >= 0 else self.all_kept())
            )
        while low < high:
            middle = (low + high) // 2
            if self.meets(at(candidates[middle])):
                high = middle
            else:
                low = middle + 1
        return at(candidates[low])

    def refill(self, kept: np.ndarray, worth: Callable[[RankedGroup, int], float]) -> np.ndarray:
        """Give back what the limits still allow, the most worthwhile first.

        A bisection removes in steps, so it ends below the limits. `worth(group, level)` says how
        much is gained by keeping that many rows.
        """
        kept = kept.copy()
        heap: list[tuple[float, int, int]] = []

        def offer(position: int) -> None:
            group = self.groups[position]
            larger = group.levels[group.levels > kept[position]]
            if larger.size:
                level = int(larger[-1])
                heapq.heappush(heap, (-worth(group, level), position, level))

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

    def _unreachable(self, kept: np.ndarray) -> str:
        """Why the limits cannot be met: what is reachable, and the dearest reasons."""
        fractions = self.fractions(kept)
        asked = ", ".join(f"{name} <= {100 * limit:.3g}%" for name, limit in self.limits.items())
        reach = ", ".join(f"{name} {100 * fractions[name]:.3g}%" for name in self.limits)
        touched = self.analysis.macs_touched()
        open_indices = {group.index for group in self.groups}
        stuck = sorted(
            (i for i in range(len(self.analysis.groups)) if i not in open_indices),
            key=lambda i: -touched[i],
        )[:3]
        groups = self.analysis.groups
        reasons = "; ".join(
            f"{groups[i].name}: {groups[i].frozen or 'nothing to score or too narrow'}"
            for i in stuck
        )
        return (
            f"asked for {asked}, but only {reach} can be reached"
            + (f" (kept whole: {reasons})" if reasons else "")
            + "; ask for less, or lower align"
        )


class Allocator(Protocol):
    """What an allocator's module offers."""

    NEEDS_CALIBRATION: bool

    def allocate(self, problem: Problem) -> np.ndarray:
        """Kept rows per group of `problem.groups`, int64 of shape (groups,).

        Raises:
            PruningError: the limits cannot be met.
        """
