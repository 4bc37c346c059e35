"""One walk through a recorded pass, with index ids that travel with the tensors.

Operators meet here: their handlers in `graph.ops` say which ids are one and the same (`unify`),
which must go together though they lie at different places (`tie`), which can never go (`freeze`),
which must keep equal counts (`Blocks`), where masking is not exact (`inexact`) and what a call
costs (`CostTerm`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bevel.graph.layers import FIXED, Extent, Layer, along, compact
from bevel.graph.naming import named_modules, named_tensors
from bevel.graph.recording import Call, Frame, Recording, Value
from bevel.graph.zeros import Zeros

SAMPLE = 1024
"""Pairs of ids that are looked at first, to see whether many repeat."""

Handler = Callable[["Propagation", Call], None]
FrameHandler = Callable[["Propagation", Frame], None]


@dataclass(frozen=True, eq=False)
class Blocks:
    """Ids of shape (blocks, n): every block must keep the same number.

    `whole` says whether a block may also go entirely, as an attention head can.
    """

    ids: np.ndarray
    where: str
    whole: bool = False


@dataclass(frozen=True, eq=False)
class Nodes:
    """Runs of ids that can go as a whole: node `nodes[i]` holds the ids `leaves[i]`."""

    nodes: np.ndarray
    leaves: np.ndarray


@dataclass(frozen=True, eq=False)
class Mark:
    """Something said of ids. `level` is True where it does not concern the nodes above them."""

    ids: np.ndarray
    reason: str
    level: bool = False


@dataclass(frozen=True, eq=False)
class CostTerm:
    """Multiply-accumulates of one call: `factor` times the kept length of each extent."""

    module: str
    factor: float
    extents: tuple[Extent, ...]


@dataclass(frozen=True, eq=False)
class SizeSite:
    """A module attribute whose value is a length."""

    module: str
    attribute: str
    extents: tuple[Extent, ...]


class Propagation:
    """The state of one walk through a recording."""

    def __init__(self, net: nn.Module) -> None:
        self.modules = named_modules(net)
        self.parameters = named_tensors(self.modules)
        self.layers: dict[int, list[Layer]] = {}
        self.axes: dict[str, list[np.ndarray | None]] = {}
        """Parameter name -> ids per dimension, of shape (size,) or (blocks, size)."""
        self.unions: list[tuple[np.ndarray, np.ndarray]] = []
        self.ties: list[tuple[np.ndarray, np.ndarray]] = []
        self.frozen: list[Mark] = []
        self.inexact: list[Mark] = []
        self.blocks: list[Blocks] = []
        self.nodes: dict[bytes, Nodes] = {}
        self.costs: list[CostTerm] = []
        self.sizes: list[SizeSite] = []
        self.zeros = Zeros()
        self.expected: dict[int, list[tuple[int, Extent]]] = {}
        """Index of a call -> integers among its arguments that must follow these lengths."""
        self.position = 0
        self._shrinking: dict[int, tuple[tuple[int, tuple[Extent, ...]], ...]] = {}
        self._extents: dict[tuple[int, int, int, bool], Extent] = {}
        self.count = 1  # id 0 means: belongs to nothing that can be removed

    # -- ids ------------------------------------------------------------------------------

    def fresh(self, n: int) -> Tensor:
        """`n` new ids."""
        self.count += n
        return torch.arange(self.count - n, self.count)

    def unify(self, a: Tensor | None, b: Tensor | None, reason: str) -> None:
        """Each pair of ids is one and the same index; an id that meets 0 is frozen.

        None stands for an axis that cannot shrink.
        """
        self._pair(self.unions, a, b, reason)

    def tie(self, a: Tensor | None, b: Tensor | None, reason: str) -> None:
        """Each pair of ids goes together, though they are different places of an axis."""
        self._pair(self.ties, a, b, reason)

    def _pair(
        self,
        pairs: list[tuple[np.ndarray, np.ndarray]],
        a: Tensor | None,
        b: Tensor | None,
        reason: str,
    ) -> None:
        a, b = FIXED if a is None else a, FIXED if b is None else b
        if a.shape != b.shape:
            a, b = torch.broadcast_tensors(a, b)
        left, right = a.reshape(-1).numpy(), b.reshape(-1).numpy()
        differ = left != right
        if not differ.any():
            return
        left, right = self._pairs_once(left[differ], right[differ])
        both = (left != 0) & (right != 0)
        if both.all():
            pairs.append((left, right))
            return
        if both.any():
            pairs.append((left[both], right[both]))
        self.frozen.append(Mark(np.maximum(left, right)[~both], reason))

    def _pairs_once(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Most pairs without those that repeat: layers of windows hold the same ids many times."""
        fresh = np.ones(left.size, dtype=bool)
        fresh[1:] = (left[1:] != left[:-1]) | (right[1:] != right[:-1])
        left, right = left[fresh], right[fresh]
        pairs = left[:SAMPLE] * self.count + right[:SAMPLE]
        if left.size <= SAMPLE or np.unique(pairs).size > SAMPLE // 8:  # little to be gained
            return left, right
        return np.divmod(np.unique(left * self.count + right), self.count)

    def freeze(self, ids: Tensor, reason: str, *, level: bool = False) -> None:
        """These ids can never go, nor, unless `level`, the nodes that hold them."""
        self._mark(self.frozen, ids, reason, level)

    def _mark(self, marks: list[Mark], ids: Tensor, reason: str, level: bool) -> None:
        flat = self._distinct(ids.reshape(-1).numpy())
        flat = flat[flat != 0]
        if flat.size:
            marks.append(Mark(flat, reason, level))

    def _distinct(self, ids: np.ndarray) -> np.ndarray:
        """The distinct ids, ascending: of many, by a table instead of by sorting."""
        if ids.size < self.count // 8:
            return np.asarray(np.unique(ids))
        met = np.zeros(self.count, dtype=bool)
        met[ids] = True
        found: np.ndarray = np.flatnonzero(met)
        return found

    def freeze_layer(self, layer: Layer, reason: str) -> None:
        """The layer's dimension cannot shrink."""
        self.freeze(layer.compact(), reason, level=not layer.flat)

    def mark_inexact(self, layer: Layer, reason: str) -> None:
        """Removing these ids is not the same as setting them to zero."""
        self._mark(self.inexact, layer.compact(), reason, not layer.flat)

    # -- layers ---------------------------------------------------------------------------

    def of(self, value: Value) -> list[Layer]:
        """The layers of a tensor; a parameter has one for each of its axes."""
        self._label(value, range(len(value.shape)))
        return self.layers.get(value.index, [])

    def _label(self, value: Value, dims: Iterable[int]) -> None:
        """Give these axes of a parameter ids, if they have none yet."""
        if value.name is None:
            return
        axes = self.axes.setdefault(value.name, [None] * len(value.shape))
        for dim in dims:
            known = axes[dim]
            if known is not None and known.ndim == 2:
                self.freeze(torch.from_numpy(known), f"{value.name} is used in two ways")
            elif known is None and value.shape[dim] > 1:
                self._adopt(value, dim, self.fresh(value.shape[dim]))

    def _adopt(self, value: Value, dim: int, ids: Tensor) -> None:
        """Label one axis of a parameter with these ids."""
        self.axes[value.name or ""][dim] = ids.numpy()
        self.layers.setdefault(value.index, []).append(along(ids, dim, value.shape))

    def set(self, value: Value, layers: Sequence[Layer]) -> None:
        """Give a tensor its layers.

        A layer that does not vary along its own dimension stands for an index that the network
        uses by its position: it can never go.
        """
        kept = []
        for layer in layers if 0 not in value.shape else ():
            if layer.dim in layer.dims:
                kept.append(layer)
            elif value.shape[layer.dim] == 1 or not layer.dims:
                self.freeze_layer(layer, f"used by its position, at shape {value.shape}")
        self.layers[value.index] = kept

    def set_outputs(self, call: Call, layers: Sequence[Layer] = ()) -> None:
        """Give the first output its layers; the others, statistics and positions, have none."""
        for position, output in enumerate(call.outputs):
            if isinstance(output, Value):
                self.set(output, () if position else layers)

    def on(self, value: Value, dim: int) -> list[Layer]:
        """The layers whose dimension is this one; only that axis of a parameter gets ids."""
        self._label(value, (dim,))
        return [layer for layer in self.layers.get(value.index, []) if layer.dim == dim]

    def ids_along(self, value: Value, dim: int, reason: str) -> Tensor | None:
        """Ids of shape (size,) along one dimension, None where that dimension cannot shrink.

        A layer that varies over other dimensions too is tied over them: the same indices go
        everywhere.
        """
        self._label(value, (dim,))
        return self._vector(self.layers.get(value.index, []), dim, reason)

    def _vector(self, layers: Iterable[Layer], dim: int, reason: str) -> Tensor | None:
        found: Layer | None = None
        for layer in list(layers):
            if dim not in layer.dims:
                continue
            if layer.dim != dim:
                self.uniform(layer, dim, reason)
                continue
            single = self.only(layer, (dim,), reason)
            if found is None:
                found = single
            elif found.virtual or single.virtual:
                self.freeze_layer(found if found.virtual else single, reason)
                found = single if found.virtual else found
            else:
                self.freeze_layer(found, reason)
                self.freeze_layer(single, reason)
        return None if found is None else found.vector()

    def only(self, layer: Layer, dims: Sequence[int], reason: str) -> Layer:
        """The layer varying over these dimensions only; it is tied over the others."""
        extra = [dim for dim in layer.dims if dim not in dims]
        for dim in extra:
            layer = self.uniform(layer, dim, reason)
        return layer

    def uniform(self, layer: Layer, dim: int, reason: str) -> Layer:
        """Make the same ids go at every position of a dimension that is not the layer's own."""
        if layer.dim == dim:
            raise ValueError(f"dimension {dim} is the layer's own")
        if dim not in layer.dims:
            return layer
        self.tie_over(layer, dim, reason)
        return layer.moved(layer.ids.narrow(dim, 0, 1).expand(layer.ids.shape), layer.dim)

    def tie_over(self, layer: Layer, dim: int, reason: str) -> None:
        """Make the same ids go at every position of a dimension."""
        first = layer.ids.narrow(dim, 0, 1)
        self.tie(layer.compact(), compact(first, layer.dims), reason)

    def join(self, a: Layer, b: Layer, reason: str) -> None:
        """Make two layers of the same axis one: unified where they vary alike, tied where not."""
        pair = self.unify if a.dims == b.dims else self.tie
        pair(a.compact(), b.compact(), reason)

    def adopt(self, value: Value, dim: int, ids: Tensor | None, reason: str) -> Tensor | None:
        """Make a parameter's axis have these ids (None: it cannot shrink); returns its ids."""
        axes = self.axes.get(value.name, None) if value.name is not None else None
        free = value.name is not None and (axes is None or axes[dim] is None)
        if free and ids is not None and value.shape[dim] > 1:
            self.axes.setdefault(value.name or "", [None] * len(value.shape))
            self._adopt(value, dim, ids)
            return ids
        own = self.ids_along(value, dim, reason)
        if own is not None:
            self.unify(ids, own, reason)
        elif ids is not None and value.shape[dim] > 1:
            self.freeze(ids, reason)
        return own

    def freeze_dim(self, value: Value, dim: int, reason: str) -> None:
        """A dimension cannot shrink; a parameter's unused axes get no ids."""
        for layer in self.layers.get(value.index, []):
            if layer.dim == dim:
                self.freeze_layer(layer, reason)

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
            self.freeze_layer(layer, reason)

    # -- lengths --------------------------------------------------------------------------

    def extents(self, layers: Iterable[Layer], dim: int) -> tuple[Extent, ...]:
        """The length of a dimension as numbers of ids that stay; empty if it cannot shrink."""
        return tuple(self._extent(layer) for layer in layers if layer.dim == dim)

    def _extent(self, layer: Layer) -> Extent:
        """The length of a layer's dimension: the same object for all layers of the same ids."""
        place = layer.place()
        known = self._extents.get(place)
        if known is None:  # it holds the memory of the ids, so no others will ever lie there
            known = self._extents[place] = layer.extent()
        return known

    def shrinking(self, value: Value) -> tuple[tuple[int, tuple[Extent, ...]], ...]:
        """The dimensions of a tensor that have layers, with their extents; after the walk only."""
        known = self._shrinking.get(value.index)
        if known is None:
            layers = self.layers.get(value.index, ())
            dims = {layer.dim for layer in layers}
            known = tuple((dim, self.extents(layers, dim)) for dim in dims)
            self._shrinking[value.index] = known
        return known

    def cost(self, call: Call, macs: float, *lengths: Tensor | tuple[Extent, ...] | None) -> None:
        """This call costs `macs`, in proportion to each of these lengths."""
        extents: list[Extent] = []
        for length in lengths:
            if isinstance(length, Tensor):
                extents.append(Extent(length.numpy()))
            elif length:
                extents.append(length[0])
        for extent in extents:
            macs /= extent.ids.size
        self.costs.append(CostTerm(call.module, macs, tuple(extents)))

    def expect(self, value: int, ids: Tensor) -> None:
        """The current call has this integer among its arguments, and it must follow the ids."""
        self.expected.setdefault(self.position, []).append((value, Extent(ids.numpy())))

    # -- nodes ----------------------------------------------------------------------------

    def node_ids(self, leaves: Tensor, nodes: int) -> Tensor:
        """Ids for runs of leaves: (nodes, ...) leaves -> (nodes,) ids, the same each time."""
        array = np.ascontiguousarray(leaves.reshape(nodes, -1).numpy())
        key = nodes.to_bytes(8, "little") + array.tobytes()
        known = self.nodes.get(key)
        if known is None:
            known = Nodes(self.fresh(nodes).numpy(), array)
            self.nodes[key] = known
        return torch.from_numpy(known.nodes)


def propagate(
    net: nn.Module,
    recording: Recording,
    handlers: Callable[[Call], Handler],
    frame_handlers: Mapping[Callable[..., Any], FrameHandler],
) -> Propagation:
    """Walk through the recording once.

    `handlers` gives the handler of each call; `frame_handlers` those of torch functions that do
    more than the operators they lead to show.
    """
    state = Propagation(net)
    for position, call in enumerate(recording.calls):
        state.position = position
        handlers(call)(state, call)
        state.zeros.follow(call)
    for frame in recording.frames:
        if frame.function in frame_handlers:
            frame_handlers[frame.function](state, frame)
    for output in recording.outputs:
        state.freeze_value(output, "network output")
    return state
