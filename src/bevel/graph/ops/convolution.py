"""Convolution: plain, grouped, depthwise and transposed, in any number of dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set

from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from bevel.graph.layers import Extent, along
from bevel.graph.propagate import Blocks, Handler, Propagation, SizeSite
from bevel.graph.recording import Call, Value


def convolution(state: Propagation, call: Call) -> None:
    """`convolution(x, weight, bias, stride, padding, dilation, transposed, _, groups)`.

    x: (N, C, ...), weight: (O, C/groups, ...), or (C, O/groups, ...) when transposed.
    Output channels are the weight's own; input channels tie to the channels of x.
    """
    x, weight, bias, strides, paddings = call.arguments[:5]
    transposed, groups = bool(call.arguments[6]), int(call.arguments[8])
    mixed = {
        dim
        for dim in range(2, len(x.shape))
        if (weight.shape[dim], _at(strides, dim), _at(paddings, dim)) != (1, 1, 0)
    }
    convolve(state, call, x, weight, bias, groups, mixed, transposed=transposed)


def _at(values: Sequence[int], dim: int) -> int:
    """An option of a spatial dimension; one value stands for all."""
    return int(values[dim - 2] if len(values) > 1 else values[0])


def deformable(state: Propagation, call: Call) -> None:
    """torchvision's `deform_conv2d(x, weight, offset, mask, bias, ...)`: offsets per position."""
    x, weight, offset, mask, bias = call.arguments[:5]
    for value in (offset, mask):
        state.freeze_value(value, f"offsets of a deformable convolution: {call.place}")
    groups = x.shape[1] // weight.shape[1]
    mixed = set(range(2, len(x.shape)))
    convolve(state, call, x, weight, bias, groups, mixed, transposed=False)


def convolve(
    state: Propagation,
    call: Call,
    x: Value,
    weight: Value,
    bias: Value | None,
    groups: int,
    mixed: Set[int],
    *,
    transposed: bool,
) -> None:
    """Couple the input, the weight, the bias and the output of a convolution.

    `mixed` are the spatial dimensions whose positions the kernel mixes.
    """
    output = call.output
    for dim in range(2, len(weight.shape)):
        state.freeze_dim(weight, dim, f"it varies over kernel positions: {call.place}")
        if dim in mixed:
            state.freeze_dim(x, dim, f"it varies over positions: {call.place}")
    reason = f"its layout is not by channel: {call.place}"
    channels = state.ids_along(x, 1, reason)
    others = [
        state.only(layer, (layer.dim,), reason)
        for layer in state.of(x)
        if layer.dim != 1 and layer.dim not in mixed
    ]
    depthwise = False
    if groups == 1:
        filters = _plain(state, call, weight, channels, transposed)
    elif weight.shape[1] == 1 and (not transposed or groups == weight.shape[0]):
        depthwise = True
        filters = _depthwise(state, call, weight, channels, groups)
    elif transposed:
        filters = _grouped_transposed(state, call, weight, channels, groups)
    else:
        filters = _grouped(state, call, weight, channels, groups)
    if isinstance(bias, Value):
        state.adopt(bias, 0, filters, f"fixed: {call.place}")
    layers = [along(layer.vector(), layer.dim, output.shape) for layer in others]
    if filters is not None:
        layers.append(along(filters, 1, output.shape))
    state.set(output, layers)
    positions = x if transposed else output
    spatial = math.prod(positions.shape[2:]) * positions.shape[0]
    lengths = (filters,) if depthwise else (filters, channels)
    rest = [state.extents(layers, layer.dim) for layer in others]
    state.cost(call, float(math.prod(weight.shape)) * spatial, *lengths, *rest)


def _plain(
    state: Propagation, call: Call, weight: Value, channels: Tensor | None, transposed: bool
) -> Tensor | None:
    reason = f"its input has a fixed number of channels: {call.place}"
    state.adopt(weight, 0 if transposed else 1, channels, reason)
    return state.ids_along(weight, 1 if transposed else 0, call.place)


def _depthwise(
    state: Propagation, call: Call, weight: Value, channels: Tensor | None, groups: int
) -> Tensor | None:
    """Filter `i` reads channel `i // multiplier` only, so they go together."""
    multiplier = weight.shape[0] // groups
    reason = f"its input has a fixed number of channels: {call.place}"
    if channels is not None:
        _groups_follow(state, call, groups, channels)
    if multiplier == 1:
        return state.adopt(weight, 0, channels, reason)
    filters = state.ids_along(weight, 0, call.place)
    if filters is not None:
        read = None if channels is None else channels.repeat_interleave(multiplier)
        state.unify(filters, read, reason)
    return filters


def _groups_follow(state: Propagation, call: Call, groups: int, channels: Tensor) -> None:
    """The number of groups is the number of channels: in a conv module, its own attribute."""
    state.expect(groups, channels)
    if isinstance(state.modules.get(call.module), _ConvNd):
        state.sizes.append(SizeSite(call.module, "groups", (Extent(channels.numpy()),)))


def _grouped(
    state: Propagation, call: Call, weight: Value, channels: Tensor | None, groups: int
) -> Tensor | None:
    """Every group keeps equally many filters and equally many input channels."""
    blocks = channels.reshape(groups, -1) if channels is not None else None
    if blocks is not None:
        state.blocks.append(Blocks(blocks.numpy(), call.place))
    if not state.set_grouped_axis(weight, blocks.numpy() if blocks is not None else None):
        _shared_inputs(state, call, weight, blocks)
    filters = state.ids_along(weight, 0, call.place)
    if filters is not None:
        state.blocks.append(Blocks(filters.reshape(groups, -1).numpy(), call.place))
    return filters


def _shared_inputs(state: Propagation, call: Call, weight: Value, blocks: Tensor | None) -> None:
    """A computed weight has one axis of ids for all groups: the same positions go in each."""
    own = state.ids_along(weight, 1, call.place)
    reason = f"its input has a fixed number of channels: {call.place}"
    if own is not None:
        state.tie(blocks, own, reason)
    elif blocks is not None:
        state.freeze(blocks, reason)


def _grouped_transposed(
    state: Propagation, call: Call, weight: Value, channels: Tensor | None, groups: int
) -> Tensor | None:
    """Weight (C, O/groups, ...): position j of its second axis is a filter of every group."""
    reason = f"its input has a fixed number of channels: {call.place}"
    inputs = state.adopt(weight, 0, channels, reason)
    if inputs is not None:
        state.blocks.append(Blocks(inputs.reshape(groups, -1).numpy(), call.place))
    filters = state.fresh(groups * weight.shape[1])
    own = state.ids_along(weight, 1, call.place)
    if own is not None:
        state.tie(filters.reshape(groups, -1), own, call.place)
    else:
        state.freeze(filters, f"grouped transposed convolution: {call.place}")
    return filters


HANDLERS: dict[str, Handler] = {
    "aten.convolution": convolution,
    "aten._convolution": convolution,
    "aten.convolution_overrideable": convolution,
    "torchvision.deform_conv2d": deformable,
}
