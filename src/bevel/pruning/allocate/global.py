"""One ranking over all groups: the lowest scores of the whole network go first.

kept_g = |{j : s_gj > t}| rounded up to the alignment; t is the smallest that meets the budget.
"""

from __future__ import annotations

import numpy as np

from bevel.pruning.allocate import Problem, RankedGroup

NEEDS_CALIBRATION = False


def allocate(problem: Problem) -> np.ndarray:
    """Kept rows per group, int64 of shape (groups,)."""

    def at(threshold: float) -> np.ndarray:
        return np.array(
            [
                group.fit(group.size - int(group.scores.searchsorted(threshold, side="right")))
                for group in problem.groups
            ],
            dtype=np.int64,
        )

    def worth(group: RankedGroup, level: int) -> float:
        return float(group.scores[group.size - level])

    everything = [group.scores for group in problem.groups]
    scores = np.unique(np.concatenate(everything)) if everything else np.array([])
    kept = problem.first_that_meets([-np.inf, *scores], at)
    return problem.refill(kept, worth)
