"""Reading and writing by index: axes that are not indexed pass through."""

from __future__ import annotations

from torch import Tensor

from bevel.graph.layers import Layer, along, settle, widen
from bevel.graph.ops.elementwise import combine
from bevel.graph.propagate import Handler, Propagation
from bevel.graph.recording import Call, Value


def index(state: Propagation, call: Call) -> None:
    """`x[i, :, j]`: indexed axes keep their indices."""
    x, indices = call.arguments[0], call.arguments[1]
    output = call.output
    used = [dim for dim, value in enumerate(indices) if isinstance(value, Value)]
    for value in call.inputs[1:]:
        state.freeze_value(value, f"positions to read: {call.place}")
    layers = []
    tensors = [value.data if isinstance(value, Value) else None for value in indices]
    known = all(tensors[dim] is not None for dim in used)
    for layer in state.of(x):
        if set(used) & set(layer.dims) or not known:
            state.freeze_layer(layer, f"indexed by position: {call.place}")
            continue
        ids = _indexed(layer, tensors)
        if ids is not None and ids.shape == output.shape:
            settled = settle(ids)
            dim = next(
                (d for d in range(ids.ndim) if settled.stride(d) and settled.shape[d] > 1), 0
            )
            layers.append(layer.moved(settled, dim))
        else:
            state.freeze_layer(layer, f"indexed by position: {call.place}")
    state.set(output, layers)


def _indexed(layer: Layer, tensors: list[Tensor | None]) -> Tensor | None:
    """The same reading of a flat layer's ids; None for others."""
    if not layer.flat:
        return None
    key = tuple(slice(None) if tensor is None else tensor for tensor in tensors)
    return layer.ids[key]


def write(state: Propagation, call: Call) -> None:
    """`x[i] = y` and scatters: what is written by position cannot shrink along that axis."""
    x = call.arguments[0]
    for value in call.inputs[1:]:
        state.freeze_value(value, f"written by position: {call.place}")
    state.freeze_value(x, f"written by position: {call.place}")
    state.set(call.output, [])


def scatter_part(state: Propagation, call: Call) -> None:
    """`slice_scatter(x, y, ...)`, `select_scatter`: as a copy into a part."""
    x, part = call.arguments[:2]
    state.freeze_value(part, f"written into a part: {call.place}")
    state.set(call.output, state.of(x))


def gather(state: Propagation, call: Call) -> None:
    """`gather(x, dim, index)`: other axes pass through, as far as the index spans them."""
    x, dim, positions = call.arguments[:3]
    output = call.output
    dim = int(dim) % max(len(x.shape), 1)
    layers = []
    for layer in state.of(x):
        if dim in layer.dims:
            state.freeze_layer(layer, f"indexed by position: {call.place}")
        elif all(x.shape[d] == output.shape[d] for d in layer.dims):
            layers.append(widen(layer, output.shape))
        else:
            state.freeze_layer(layer, f"indexed by position: {call.place}")
    spans = []
    for layer in state.of(positions):
        if layer.dim == dim:
            state.freeze_layer(layer, f"positions to read: {call.place}")
        else:
            spans.append(layer)
    operands = [(output.shape, layers), (positions.shape, spans)]
    state.set(output, combine(state, operands, output.shape, call.place))


def index_select(state: Propagation, call: Call) -> None:
    """`index_select(x, dim, index)`."""
    x, dim = call.arguments[0], int(call.arguments[1]) % max(len(call.arguments[0].shape), 1)
    output = call.output
    layers = []
    for layer in state.of(x):
        if dim in layer.dims:
            state.freeze_layer(layer, f"indexed by position: {call.place}")
        else:
            layers.append(widen(layer, output.shape))
    state.set(output, layers)


def embedding(state: Propagation, call: Call) -> None:
    """`embedding(weight, positions)`: weight (V, C) -> (..., C)."""
    weight, output = call.arguments[0], call.output
    ids = state.ids_along(weight, 1, call.place)
    layers = [] if ids is None else [along(ids, len(output.shape) - 1, output.shape)]
    state.set(output, layers)


def triangle(state: Propagation, call: Call) -> None:
    """`tril(x)`, `triu(x)`: by position along the last two axes."""
    x = call.arguments[0]
    for layer in state.of(x):
        if layer.dim >= len(x.shape) - 2:
            state.freeze_layer(layer, f"used by its position: {call.place}")
    state.set(call.output, state.of(x))


def free(state: Propagation, call: Call) -> None:
    """`nms(boxes, scores)`, `nonzero(x)`, `bincount`: positions of data, without channels."""
    for value in call.inputs:
        state.freeze_value(value, f"read by value: {call.place}")
    state.set_outputs(call)


_WRITE = ("index_put", "_index_put_impl", "scatter", "scatter_add", "index_add", "index_copy",
    "masked_scatter", "index_fill", "scatter_reduce", "put")  # fmt: skip
_FREE = ("aten.nonzero", "aten.bincount", "aten._unique2", "aten.unique_dim", "torchvision.nms",
    "aten.bucketize", "aten.searchsorted", "aten.histc", "aten.masked_select",
    "aten.unique_consecutive", "aten.isin", "aten.multinomial")  # fmt: skip

HANDLERS: dict[str, Handler] = {
    "aten.index": index,
    "aten._unsafe_index": index,
    "aten.gather": gather,
    "aten.index_select": index_select,
    "aten.embedding": embedding,
    "aten.tril": triangle,
    "aten.triu": triangle,
    **{f"aten.{name}": write for name in _WRITE},
    **{f"aten.{name}": scatter_part for name in ("slice_scatter", "select_scatter")},
    **dict.fromkeys(_FREE, free),
}
