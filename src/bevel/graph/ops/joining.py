"""Tensors behind each other: along an axis they have, or along a new one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bevel.graph.layers import Layer, settle
from bevel.graph.ops.views import reshape
from bevel.graph.propagate import Blocks, Handler, Propagation
from bevel.graph.recording import Call, Value


def cat(state: Propagation, call: Call) -> None:
    """`cat(tensors, dim)`: ids follow their tensors; a tensor without ids adds fixed elements."""
    parts = [value for value in call.arguments[0] if 0 not in value.shape]
    output = call.output
    if not parts:
        return state.set(output, [])
    dim = int(call.argument(1, "dim", 0)) % len(output.shape)
    layers = [*_joined(state, call, parts, dim, output)]
    for other in range(len(output.shape)):
        if other != dim:
            layers += _across(state, call, parts, dim, other, output)
    return state.set(output, layers)


def _joined(
    state: Propagation, call: Call, parts: Sequence[Value], dim: int, output: Value
) -> list[Layer]:
    """The layer of the axis along which tensors are joined."""
    own = [[layer for layer in state.of(value) if layer.dim == dim] for value in parts]
    if not any(own):
        return []
    reason = f"its layout is not by channel: {call.place}"
    pieces: list[Tensor] = []
    for value, layers in zip(parts, own, strict=True):
        if all(len(other) <= 1 for other in own) and len(layers) == 1:
            pieces.append(layers[0].compact())
            continue
        for layer in layers:
            state.freeze_layer(layer, reason)
        pieces.append(
            torch.zeros(
                [value.shape[d] if d == dim else 1 for d in range(len(value.shape))],
                dtype=torch.long,
            )
        )
    sizes = [max(p.shape[d] for p in pieces) for d in range(len(output.shape))]
    wide = [
        piece.expand([piece.shape[d] if d == dim else n for d, n in enumerate(sizes)])
        for piece in pieces
    ]
    return [Layer(settle(torch.cat(wide, dim)).expand(output.shape), dim)]


def _across(
    state: Propagation, call: Call, parts: Sequence[Value], dim: int, other: int, output: Value
) -> list[Layer]:
    """The layers of an axis that all tensors share."""
    own = [[layer for layer in state.of(value) if layer.dim == other] for value in parts]
    found = max(own, key=lambda layers: (len(layers), *(len(x.dims) for x in layers)))
    if not found:
        return []
    result = []
    for position, layer in enumerate(found):
        layer = state.uniform(layer, dim, f"joined with others: {call.place}")
        for value, layers in zip(parts, own, strict=True):
            if len(layers) <= position:
                if value.shape[other] > 1:
                    state.freeze_layer(
                        layer, f"it is joined with a tensor of fixed size: {call.place}"
                    )
                continue
            partner = state.uniform(layers[position], dim, f"joined with others: {call.place}")
            state.join(layer, partner, f"a fixed part: {call.place}")
        ids = layer.ids.narrow(dim, 0, 1).expand(output.shape)
        result.append(layer.moved(ids, other))
    return result


def stack(state: Propagation, call: Call) -> None:
    """`stack(tensors, dim)`: a new axis, whose indices have positions."""
    parts, output = call.arguments[0], call.output
    dim = int(call.argument(1, "dim", 0)) % len(output.shape)
    own = []
    for value in parts:
        shape = (*value.shape[:dim], 1, *value.shape[dim:])
        own.append(reshape(state, call.place, state.of(value), value.shape, shape))
    state.set(output, _stacked(state, own, output.shape, dim, call.place))


def _stacked(
    state: Propagation,
    parts: Sequence[Sequence[Layer]],
    shape: tuple[int, ...],
    dim: int,
    place: str,
) -> list[Layer]:
    """Layers of tensors behind each other along `dim`, where each has length 1.

    Their other axes stay separate where all have layers alike: they vary along `dim` then.
    """
    result = []
    for other in range(len(shape)):
        if other == dim:
            continue
        own = [[x for x in layers if x.dim == other] for layers in parts]
        if not any(own):
            continue
        counts = {len(layers) for layers in own}
        dims = {x.dims for layers in own for x in layers}
        if counts != {1} or len(dims) != 1:
            for layer in (x for layers in own for x in layers):
                state.freeze_layer(layer, f"it is joined with a tensor of fixed size: {place}")
            continue
        ids = settle(torch.cat([layers[0].compact() for layers in own], dim))
        layer = own[0][0].moved(ids.expand(shape), other)
        if dim in layer.dims:
            rows = layer.compact().movedim(other, -1)
            state.blocks.append(Blocks(rows.reshape(-1, rows.shape[-1]).numpy(), place))
        result.append(layer)
    return result


HANDLERS: dict[str, Handler] = {"aten.cat": cat, "aten.stack": stack}
