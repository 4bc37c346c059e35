"""Matrix products: the contracted axis ties, the outer axes pass through."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bevel.graph.layers import Extent, Layer, along, widen
from bevel.graph.ops.elementwise import combine
from bevel.graph.propagate import Handler, Propagation
from bevel.graph.recording import Call, Value


def mm(state: Propagation, call: Call) -> None:
    """`a @ b` for matrices, or batches of matrices with equal batch shape."""
    a, b = call.arguments[:2]
    if len(b.shape) == 1:
        return _vector(state, call, a, b)
    return state.set(call.output, contract(state, call, a, b, call.output.shape))


def _vector(state: Propagation, call: Call, a: Value, b: Value) -> None:
    """`mv`, `dot`: the vector's axis is contracted."""
    reason = f"its layout is not by channel: {call.place}"
    dim = len(a.shape) - 1
    left, right = state.ids_along(a, dim, reason), state.ids_along(b, 0, reason)
    state.unify(left, right, f"the other side of the product has a fixed size: {call.place}")
    layers = _others(state, a, dim, reason)
    state.cost(call, math.prod(a.shape), left)
    state.set(call.output, [layer.moved(layer.ids.select(dim, 0), layer.dim) for layer in layers])


def addmm(state: Propagation, call: Call) -> None:
    """`bias + a @ b`; the bias broadcasts over the rows."""
    bias, a, b = call.arguments[:3]
    output = call.output
    product = contract(state, call, a, b, output.shape)
    state.set(output, _plus(state, call, product, bias, output))


def linear(state: Propagation, call: Call) -> None:
    """`x @ weight.T + bias`, x of shape (..., K), weight of shape (N, K)."""
    x, weight = call.arguments[:2]
    bias = call.argument(2, "bias")
    output = call.output
    last = len(x.shape) - 1
    reason = f"its layout is not by channel: {call.place}"
    own = state.ids_along(x, last, reason)
    inner = state.adopt(weight, 1, own, f"its input has a fixed size: {call.place}")
    filters = state.ids_along(weight, 0, call.place)
    layers = [widen(layer, output.shape) for layer in _others(state, x, last, reason)]
    macs = math.prod(weight.shape) * math.prod(x.shape[:-1])
    state.cost(call, macs, inner, filters, *_outer(state, layers))
    if filters is not None:
        layers.append(along(filters, last, output.shape))
    state.set(output, layers if bias is None else _plus(state, call, layers, bias, output))


def _plus(
    state: Propagation, call: Call, product: Sequence[Layer], bias: Value, output: Value
) -> list[Layer]:
    last = len(output.shape) - 1
    columns = [layer for layer in product if layer.dim == last]
    if len(bias.shape) == 1 and len(columns) == 1 and columns[0].flat:
        state.adopt(bias, 0, columns[0].vector(), f"fixed: {call.place}")
        return list(product)
    operands = [(output.shape, product), (bias.shape, state.of(bias))]
    return combine(state, operands, output.shape, call.place)


def contract(
    state: Propagation, call: Call, a: Value, b: Value, shape: tuple[int, ...]
) -> list[Layer]:
    """Layers of `a @ b`, which has this shape, and the cost of computing it.

    a: (..., M, K), b: (..., K, N).
    """
    row, column = len(shape) - 1, len(shape) - 2  # the contracted dimension of a and of b
    contracted(state, call, a, b, (row, column))
    reason = f"its layout is not by channel: {call.place}"
    left, right = (
        [
            layer.moved(layer.ids.narrow(dim, 0, 1), layer.dim)
            for layer in _others(state, value, dim, reason)
        ]
        for value, dim in ((a, row), (b, column))
    )
    operands = [((*shape[:-1], 1), left), ((*shape[:-2], 1, shape[-1]), right)]
    layers = combine(state, operands, shape, call.place)
    inner = [layer for layer in state.of(a) if layer.dim == row]
    state.cost(
        call, math.prod(shape) * a.shape[-1], state.extents(inner, row), *_outer(state, layers)
    )
    return layers


def _others(state: Propagation, value: Value, dim: int, reason: str) -> list[Layer]:
    """The layers of the other dimensions, the same all along the contracted one."""
    return [state.uniform(layer, dim, reason) for layer in state.of(value) if layer.dim != dim]


def _outer(state: Propagation, layers: Sequence[Layer]) -> list[tuple[Extent, ...]]:
    """The output's axes that can shrink: the cost is in proportion to each."""
    return [state.extents([layer], layer.dim) for layer in layers if not layer.virtual]


def contracted(state: Propagation, call: Call, a: Value, b: Value, dims: tuple[int, int]) -> None:
    """These two axes are summed over: they have the same indices, in every matrix of the batch."""
    reason = f"the other side of the product has a fixed size: {call.place}"
    left, right = (
        _every_row(state, value, dim, reason) for value, dim in zip((a, b), dims, strict=True)
    )
    if len(left) != len(right):
        for layer in (*left, *right):
            state.freeze_layer(layer, reason)
        return
    if state.zeros.summed(a, b):
        for layer in (*left, *right):
            state.mark_inexact(layer, f"what is left of it is summed: {call.place}")
    for x, y in zip(left, right, strict=True):
        state.join(x, y, reason)


def _every_row(state: Propagation, value: Value, dim: int, reason: str) -> list[Layer]:
    """The layers of one of the last two axes, as (..., K): the same along the other one."""
    last = len(value.shape) - 1
    other = last - 1 if dim == last else last
    return [
        layer.moved(state.uniform(layer, other, reason).ids.select(other, 0), last - 1)
        for layer in state.on(value, dim)
    ]


HANDLERS: dict[str, Handler] = {
    "aten.mm": mm,
    "aten.bmm": mm,
    "aten.mv": mm,
    "aten.dot": mm,
    "aten.addmm": addmm,
    "aten.baddbmm": addmm,
    "aten.addbmm": addmm,
    "aten.linear": linear,
}
