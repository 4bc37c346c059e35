"""Connected components: the classes of ids that are one, or that go together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Pairs = Sequence[tuple[np.ndarray, np.ndarray]]


def merged(classes: np.ndarray, pairs: Pairs) -> np.ndarray:
    """The classes of ids once those of each pair of ids are merged.

    Args:
        classes: (ids,) the number of each id's class; none is left out.
        pairs: (n,) and (n,) ids whose classes are merged, any number of times.
    """
    if not pairs:
        return classes
    left = classes[np.concatenate([a for a, _ in pairs])]
    right = classes[np.concatenate([b for _, b in pairs])]
    differ = left != right
    count = int(classes.max()) + 1
    edges = (left[differ].astype(np.int32), right[differ].astype(np.int32))
    graph = coo_matrix((np.ones(len(edges[0]), dtype=bool), edges), shape=(count, count))
    labels: np.ndarray = connected_components(graph, directed=False)[1].astype(np.int64)
    found: np.ndarray = labels[classes]
    return found


class Classes:
    """Classes under a list of pairs that only grows: each pair is merged once."""

    def __init__(self) -> None:
        self.done = 0
        self.start: np.ndarray | None = None
        self.classes = np.zeros(0, dtype=np.int64)

    def after(self, count: int, pairs: Pairs, start: np.ndarray | None = None) -> np.ndarray:
        """The classes of `count` ids once all pairs are merged, from `start` or all alone."""
        if len(self.classes) != count or start is not self.start or len(pairs) < self.done:
            self.classes = np.arange(count) if start is None else start
            self.start, self.done = start, 0
        self.classes = merged(self.classes, pairs[self.done :])
        self.done = len(pairs)
        return self.classes
