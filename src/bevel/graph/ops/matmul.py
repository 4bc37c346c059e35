"""Matrix products: the contracted axis ties, the outer axes pass through."""

from __future__ import annotations

import math
from typing import cast

from torch import Tensor

from bevel.graph.ops.elementwise import combine
from bevel.graph.propagate import FIXED, Handler, Propagation, along, compact, varying
from bevel.graph.record import Call, Value


def mm(state: Propagation, call: Call) -> None:
    """`a @ b` for matrices, or batches of matrices with equal batch shape."""
    output = cast(Value, call.outputs[0])
    state.set(output, contract(state, call, call.arguments[0], call.arguments[1], output.shape))


def addmm(state: Propagation, call: Call) -> None:
    """`bias + a @ b`; the bias broadcasts over the rows."""
    bias, a, b = call.arguments[:3]
    output = cast(Value, call.outputs[0])
    product = contract(state, call, a, b, output.shape)
    operands = [(output.shape, product), (bias.shape, state.of(bias))]
    state.set(output, combine(state, operands, output.shape, call.place))


def linear(state: Propagation, call: Call) -> None:
    """`x @ weight.T + bias`, x of shape (..., K), weight of shape (N, K)."""
    x, weight = call.arguments[:2]
    output = cast(Value, call.outputs[0])
    last = len(x.shape) - 1
    inner = state.ids_along(x, last, f"its layout is not by channel: {call.place}")
    _tie(state, call, inner, state.ids_along(weight, 1, call.place))
    filters = state.ids_along(weight, 0, call.place)
    layers = [
        _without(layer, last).expand(output.shape)
        for layer in state.of(x)
        if last not in varying(layer)
    ]
    if filters is not None:
        layers.append(along(filters, last, output.shape))
    _cost(state, call, inner, filters, math.prod(weight.shape) * math.prod(x.shape[:-1]))
    bias = call.arguments[2] if len(call.arguments) > 2 else None
    if isinstance(bias, Value):
        operands = [(output.shape, layers), (bias.shape, state.of(bias))]
        layers = combine(state, operands, output.shape, call.place)
    state.set(output, layers)


def contract(
    state: Propagation, call: Call, a: Value, b: Value, shape: tuple[int, ...]
) -> list[Tensor]:
    """Layers of `a @ b`, which has this shape, and the cost of computing it."""
    reason = f"its layout is not by channel: {call.place}"
    row, column = len(shape) - 1, len(shape) - 2  # the contracted dimension of a and of b
    inner = state.ids_along(a, row, reason)
    _tie(state, call, inner, state.ids_along(b, column, reason))
    left = [_without(layer, row) for layer in state.of(a) if row not in varying(layer)]
    right = [_without(layer, column) for layer in state.of(b) if column not in varying(layer)]
    operands = [((*shape[:-1], 1), left), ((*shape[:-2], 1, shape[-1]), right)]
    layers = combine(state, operands, shape, call.place)
    columns = [compact(layer).reshape(-1) for layer in layers if varying(layer) == (row,)]
    macs = math.prod(shape) * a.shape[-1]
    _cost(state, call, inner, columns[0] if columns else None, macs)
    return layers


def _tie(state: Propagation, call: Call, left: Tensor | None, right: Tensor | None) -> None:
    if left is None and right is None:
        return
    reason = f"the other side of the product has a fixed size: {call.place}"
    state.unify(FIXED if left is None else left, FIXED if right is None else right, reason)


def _without(layer: Tensor, dim: int) -> Tensor:
    """The layer with a dimension along which it is constant cut to length 1."""
    return layer.narrow(dim, 0, 1)


def _cost(
    state: Propagation,
    call: Call,
    inner: Tensor | None,
    columns: Tensor | None,
    macs: int,
) -> None:
    lengths = [ids for ids in (inner, columns) if ids is not None]
    state.cost(call, macs / math.prod(ids.numel() for ids in lengths), *lengths)


HANDLERS: dict[str, Handler] = {
    "aten.mm": mm,
    "aten.bmm": mm,
    "aten.addmm": addmm,
    "aten.linear": linear,
}
