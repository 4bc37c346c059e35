"""A ranking for each kind of group: scores are compared only between groups built alike.

Groups are of one kind if the parameters that they slice are of the same roles and kernels, however
wide (Fang et al., "Isomorphic Pruning for Vision Models", ECCV 2024): the inner channels of all
bottlenecks are one kind, the heads of all blocks another. Of every kind the same share r goes, the
lowest scores first: kept_g = |{j : s_gj > q_kind(r)}| rounded up to the alignment, with q_kind(r)
the r-quantile of the kind's scores; r is the smallest that meets the budget.
"""

from __future__ import annotations

import numpy as np

from bevel.graph.couplings import Analysis
from bevel.pruning.allocate import Problem, RankedGroup

NEEDS_CALIBRATION = False

Kind = tuple[object, ...]


def allocate(problem: Problem) -> np.ndarray:
    """Kept rows per group, int64 of shape (groups,)."""
    kinds = [kind(problem.analysis, group) for group in problem.groups]
    pooled = {
        wanted: np.sort(
            np.concatenate(
                [g.scores for g, own in zip(problem.groups, kinds, strict=True) if own == wanted]
            )
        )
        for wanted in set(kinds)
    }

    def at(share: float) -> np.ndarray:
        going = {own: _threshold(scores, share) for own, scores in pooled.items()}
        return np.array(
            [
                group.fit(group.size - int(group.scores.searchsorted(going[own], side="right")))
                for group, own in zip(problem.groups, kinds, strict=True)
            ],
            dtype=np.int64,
        )

    places = {group.index: own for group, own in zip(problem.groups, kinds, strict=True)}

    def worth(group: RankedGroup, level: int) -> float:
        """The share of the kind's scores that are below the best row that would go."""
        scores = pooled[places[group.index]]
        return float(scores.searchsorted(group.scores[group.size - level])) / len(scores)

    kept = problem.first_that_meets(list(np.linspace(0, 1, 513)), at)
    return problem.refill(kept, worth)


def kind(analysis: Analysis, group: RankedGroup) -> Kind:
    """What a group is built of: the role, axis and kernel of each slice, and how often."""
    own = analysis.groups[group.index]
    counts: dict[tuple[object, ...], int] = {}
    for axis in own.axes:
        shape = analysis.shapes[axis.tensor]
        part = (axis.tensor.rpartition(".")[2], axis.dim, len(shape), shape[2:])
        counts[part] = counts.get(part, 0) + 1
    return (bool(own.runs), own.blocks is not None, tuple(sorted(counts.items(), key=str)))


def _threshold(scores: np.ndarray, share: float) -> float:
    """The highest score that goes with this share of all; minus infinity if none does."""
    going = round(share * len(scores))
    return float(scores[going - 1]) if going else -np.inf
