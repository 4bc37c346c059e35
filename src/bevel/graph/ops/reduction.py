"""Reductions: an axis that is summed away must keep its length, the others pass through."""

from __future__ import annotations

from typing import cast

from bevel.graph.propagate import Handler, Propagation, varying
from bevel.graph.record import Call, Value


def reduce(state: Propagation, call: Call) -> None:
    """`reduce(x, dims, keepdim)`: a mean over channels would change with the channels."""
    x = call.arguments[0]
    dims = _dims(call, len(x.shape))
    for output in call.outputs:
        if not isinstance(output, Value):
            continue
        layers = []
        for layer in state.of(x):
            if set(varying(layer)) & set(dims):
                state.freeze(layer, f"it is reduced over: {call.place}")
                continue
            for dim in sorted(dims, reverse=True):
                layer = layer.narrow(dim, 0, 1)
                if len(output.shape) < len(x.shape):
                    layer = layer.squeeze(dim)
            layers.append(layer)
        state.set(output, layers)


def over_axis(state: Propagation, call: Call) -> None:
    """`softmax(x, dim)` and the like: every element sees the whole axis, the shape stays."""
    x, dim = call.arguments[0], int(call.arguments[1])
    state.freeze_along(x, dim % len(x.shape), f"it is normalised over: {call.place}")
    state.set(cast(Value, call.outputs[0]), state.of(x))


def _dims(call: Call, ndim: int) -> tuple[int, ...]:
    given = call.arguments[1] if len(call.arguments) > 1 else call.keywords.get("dim")
    if isinstance(given, int):
        return (given % ndim,)
    if isinstance(given, list | tuple) and given:
        return tuple(dim % ndim for dim in given)
    return tuple(range(ndim))


_REDUCE = (
    "mean", "sum", "amax", "amin", "max", "min", "prod", "var", "std", "var_mean", "argmax",
    "any", "all",
)  # fmt: skip
_OVER_AXIS = ("_softmax", "_log_softmax", "softmax", "cumsum")

HANDLERS: dict[str, Handler] = {
    **{f"aten.{name}": reduce for name in _REDUCE},
    **{f"aten.{name}": over_axis for name in _OVER_AXIS},
}
