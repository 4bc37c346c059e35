"""Nodes and what they hold: all of a grouping that follows from the recorded pass alone.

What a network's own code fixes is found in several rounds, each with a grouping of its own. None
of them changes which ids are one and the same, so this is worked out once for all of them.
"""

from __future__ import annotations

import numpy as np

from bevel.graph.components import Classes, Pairs, merged
from bevel.graph.propagate import Mark, Propagation


class NodeTable:
    """The classes of ids under the nodes that hold them.

    Attributes:
        same: (ids,) the class of each id; ids that are one and the same index are in one.
        axes: name, dimension and ids of every parameter axis that has ids.
        starts: where each of them begins in `classes()`, which has those of all, axis by axis.
    """

    def __init__(self, state: Propagation) -> None:
        self.state = state
        self.same = merged(np.arange(state.count), state.unions)
        self.axes = [
            (name, dim, ids)
            for name, dims in state.axes.items()
            for dim, ids in enumerate(dims)
            if ids is not None and ids.size
        ]
        sizes = [ids.size for *_, ids in self.axes]
        self.starts = np.cumsum([0, *sizes], dtype=np.int64)[:-1]
        alike = self._alike()
        self._tied = Classes(merged(self.same, alike))
        self._held, self._owner = self._holders(merged(np.arange(state.count), alike))

    def classes(self) -> np.ndarray:
        """The classes of the ids of all axes, one axis after the other."""
        ids = (ids.reshape(-1) for *_, ids in self.axes)
        found: np.ndarray = self.same[np.concatenate([np.zeros(0, dtype=np.int64), *ids])]
        return found

    def tied(self) -> np.ndarray:
        """(ids,) the class of each id; ids that go together, by the ties so far, are in one."""
        return self._tied.after(self.state.ties)

    def slots(self, tied: np.ndarray) -> np.ndarray:
        """(depth, classes of `same`): the nodes that hold each class, 0 where there is none."""
        count = int(self.same.max()) + 1
        _, first = np.unique(self._held * self.state.count + tied[self._owner], return_index=True)
        first = first[self._held[first] != self.same[0]]  # what can never go is held by nothing
        if not first.size:
            return np.zeros((0, count), dtype=np.int64)
        held, owner = self._held[first], self._owner[first]
        starts = np.r_[True, held[1:] != held[:-1]]
        places = np.arange(len(held))
        rank = places - np.maximum.accumulate(np.where(starts, places, 0))
        slots = np.zeros((int(rank.max()) + 1, count), dtype=np.int64)
        slots[rank, held] = owner
        return slots

    def _alike(self) -> Pairs:
        """Nodes that hold the same ids are one; nodes that share an id go together."""
        ties = []
        known: dict[bytes, int] = {}
        for family in self.state.nodes.values():
            classes = self.same[family.leaves]
            ordered = np.sort(classes, axis=1)
            for node, row in zip(family.nodes, ordered, strict=True):
                first = known.setdefault(row.tobytes(), int(node))
                if first != node:
                    ties.append((np.array([first]), np.array([node])))
            flat = classes.reshape(-1)
            owner = np.repeat(family.nodes, classes.shape[1])
            order = np.argsort(flat, kind="stable")
            repeated = np.flatnonzero(flat[order][1:] == flat[order][:-1])
            if repeated.size:
                ties.append((owner[order][repeated], owner[order][repeated + 1]))
        return ties

    def _holders(self, alike: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Classes of ids, and for each a node that holds it: of nodes that are one, the first."""
        families = list(self.state.nodes.values())
        if not families:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        held = np.concatenate([self.same[f.leaves].reshape(-1) for f in families])
        owner = np.concatenate([np.repeat(f.nodes, f.leaves.shape[1]) for f in families])
        _, first = np.unique(held * self.state.count + alike[owner], return_index=True)
        self._cross(held[first], owner[first], alike[owner[first]])
        first.sort()
        return held[first], owner[first]

    def _cross(self, held: np.ndarray, owner: np.ndarray, group: np.ndarray) -> None:
        """Nodes that overlap without one lying in the other cannot go."""
        names, inverse, size = np.unique(group, return_inverse=True, return_counts=True)
        starts = np.r_[True, held[1:] != held[:-1]]
        run = np.cumsum(starts)
        bad: set[int] = set()
        for offset in range(1, int(np.bincount(run).max())):
            both = np.flatnonzero(run[offset:] == run[:-offset])
            pairs = inverse[both] * len(names) + inverse[both + offset]
            shared, counts = np.unique(pairs, return_counts=True)
            left, right = shared // len(names), shared % len(names)
            crossing = counts < np.minimum(size[left], size[right])
            bad |= {*left[crossing].tolist(), *right[crossing].tolist()}
        if bad:
            ids = np.unique(owner[np.isin(inverse, list(bad))])
            self.state.frozen.append(Mark(ids, "it is cut into blocks in two ways", True))
