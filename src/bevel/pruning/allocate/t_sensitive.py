"""The largest cut of each group whose degradation stays within one threshold T.

d_g(k) is the rise of the loss on held-out images when only group g is cut to k channels, with
batch-norm statistics re-estimated; kept_g = min {k : max_{k' >= k} d_g(k') <= T}; T is the
smallest that meets the budget.

The published description of T-sensitive pruning does not give its formula; this is bevel's reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from bevel.core.errors import PruningError
from bevel.pruning.allocate import PROBES, Problem, RankedGroup, thinned

NEEDS_CALIBRATION = True

Worst = dict[int, float]
"""Kept rows -> the worst degradation met on the way down to them; the full width costs 0."""


def allocate(problem: Problem) -> np.ndarray:
    """Kept rows per group, int64 of shape (groups,).

    Raises:
        PruningError: there are no held-out images, or the limits cannot be met.
    """
    if problem.degradation is None:
        raise PruningError("the allocator 't_sensitive' needs held-out images: pass calibration")
    maps = _measured(problem)

    def worth(group: RankedGroup, level: int) -> float:
        smaller = [k for k in maps[group.index] if k < level]
        return maps[group.index][max(smaller)] if smaller else 0.0

    kept = problem.first_that_meets(_thresholds(maps), partial(_kept, problem, maps))
    return problem.refill(kept, worth)


def _measured(problem: Problem) -> dict[int, Worst]:
    """Of each group the degradation at its widths, narrower and narrower side by side.

    A group is left once a threshold below its degradation is known to meet the limits with what
    was measured so far: T is no larger than that, degradation only rises on the way down, so
    nothing narrower of this group could be chosen, and the result is that of the whole map.
    """
    assert problem.degradation is not None  # noqa: S101  # checked by the caller
    maps: dict[int, Worst] = {group.index: {group.size: 0.0} for group in problem.groups}
    narrower = {group.index: iter(_probed(group).tolist()) for group in problem.groups}
    left = list(problem.groups)
    while left:
        probes = [(g, k) for g in left if (k := next(narrower[g.index], None)) is not None]
        for (group, kept), rise in zip(probes, problem.degradation(probes), strict=True):
            worst = maps[group.index]
            worst[kept] = max(rise, *worst.values())
        enough = problem.first_threshold(_thresholds(maps), partial(_kept, problem, maps))
        left = [
            group
            for group, _ in probes
            if enough is None or max(maps[group.index].values()) <= enough
        ]
    return maps


def _kept(problem: Problem, maps: Mapping[int, Worst], threshold: float) -> np.ndarray:
    """The narrowest width of each group whose degradation stays within the threshold."""
    return np.array(
        [
            min(level for level, worst in maps[group.index].items() if worst <= threshold)
            for group in problem.groups
        ],
        dtype=np.int64,
    )


def _thresholds(maps: Mapping[int, Worst]) -> list[float]:
    """Those at which a width changes."""
    return sorted({0.0, *(worst for levels in maps.values() for worst in levels.values())})


def _probed(group: RankedGroup) -> np.ndarray:
    """The widths to measure: all allowed ones below the full width, thinned evenly."""
    levels = group.levels[1:]
    return np.asarray(levels[thinned(len(levels), PROBES)])
