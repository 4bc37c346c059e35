"""The largest cut of each group whose degradation stays within one threshold T.

d_g(k) is the rise of the loss on held-out images when only group g is cut to k channels, with
batch-norm statistics re-estimated; kept_g = min {k : max_{k' >= k} d_g(k') <= T}; T is the
smallest that meets the budget.

The published description of T-sensitive pruning does not give its formula; this is bevel's reading.
"""

from __future__ import annotations

import numpy as np

from bevel.core.errors import PruningError
from bevel.core.progress import track
from bevel.pruning.allocate import PROBES, Problem, RankedGroup

NEEDS_CALIBRATION = True


def allocate(problem: Problem) -> np.ndarray:
    """Kept rows per group, int64 of shape (groups,).

    Raises:
        PruningError: there are no held-out images, or the limits cannot be met.
    """
    if problem.degradation is None:
        raise PruningError("the allocator 't_sensitive' needs held-out images: pass calibration")
    probes = [(group, int(level)) for group in problem.groups for level in _probed(group)]
    measured = {
        (group.index, level): problem.degradation(group, level)
        for group, level in track(probes, "sensitivity", len(probes))
    }
    maps = {group.index: _worst_so_far(group, measured) for group in problem.groups}

    def at(threshold: float) -> np.ndarray:
        return np.array(
            [
                min(level for level, worst in maps[group.index].items() if worst <= threshold)
                for group in problem.groups
            ],
            dtype=np.int64,
        )

    def worth(group: RankedGroup, level: int) -> float:
        smaller = [k for k in maps[group.index] if k < level]
        return maps[group.index][max(smaller)] if smaller else 0.0

    thresholds = sorted({0.0, *(worst for levels in maps.values() for worst in levels.values())})
    kept = problem.first_that_meets(thresholds, at)
    return problem.refill(kept, worth)


def _probed(group: RankedGroup) -> np.ndarray:
    """The widths to measure: all allowed ones below the full width, thinned evenly."""
    levels = group.levels[1:]
    if len(levels) <= PROBES:
        return levels
    thinned: np.ndarray = np.unique(np.linspace(0, len(levels) - 1, PROBES).round().astype(int))
    return np.asarray(levels[thinned])


def _worst_so_far(group: RankedGroup, measured: dict[tuple[int, int], float]) -> dict[int, float]:
    """Kept rows -> the worst degradation met on the way down to it; the full width costs 0."""
    worst = {group.size: 0.0}
    highest = 0.0
    for level in _probed(group):
        highest = max(highest, measured[group.index, int(level)])
        worst[int(level)] = highest
    return worst
