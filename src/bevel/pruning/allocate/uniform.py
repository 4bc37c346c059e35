"""The same share of channels in every group.

kept_g = ceil((1 - r) n_g) rounded up to the alignment; r is the smallest that meets the budget.
"""

from __future__ import annotations

import numpy as np

from bevel.pruning.allocate import Problem, RankedGroup

NEEDS_CALIBRATION = False


def allocate(problem: Problem) -> np.ndarray:
    """Kept rows per group, int64 of shape (groups,)."""

    def at(ratio: float) -> np.ndarray:
        return np.array([group.fit((1 - ratio) * group.size) for group in problem.groups])

    def worth(group: RankedGroup, level: int) -> float:
        return -level / group.size

    kept = problem.first_that_meets(list(np.linspace(0, 1, 513)), at)
    return problem.refill(kept, worth)
