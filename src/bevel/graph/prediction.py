"""What a recorded pass looks like at the sizes of a cut: the shape of every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bevel.graph.grouping import Grouping
from bevel.graph.layers import Layer
from bevel.graph.propagate import Extent
from bevel.graph.record import Value


class Prediction:
    """The sizes that every tensor of a recorded pass has once these groups are cut."""

    def __init__(self, grouping: Grouping, keep: Mapping[int, np.ndarray]) -> None:
        self.state = grouping.state
        self.own, self.whole = grouping.kept(dict(keep))
        self._sizes: dict[int, tuple[int, ...]] = {}
        self._lengths: dict[tuple[int, ...], int] = {}

    def shape(self, value: Value) -> tuple[int, ...]:
        """The predicted shape of a recorded tensor."""
        known = self._sizes.get(value.index)
        if known is None:
            layers = self.state.layers.get(value.index)
            known = self._shrunken(value.shape, layers) if layers else value.shape
            self._sizes[value.index] = known
        return known

    def _shrunken(self, shape: tuple[int, ...], layers: Sequence[Layer]) -> tuple[int, ...]:
        sizes = list(shape)
        for dim in {layer.dim for layer in layers}:
            own = [layer for layer in layers if layer.dim == dim]
            key = tuple(map(id, own))
            if key not in self._lengths:
                self._lengths[key] = self.length(self.state.extents(own, dim))
            sizes[dim] = self._lengths[key]
        return tuple(sizes)

    def length(self, extents: Sequence[Extent]) -> int:
        """How many indices stay."""
        stays = np.ones(1, dtype=bool)
        for extent in extents:
            stays = stays & (self.own if extent.level else self.whole)[extent.ids]
        return int(stays.sum())

    def parameter(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The predicted shape of a parameter or buffer."""
        sizes = list(shape)
        for dim, ids in enumerate(self.state.axes.get(name, ())):
            if ids is not None:
                stays = self.whole[ids]
                sizes[dim] = int((stays[0] if ids.ndim == 2 else stays).sum())
        return tuple(sizes)
