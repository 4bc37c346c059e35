"""Index ids that travel with the tensors of a recorded pass.

Every index along every parameter axis that can be removed has an id. A *layer* of a tensor is an
integer tensor of the same shape that says, for each element, which id it belongs to (0: none, it
can never go). Constant dimensions have stride 0, so a layer costs no memory and data movement
(view, permute, slice, ...) is the very same operator applied to the layer. A tensor has several
layers where its elements belong to several ids at once, as a weight's do: one per axis.

Operators meet here: their handlers in `graph.ops` say which ids must go together (`unify`), which
can never go (`freeze`), which must keep equal counts (`Blocks`) and what they cost (`CostTerm`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bevel.graph.record import Call, Recording, Value

Handler = Callable[["Propagation", Call], None]


FIXED = torch.zeros(1, dtype=torch.long)
"""The id of everything that can never be removed."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """Ids of shape (blocks, n): every block must keep the same number."""

    ids: np.ndarray
    where: str


@dataclass(frozen=True, eq=False)
class CostTerm:
    """Multiply-accumulates of one call: `factor` times the kept length of each id array."""

    module: str
    factor: float
    lengths: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class SizeSite:
    """A module attribute that holds the number of kept ids, such as an amount of padding."""

    module: str
    attribute: str
    ids: np.ndarray


def varying(layer: Tensor) -> tuple[int, ...]:
    """The dimensions along which a layer is not constant."""
    return tuple(
        d for d, (n, s) in enumerate(zip(layer.shape, layer.stride(), strict=True)) if n > 1 and s
    )


def compact(layer: Tensor) -> Tensor:
    """The layer with its constant dimensions cut to length 1."""
    keep = varying(layer)
    for dim, size in enumerate(layer.shape):
        if dim not in keep and size > 1:
            layer = layer.narrow(dim, 0, 1)
    return layer


def along(ids: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """A layer of that shape whose ids vary along one dimension only."""
    view = [1] * len(shape)
    view[dim] = ids.numel()
    return ids.reshape(view).expand(tuple(shape))


def settle(layer: Tensor) -> Tensor | None:
    """Give constant dimensions stride 0 again after a copy; None if no element has an id."""
    for dim in varying(layer):
        first = layer.narrow(dim, 0, 1)
        if bool((compact(layer) == compact(first)).all()):
            layer = first.expand(layer.shape)
    return layer if bool(compact(layer).any()) else None


class Propagation:
    """The state of one walk through a recording."""

    def __init__(self, net: nn.Module, recording: Recording) -> None:
        self.recording = recording
        self.modules = dict(net.named_modules())
        self.parameters = dict(net.named_parameters()) | dict(net.named_buffers())
        self.layers: dict[int, list[Tensor]] = {}
        self.axes: dict[str, list[np.ndarray | None]] = {}
        """Parameter name -> ids per dimension, of shape (size,) or (blocks, size)."""
        self.unions: list[tuple[np.ndarray, np.ndarray]] = []
        self.frozen: list[tuple[np.ndarray, str]] = []
        self.blocks: list[Blocks] = []
        self.costs: list[CostTerm] = []
        self.sizes: list[SizeSite] = []
        self.count = 1  # id 0 means: belongs to nothing that can be removed

    # -- ids ------------------------------------------------------------------------------

    def fresh(self, n: int) -> Tensor:
        """`n` new ids."""
        self.count += n
        return torch.arange(self.count - n, self.count)

    def unify(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Each pair of ids goes together; an id that meets 0 is frozen for that reason."""
        left, right = torch.broadcast_tensors(a, b)
        pair = np.stack([left.reshape(-1).numpy(), right.reshape(-1).numpy()])
        pair = pair[:, pair[0] != pair[1]]
        if not pair.size:
            return
        both = (pair != 0).all(axis=0)
        if both.any():
            self.unions.append((pair[0, both], pair[1, both]))
        if not both.all():
            self.frozen.append((pair[:, ~both].max(axis=0), reason))

    def freeze(self, ids: Tensor, reason: str) -> None:
        """These ids can never go."""
        flat = np.unique(compact(ids).reshape(-1).numpy())
        flat = flat[flat != 0]
        if flat.size:
            self.frozen.append((flat, reason))

    # -- layers ---------------------------------------------------------------------------

    def of(self, value: Value) -> list[Tensor]:
        """The layers of a tensor; a parameter has one for each of its axes."""
        self._label(value, range(len(value.shape)))
        return self.layers.get(value.index, [])

    def _label(self, value: Value, dims: Iterable[int]) -> None:
        """Give these axes of a parameter ids, if they have none yet."""
        if value.name is None:
            return
        axes = self.axes.setdefault(value.name, [None] * len(value.shape))
        layers = self.layers.setdefault(value.index, [])
        for dim in dims:
            known = axes[dim]
            if known is not None and known.ndim == 2:
                self.freeze(torch.from_numpy(known), f"{value.name} is used in two ways")
            elif known is None and value.shape[dim] > 1:
                ids = self.fresh(value.shape[dim])
                axes[dim] = ids.numpy()
                layers.append(along(ids, dim, value.shape))

    def set(self, value: Value, layers: Sequence[Tensor]) -> None:
        """Give a tensor its layers. A layer that is one id everywhere stands for an index that
        the network uses by its position: it can never go."""
        for layer in layers:
            if not varying(layer):
                self.freeze(layer, f"used by its position, at shape {value.shape}")
        self.layers[value.index] = [layer for layer in layers if varying(layer)]

    def ids_along(self, value: Value, dim: int, reason: str) -> Tensor | None:
        """Ids of shape (size,) along one dimension, None where that dimension cannot shrink.

        A layer that varies along this dimension and others has no such form and is frozen.
        """
        self._label(value, (dim,))
        found: Tensor | None = None
        for layer in self.layers.get(value.index, []):
            dims = varying(layer)
            if dims == (dim,):
                ids = compact(layer).reshape(-1)
                if found is not None:
                    self.unify(found, ids, reason)
                found = ids
            elif dim in dims:
                self.freeze(layer, reason)
        return found

    def freeze_along(self, value: Value, dim: int, reason: str) -> None:
        """Freeze the ids that vary along a dimension; a parameter's unused axes get none."""
        for layer in self.layers.get(value.index, []):
            if dim in varying(layer):
                self.freeze(layer, reason)

    def set_grouped_axis(self, weight: Value, ids: np.ndarray | None) -> bool:
        """Give a grouped weight's input axis ids of shape (groups, n).

        Position j of that axis is another channel in each group. False if the weight is not a
        parameter that is seen for the first time.
        """
        if weight.name is None or weight.name in self.axes:
            return False
        self.axes[weight.name] = [None, ids] + [None] * (len(weight.shape) - 2)
        return True

    def freeze_value(self, value: Value, reason: str) -> None:
        """Freeze every id of a tensor."""
        for layer in self.of(value):
            self.freeze(layer, reason)

    def cost(self, call: Call, factor: float, *lengths: Tensor | None) -> None:
        """This call costs `factor` times the product of these lengths."""
        arrays = tuple(ids.numpy() for ids in lengths if ids is not None)
        self.costs.append(CostTerm(call.module, factor, arrays))


def propagate(
    net: nn.Module, recording: Recording, handlers: Callable[[Call], Handler]
) -> Propagation:
    """Walk through the recording once; `handlers` gives the handler of each call."""
    state = Propagation(net, recording)
    for call in recording.calls:
        handlers(call)(state, call)
    for output in recording.outputs:
        state.freeze_value(output, "network output")
    return state
