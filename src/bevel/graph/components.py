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

    def __init__(self, start: np.ndarray) -> None:
        self.classes, self.done = start, 0

    def after(self, pairs: Pairs) -> np.ndarray:
        """The classes once all these pairs are merged too."""
        self.classes = merged(self.classes, pairs[self.done :])
        self.done = len(pairs)
        return self.classes
