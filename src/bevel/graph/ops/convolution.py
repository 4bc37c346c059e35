"""Convolution: plain, grouped, depthwise and transposed, in any number of dimensions."""

from __future__ import annotations

import math
from typing import cast

from torch import Tensor

from bevel.graph.propagate import FIXED, Blocks, Handler, Propagation, along
from bevel.graph.record import Call, Value


def convolution(state: Propagation, call: Call) -> None:
    """`convolution(x, weight, bias, stride, padding, dilation, transposed, _, groups)`.

    x: (N, C, ...), weight: (O, C/groups, ...), or (C, O/groups, ...) when transposed.
    Output channels are the weight's own; input channels tie to the channels of x.
    """
    x, weight, bias = call.arguments[0], call.arguments[1], call.arguments[2]
    transposed, groups = bool(call.arguments[6]), int(call.arguments[8])
    output = cast(Value, call.outputs[0])
    for dim in range(2, len(weight.shape)):
        state.freeze_along(weight, dim, f"it varies over kernel positions: {call.place}")
        state.freeze_along(x, dim, f"it varies over positions: {call.place}")
    state.freeze_along(x, 0, f"it varies over the batch: {call.place}")
    channels = state.ids_along(x, 1, f"its layout is not by channel: {call.place}")
    if groups == 1:
        filters = _plain(state, call, weight, channels, transposed)
    elif transposed:
        reason = f"grouped transposed convolution: {call.place}"
        state.freeze_value(x, reason)
        state.freeze_value(weight, reason)
        channels = filters = None
    elif weight.shape[1] == 1:
        filters = _depthwise(state, call, weight, channels)
    else:
        filters = _grouped(state, call, weight, channels, groups)
    if isinstance(bias, Value):
        own = state.ids_along(bias, 0, call.place)
        if own is not None:
            state.unify(filters if filters is not None else FIXED, own, f"fixed: {call.place}")
    state.set(output, [along(filters, 1, output.shape)] if filters is not None else [])
    _cost(state, call, weight, x if transposed else output, filters, channels, groups)


def _plain(
    state: Propagation, call: Call, weight: Value, channels: Tensor | None, transposed: bool
) -> Tensor | None:
    inputs = state.ids_along(weight, 0 if transposed else 1, call.place)
    if inputs is not None:
        reason = f"its input has a fixed number of channels: {call.place}"
        state.unify(channels if channels is not None else FIXED, inputs, reason)
    return state.ids_along(weight, 1 if transposed else 0, call.place)


def _depthwise(
    state: Propagation, call: Call, weight: Value, channels: Tensor | None
) -> Tensor | None:
    """Filter `i` reads channel `i // multiplier` only, so they go together."""
    filters = state.ids_along(weight, 0, call.place)
    if filters is None:
        return None
    if channels is None:
        state.freeze(filters, f"its input has a fixed number of channels: {call.place}")
        return filters
    multiplier = filters.numel() // channels.numel()
    state.unify(
        filters, channels.repeat_interleave(multiplier), f"a fixed part of the input: {call.place}"
    )
    return filters


def _grouped(
    state: Propagation, call: Call, weight: Value, channels: Tensor | None, groups: int
) -> Tensor | None:
    """Every group keeps equally many filters and equally many input channels."""
    blocks = channels.reshape(groups, -1) if channels is not None else None
    if blocks is not None:
        state.blocks.append(Blocks(blocks.numpy(), call.place))
    if not state.set_grouped_axis(weight, blocks.numpy() if blocks is not None else None):
        inputs = state.ids_along(weight, 1, call.place)
        if inputs is not None:
            reason = f"its input has a fixed number of channels: {call.place}"
            state.unify(blocks if blocks is not None else FIXED, inputs, reason)
    filters = state.ids_along(weight, 0, call.place)
    if filters is not None:
        state.blocks.append(Blocks(filters.reshape(groups, -1).numpy(), call.place))
    return filters


def _cost(
    state: Propagation,
    call: Call,
    weight: Value,
    positions: Value,
    filters: Tensor | None,
    channels: Tensor | None,
    groups: int = 1,
) -> None:
    """One multiply-accumulate per weight element and output position (input, if transposed)."""
    spatial = math.prod(positions.shape[2:]) * positions.shape[0]
    factor = float(math.prod(weight.shape)) * spatial
    depthwise = groups > 1 and weight.shape[1] == 1
    lengths: list[Tensor] = [] if filters is None else [filters]
    if channels is not None and not depthwise:
        lengths.append(channels)
    for ids in lengths:
        factor /= ids.numel()
    state.cost(call, factor, *lengths)


HANDLERS: dict[str, Handler] = {"aten.convolution": convolution}
