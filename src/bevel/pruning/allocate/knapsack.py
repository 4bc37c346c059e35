"""The least importance lost for what has to be saved: dear channels go before cheap ones.

Of group g at width l, v_g(l) is the sum of the scores that are gone (its share of the group's sum,
where scores of two groups do not compare), and c_g(l) what is saved of the limited quantities when
g alone is cut, each as a share of what has to go of it. On the lower convex hull of the points
(c, v), from the full width on, every step down has a price, importance lost over cost saved:
kept_g = min {l on the hull : its steps down cost <= t}; t is the smallest that meets the budget.
That is the greedy solution of the multiple-choice knapsack (Sinha and Zoltners 1979); Shen et al.,
"Structural Pruning via Latency-Saliency Knapsack", NeurIPS 2022, let a knapsack choose for latency.
"""

from __future__ import annotations

import numpy as np

from bevel.pruning.allocate import Problem, RankedGroup, thinned

NEEDS_CALIBRATION = False

WIDTHS = 32
"""The saving is computed at no more widths of a group than this, and drawn straight in between."""


def allocate(problem: Problem) -> np.ndarray:
    """Kept rows per group, int64 of shape (groups,)."""
    prices = {g.index: _prices(problem, place) for place, g in enumerate(problem.groups)}

    def at(price: float) -> np.ndarray:
        return np.array(
            [g.levels[prices[g.index].searchsorted(price, side="right")] for g in problem.groups],
            dtype=np.int64,
        )

    def worth(group: RankedGroup, level: int) -> float:
        """The price of the step that is taken back."""
        return float(prices[group.index][np.flatnonzero(group.levels == level)[0]])

    offers = np.unique(np.concatenate([*prices.values(), [-np.inf]]))
    return problem.refill(problem.first_that_meets(list(offers), at), worth)


def _prices(problem: Problem, place: int) -> np.ndarray:
    """Of each step from a group's width to the next narrower, (levels - 1,), ascending.

    All steps of one segment of the hull have one price, so they are taken together.
    """
    group = problem.groups[place]
    gone = np.concatenate([[0.0], np.cumsum(group.scores)])
    lost = gone[group.size - group.levels] / (1.0 if problem.comparable else max(gone[-1], 1e-30))
    saved = _saved(problem, place)
    prices = np.full(len(lost) - 1, np.inf)
    corner, last = 0, len(lost) - 1
    while corner < last:
        further = saved[corner + 1 :] - saved[corner]
        slopes = np.full(last - corner, np.inf)
        np.divide(lost[corner + 1 :] - lost[corner], further, out=slopes, where=further > 0)
        if np.isinf(slopes).all():  # nothing more is saved from here on
            break
        best = corner + 1 + int(np.flatnonzero(slopes == slopes.min())[-1])
        prices[corner:best] = slopes.min()
        corner = best
    return np.maximum.accumulate(prices)


def _saved(problem: Problem, place: int) -> np.ndarray:
    """What a group saves at each of its widths, (levels,), summed over the limits."""
    levels = problem.groups[place].levels
    probed = thinned(len(levels), WIDTHS)
    kept = problem.all_kept()
    found = []
    for level in levels[probed]:
        kept[place] = level
        found.append(
            sum(
                (1.0 - problem.fraction(name, kept)) / max(1.0 - limit, 1e-9)
                for name, limit in problem.limits.items()
            )
        )
    saved: np.ndarray = np.interp(np.arange(len(levels)), probed, found)
    return saved
