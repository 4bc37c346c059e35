"""What a recorded pass looks like at the sizes of a cut: the shape of every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bevel.graph.grouping import Grouping
from bevel.graph.layers import Extent
from bevel.graph.recording import Value


class Prediction:
    """The sizes that every tensor of a recorded pass has once these groups are cut."""

    def __init__(self, grouping: Grouping, keep: Mapping[int, np.ndarray]) -> None:
        self.state = grouping.state
        self.own, self.whole = grouping.kept(dict(keep))
        self._sizes: dict[int, tuple[int, ...]] = {}
        self._lengths: dict[tuple[Extent, ...], int] = {}

    def shape(self, value: Value) -> tuple[int, ...]:
        """The predicted shape of a recorded tensor."""
        known = self._sizes.get(value.index)
        if known is None:
            known = self._sizes[value.index] = self._shrunken(value)
        return known

    def _shrunken(self, value: Value) -> tuple[int, ...]:
        shrinking = self.state.shrinking(value)
        if not shrinking:
            return value.shape
        sizes = list(value.shape)
        for dim, extents in shrinking:
            sizes[dim] = self.length(extents)
        return tuple(sizes)

    def length(self, extents: tuple[Extent, ...]) -> int:
        """How many indices stay."""
        known = self._lengths.get(extents)
        if known is None:
            known = self._lengths[extents] = self._counted(extents)
        return known

    def _counted(self, extents: Sequence[Extent]) -> int:
        stays = np.ones(1, dtype=bool)
        for extent in extents:
            stays = stays & (self.own if extent.level else self.whole)[extent.ids]
        return int(np.count_nonzero(stays))

    def parameter(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The predicted shape of a parameter or buffer."""
        sizes = list(shape)
        for dim, ids in enumerate(self.state.axes.get(name, ())):
            if ids is not None:
                stays = self.whole[ids]
                sizes[dim] = int(np.count_nonzero(stays[0] if ids.ndim == 2 else stays))
        return tuple(sizes)
