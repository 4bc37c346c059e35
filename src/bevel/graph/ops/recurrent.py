"""Recurrent layers that run as one kernel."""

from __future__ import annotations

from bevel.graph.layers import along
from bevel.graph.propagate import Handler, Propagation
from bevel.graph.recording import Call, Value


def recurrent(state: Propagation, call: Call) -> None:
    """`mkldnn_rnn_layer(x, w_input, w_hidden, b_input, b_hidden, h, c, reverse, sizes, mode, ...)`.

    x: (T, N, I); weights (gates * H, I) and (gates * H, H); output (T, N, H). A hidden unit is
    one row of each gate, and one column of the hidden weights.
    """
    x, w_input, w_hidden, b_input, b_hidden, hidden, cell = call.arguments[:7]
    size = int(call.arguments[10])
    gates = w_hidden.shape[0] // size
    last = len(x.shape) - 1
    reason = f"its input has a fixed size: {call.place}"
    inputs = state.ids_along(x, last, reason)
    for dim in range(last):
        state.freeze_dim(x, dim, f"it varies over time: {call.place}")
    state.adopt(w_input, 1, inputs, reason)
    units = state.fresh(size)
    rows = units.repeat(gates)
    for value, dim, ids in (
        (w_input, 0, rows), (w_hidden, 0, rows), (w_hidden, 1, units),
        (b_input, 0, rows), (b_hidden, 0, rows),
    ):  # fmt: skip
        if isinstance(value, Value):
            state.adopt(value, dim, ids, call.place)
    for value in (hidden, cell):  # the first state: zeros of any size, or given from outside
        first = state.ids_along(value, len(value.shape) - 1, call.place)
        state.unify(units, first, f"the first state has a fixed size: {call.place}")
    steps = x.shape[0] * x.shape[1]
    state.cost(call, float(steps * gates * size * x.shape[-1]), units, inputs)
    state.cost(call, float(steps * gates * size * size), units, units)
    for output in call.outputs:
        if isinstance(output, Value) and output.shape and output.shape[-1] == size:
            state.set(output, [along(units, len(output.shape) - 1, output.shape)])


HANDLERS: dict[str, Handler] = {"aten.mkldnn_rnn_layer": recurrent}
