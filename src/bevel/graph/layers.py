"""Layers: which index of which axis every element of a tensor belongs to.

Every index along an axis that can shrink has an *id*. A `Layer` of a tensor is an integer tensor
of the same shape that holds an id for each element (0: none, it can never go), and the dimension
whose length shrinks when its ids go. Dimensions along which a layer is constant have stride 0, so
a layer costs no memory and data movement (permute, slice, ...) is the very same operator applied
to the layer. An element stays only if its ids in all layers stay.

A flat axis that is viewed as (heads, head dimension) keeps its layer, which then varies over both
and shrinks the inner one, and gains a layer for the outer one, whose ids are *nodes*: a node is a
run of inner ids that can go as a whole.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FIXED = torch.zeros(1, dtype=torch.long)
"""The id of everything that can never be removed."""


def varying(ids: Tensor) -> tuple[int, ...]:
    """The dimensions along which ids are not constant."""
    return tuple(
        d for d, (n, s) in enumerate(zip(ids.shape, ids.stride(), strict=True)) if n > 1 and s
    )


@dataclass(frozen=True, eq=False)
class Extent:
    """A length as the number of ids that stay; `level` ignores the nodes that hold them."""

    ids: np.ndarray
    level: bool = False


class Layer:
    """Ids of a tensor's shape.

    Attributes:
        ids: int64, stride 0 along constant dimensions.
        dim: the dimension that shrinks when ids go.
        dims: the dimensions along which the ids vary; `dim` is among them.
        virtual: the tensor holds one value along `dim` (an expanded or constant tensor), so it
            can have any length there.
    """

    __slots__ = ("_compact", "dim", "dims", "ids", "virtual")

    def __init__(self, ids: Tensor, dim: int, *, virtual: bool = False) -> None:
        self.ids, self.dim, self.virtual = ids, dim, virtual
        self.dims = varying(ids)
        self._compact: Tensor | None = None

    @property
    def flat(self) -> bool:
        """Whether the ids vary along one dimension only."""
        return len(self.dims) == 1

    def compact(self) -> Tensor:
        """The ids with the constant dimensions cut to length 1."""
        if self._compact is None:
            self._compact = compact(self.ids, self.dims)
        return self._compact

    def vector(self) -> Tensor:
        """The ids of a flat layer, of shape (size,)."""
        return self.compact().reshape(-1)

    def place(self) -> tuple[int, int, int, bool]:
        """What tells the ids along `dim` from others: layers that are the same views share it."""
        ids, dim = self.ids, self.dim
        return ids.data_ptr(), ids.shape[dim], ids.stride(dim), self.flat

    def extent(self) -> Extent:
        """The length of `dim`."""
        row = compact(self.ids, (self.dim,))
        return Extent(row.reshape(-1).numpy(), level=not self.flat)

    def moved(self, ids: Tensor, dim: int) -> Layer:
        """The same layer elsewhere."""
        return Layer(ids, dim, virtual=self.virtual)


def compact(ids: Tensor, dims: Collection[int]) -> Tensor:
    """Ids with every dimension but these cut to length 1."""
    sizes = [n if dim in dims else min(n, 1) for dim, n in enumerate(ids.shape)]
    return ids.as_strided(sizes, ids.stride())


def along(ids: Tensor, dim: int, shape: Sequence[int], *, virtual: bool = False) -> Layer:
    """A layer of that shape whose ids vary along one dimension."""
    view = [1] * len(shape)
    view[dim] = ids.numel()
    return Layer(ids.reshape(view).expand(tuple(shape)), dim, virtual=virtual)


def settle(ids: Tensor) -> Tensor:
    """Give constant dimensions stride 0 again after a copy."""
    for dim in varying(ids):
        small = compact(ids, varying(ids))
        first = small.narrow(dim, 0, 1)
        if torch.equal(small, first.expand_as(small)):
            ids = ids.narrow(dim, 0, 1).expand(ids.shape)
    return ids


def widen(layer: Layer, shape: Sequence[int]) -> Layer:
    """The layer broadcast to a larger shape; its dimensions are counted from the last."""
    offset = len(shape) - layer.ids.ndim
    small = layer.compact()
    ids = small.reshape((1,) * offset + small.shape).expand(tuple(shape))
    return layer.moved(ids, layer.dim + offset)
