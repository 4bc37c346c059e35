"""Data movement: the same operator, applied to the layers of ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bevel.graph.layers import Extent, Layer, along, settle, widen
from bevel.graph.ops.views import reshape
from bevel.graph.propagate import Blocks, FrameHandler, Handler, Propagation, SizeSite
from bevel.graph.recording import Call, Frame, Value


def permute(state: Propagation, call: Call) -> None:
    """`permute(x, dims)`, `transpose(x, a, b)`, `t(x)`, `movedim`: axes in another order."""
    source = call.inputs[0]
    order = _order(call, len(source.shape))
    state.set(
        call.output,
        [
            layer.moved(layer.ids.permute(order), order.index(layer.dim))
            for layer in state.of(source)
        ],
    )


def _order(call: Call, ndim: int) -> list[int]:
    if call.name == "aten.permute":
        return [int(dim) % ndim for dim in call.argument(1, "dims")]
    order = list(range(ndim))
    if ndim > 1:
        a, b = call.arguments[1:3] or (0, 1)
        order[a], order[b] = order[b], order[a]
    return order


def same(state: Propagation, call: Call) -> None:
    """The output has the elements of the first tensor, in place."""
    source = call.inputs[0]
    for output in call.outputs:
        if isinstance(output, Value):
            state.set(output, state.of(source) if output.shape == source.shape else [])


def slice_(state: Propagation, call: Call) -> None:
    """`slice(x, dim, start, end, step)`: a part of an axis, or every `step`-th index."""
    source, output = call.inputs[0], call.output
    dim = int(call.argument(1, "dim", 0)) % len(source.shape)
    size = source.shape[dim]
    start, end = call.argument(2, "start"), call.argument(3, "end")
    step = int(call.argument(4, "step", 1))
    first = 0 if start is None else min(max(start + size if start < 0 else start, 0), size)
    last = size if end is None else min(max(end + size if end < 0 else end, 0), size)
    layers = []
    for layer in state.of(source):
        if layer.dim == dim and step > 1:
            _strided(state, layer, step, call.place)
        elif layer.dim == dim and layer.flat and 0 < first < size:
            # What is cut off in front moves the start: the argument must follow.
            state.expect(
                int(start), layer.vector()[:first] if start > 0 else layer.vector()[first:]
            )
        if layer.dim == dim and step == 1 and layer.flat and 0 < last < size:
            state.expect(int(end), layer.vector()[:last] if end > 0 else layer.vector()[last:])
        layers.append(layer.moved(layer.ids[_at(dim, slice(first, last, step))], layer.dim))
    state.set(output, layers)


def _strided(state: Propagation, layer: Layer, step: int, place: str) -> None:
    """Every `step`-th index keeps its meaning if runs of `step` go together."""
    size = layer.ids.shape[layer.dim]
    if size % step or not layer.flat:
        state.freeze_layer(layer, f"used by its position: {place}")
        return
    runs = layer.vector().reshape(-1, step)
    state.tie(runs, runs[:, :1], place)


def _at(dim: int, index: slice | int) -> tuple[Any, ...]:
    return (*(slice(None) for _ in range(dim)), index)


def split(state: Propagation, call: Call) -> None:
    """`split(x, size, dim)`: equal parts keep equal counts."""
    source = call.inputs[0]
    dim = int(call.argument(2, "dim", 0)) % len(source.shape)
    parts = [output for output in call.outputs if isinstance(output, Value)]
    sizes = [part.shape[dim] for part in parts]
    layers: list[list[Layer]] = [[] for _ in parts]
    for layer in state.of(source):
        if layer.dim == dim and layer.flat and len(set(sizes)) == 1 and len(parts) > 1:
            ids = layer.vector().reshape(len(parts), -1)
            state.blocks.append(Blocks(ids.numpy(), call.place))
        elif layer.dim == dim and not layer.flat:
            _split_rows(state, layer, sizes, call.place)
        for own, ids in zip(layers, layer.ids.split(sizes, dim), strict=True):
            own.append(layer.moved(ids, layer.dim))
    for part, own in zip(parts, layers, strict=True):
        state.set(part, own)


def _split_rows(state: Propagation, layer: Layer, sizes: Sequence[int], place: str) -> None:
    """The parts of every row keep equal counts; equal parts also among each other."""
    rows = layer.compact().movedim(layer.dim, -1)
    pieces = [piece.reshape(-1, piece.shape[-1]) for piece in rows.split(list(sizes), -1)]
    groups = [torch.cat(pieces)] if len(set(sizes)) == 1 else pieces
    state.blocks += [Blocks(piece.numpy(), place, whole=True) for piece in groups]


def select(state: Propagation, call: Call) -> None:
    """`select(x, dim, index)`, `unbind(x, dim)`: the axis goes, its indices have positions."""
    source = call.inputs[0]
    dim = int(call.argument(1, "dim", 0)) % len(source.shape)
    outputs = [output for output in call.outputs if isinstance(output, Value)]
    first = int(call.argument(2, "index", 0)) if call.name == "aten.select" else 0
    for layer in state.of(source):
        if layer.dim == dim:
            state.freeze_layer(layer, f"used by its position: {call.place}")
    for offset, output in enumerate(outputs):
        own = []
        for layer in state.of(source):
            if layer.dim != dim:
                ids = settle(layer.ids.select(dim, first + offset))
                own.append(layer.moved(ids, layer.dim - (layer.dim > dim)))
        state.set(output, own)


def expand(state: Propagation, call: Call) -> None:
    """`expand(x, sizes)`: what was one element can have any length."""
    source, output = call.inputs[0], call.output
    layers = [widen(layer, output.shape) for layer in state.of(source)]
    state.set(output, [*layers, *repeated(state, source.shape, output.shape)])


def repeat(state: Propagation, call: Call) -> None:
    """`repeat(x, times)`: copies of an axis behind each other keep the same indices."""
    source, output = call.inputs[0], call.output
    times = [int(n) for n in call.argument(1, "repeats")]
    offset = len(times) - len(source.shape)
    layers = [
        layer.moved(settle(layer.ids.repeat(times)), layer.dim + offset)
        for layer in state.of(source)
    ]
    state.set(output, [*layers, *repeated(state, source.shape, output.shape)])


def repeated(state: Propagation, before: tuple[int, ...], after: tuple[int, ...]) -> list[Layer]:
    """Layers of the axes along which a tensor of shape `before` has one element, `after` more."""
    offset = len(after) - len(before)
    return [
        along(state.fresh(size), dim, after, virtual=True)
        for dim, size in enumerate(after)
        if size > 1 and (dim < offset or before[dim - offset] == 1)
    ]


def flip(state: Propagation, call: Call) -> None:
    """`flip(x, dims)`: the same indices backwards."""
    source = call.inputs[0]
    dims = {int(dim) % len(source.shape) for dim in call.argument(1, "dims")}
    layers = []
    for layer in state.of(source):
        turned = [dim for dim in layer.dims if dim in dims]
        layers.append(layer.moved(settle(layer.ids.flip(turned)), layer.dim) if turned else layer)
    state.set(call.output, layers)


def roll(state: Propagation, call: Call) -> None:
    """`roll(x, shifts, dims)`: fine along axes that do not shrink."""
    source = call.inputs[0]
    dims = [
        int(dim) % len(source.shape) for dim in call.argument(2, "dims") or range(len(source.shape))
    ]
    for layer in state.of(source):
        if set(dims) & set(layer.dims):
            state.freeze_layer(layer, f"shifted by a number of places: {call.place}")
    state.set(call.output, state.of(source))


def unfold_dim(state: Propagation, call: Call) -> None:
    """`x.unfold(dim, size, step)`: windows along an axis, which must not shrink."""
    source, output = call.inputs[0], call.output
    dim = int(call.arguments[1]) % len(source.shape)
    layers = []
    for layer in state.of(source):
        if dim in layer.dims:
            state.freeze_layer(layer, f"cut into windows: {call.place}")
            continue
        ids = layer.ids.narrow(dim, 0, 1).unsqueeze(-1).expand(output.shape)
        layers.append(layer.moved(ids, layer.dim))
    state.set(output, layers)


def pad(state: Propagation, call: Call) -> None:
    """`constant_pad_nd(x, [last_front, last_back, ...], value)`.

    Padding along channels adds channels of a constant. Where the module keeps the two amounts in
    attributes (`channel_padding`), they can shrink as any channel can; else they are fixed.
    """
    x, amounts = call.arguments[0], [int(amount) for amount in call.arguments[1]]
    output = call.output
    layers = []
    for layer in state.of(x):
        front, back = _amounts(amounts, layer.dim, len(x.shape))
        if (front, back) == (0, 0):
            for dim in layer.dims:
                if _amounts(amounts, dim, len(x.shape)) != (0, 0):
                    layer = state.uniform(layer, dim, f"it is padded: {call.place}")
            ids = layer.compact()
            layers.append(layer.moved(ids.expand(output.shape), layer.dim))
        elif layer.flat and front >= 0 and back >= 0:
            ids = _padded(state, call, layer.vector(), front, back)
            layers.append(along(ids, layer.dim, output.shape))
        else:
            state.freeze_layer(layer, f"it is padded: {call.place}")
    return state.set(output, layers)


def _padded(state: Propagation, call: Call, ids: Tensor, front: int, back: int) -> Tensor:
    """The ids with new ones before and after, tied to the module's attributes."""
    attributes: Any = getattr(state.modules.get(call.module), "channel_padding", None)
    new = [state.fresh(front), state.fresh(back)]
    for index, amount in enumerate((front, back)):
        if amount and attributes is None:
            state.freeze(new[index], f"a fixed amount of padding: {call.place}")
        elif amount:
            extents = (Extent(new[index].numpy()),)
            state.sizes.append(SizeSite(call.module, attributes[index], extents))
    return torch.cat([new[0], ids, new[1]])


def _amounts(amounts: list[int], dim: int, ndim: int) -> tuple[int, int]:
    position = 2 * (ndim - 1 - dim)
    return (amounts[position], amounts[position + 1]) if position < len(amounts) else (0, 0)


def as_strided(state: Propagation, call: Call) -> None:
    """`as_strided(x, size, stride)`: only where it changes nothing."""
    source, output = call.inputs[0], call.output
    if source.shape == output.shape:
        return state.set(output, state.of(source))
    state.freeze_value(source, f"read by strides: {call.place}")
    return state.set(output, [])


def tensor_split(state: Propagation, frame: Frame) -> None:
    """`tensor_split(x, parts, dim)` counts its parts from the size: equal counts in each."""
    x, parts = frame.arguments[0], frame.arguments[1]
    if not isinstance(parts, int):
        return
    given = frame.keyword("dim")
    dim = frame.arguments[2] if given is None and len(frame.arguments) > 2 else given or 0
    for layer in state.on(x, int(dim) % len(x.shape)):
        if layer.ids.shape[layer.dim] % parts or not layer.flat:
            state.freeze_layer(layer, f"split into {parts} uneven parts")
        else:
            ids = layer.vector().reshape(parts, -1).numpy()
            state.blocks.append(Blocks(ids, f"tensor_split in {frame.module}"))


def channel_shuffle(state: Propagation, call: Call) -> None:
    """`channel_shuffle(x, groups)`: view (g, C/g), transposed, flat again."""
    source, output = call.inputs[0], call.output
    groups, channels = int(call.argument(1, "groups")), source.shape[1]
    rest = source.shape[2:]
    split = (source.shape[0], groups, channels // groups, *rest)
    layers = reshape(state, call.place, state.of(source), source.shape, split)
    order = [0, 2, 1, *range(3, len(split))]
    turned = [layer.moved(layer.ids.permute(order), order.index(layer.dim)) for layer in layers]
    for layer in turned:
        if layer.dim == 2 and layer.flat:  # the number of groups is an argument
            state.freeze_layer(layer, f"a fixed number of groups: {call.place}")
    shape = tuple(split[d] for d in order)
    state.set(output, reshape(state, call.place, turned, shape, output.shape))


_SAME = (
    "clone", "detach", "alias", "contiguous", "_to_copy", "to", "lift_fresh", "dropout",
    "native_dropout", "lift_fresh_copy", "positive", "resolve_conj", "resolve_neg",
    "pin_memory", "nan_to_num", "channel_dropout",
)  # fmt: skip

FRAME_HANDLERS: dict[Callable[..., Any], FrameHandler] = {
    torch.tensor_split: tensor_split,
    Tensor.tensor_split: tensor_split,
}

HANDLERS: dict[str, Handler] = {
    **{f"aten.{name}": same for name in _SAME},
    **{f"aten.{name}": permute for name in ("permute", "transpose", "t")},
    **{f"aten.{name}": split for name in ("split", "split_with_sizes", "chunk")},
    "aten.slice": slice_,
    "aten.select": select,
    "aten.unbind": select,
    "aten.expand": expand,
    "aten.repeat": repeat,
    "aten.flip": flip,
    "aten.roll": roll,
    "aten.unfold": unfold_dim,
    "aten.constant_pad_nd": pad,
    "aten.as_strided": as_strided,
    "aten.channel_shuffle": channel_shuffle,
    "aten.native_channel_shuffle": channel_shuffle,
}
