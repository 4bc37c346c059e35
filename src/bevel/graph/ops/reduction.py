"""Reductions: an axis that is averaged away is inexact, the others pass through."""

from __future__ import annotations

from collections.abc import Callable

from bevel.graph.layers import Layer, widen
from bevel.graph.propagate import Handler, Propagation
from bevel.graph.recording import Call, Value


def reduce(state: Propagation, call: Call) -> None:
    """`reduce(x, dims, keepdim)`: a mean over channels changes with the channels."""
    _reduced(state, call, state.mark_inexact, "a statistic across it")


def positional(state: Propagation, call: Call) -> None:
    """`argmax(x, dim)` and `prod`: the result is a position, or has no meaning with fewer."""
    _reduced(state, call, state.freeze_layer, "it is reduced over")


def _reduced(state: Propagation, call: Call, say: Callable[[Layer, str], None], what: str) -> None:
    """Say what there is to say of the axes that go; the others stay."""
    x = call.arguments[0]
    dims = _dims(call, len(x.shape))
    for layer in state.of(x):
        if layer.dim in dims:
            say(layer, f"{what}: {call.place}")
    for output in call.outputs:
        if not isinstance(output, Value):
            continue
        dropped = len(output.shape) < len(x.shape)
        layers = []
        for layer in state.of(x):
            if layer.dim in dims:
                continue
            ids = layer
            for dim in dims:
                ids = state.uniform(ids, dim, f"it is reduced over: {call.place}")
            small = ids.ids
            for dim in sorted(dims, reverse=True):
                small = small.select(dim, 0) if dropped else small.narrow(dim, 0, 1)
            shift = sum(dim < layer.dim for dim in dims) if dropped else 0
            layers.append(layer.moved(small, layer.dim - shift))
        state.set(output, layers)


def softmax(state: Propagation, call: Call) -> None:
    """`softmax(x, dim)`: what goes leaves more for the rest."""
    _over_axis(state, call, state.mark_inexact, "a statistic across it")


def cumulative(state: Propagation, call: Call) -> None:
    """`cumsum(x, dim)`: every element depends on all before it."""
    _over_axis(state, call, state.freeze_layer, "it is accumulated over")


def _over_axis(
    state: Propagation, call: Call, say: Callable[[Layer, str], None], what: str
) -> None:
    """Every element sees the whole axis, the shape stays."""
    x = call.arguments[0]
    dim = int(call.argument(1, "dim", -1)) % max(len(x.shape), 1)
    for layer in state.of(x):
        if layer.dim == dim:
            say(layer, f"{what}: {call.place}")
    state.set(call.output, state.of(x))


def ranked(state: Propagation, call: Call) -> None:
    """`topk(x, k, dim)`, `sort(x, dim)`: by position along one axis."""
    x = call.arguments[0]
    position = 2 if call.name in ("aten.topk", "aten.kthvalue") else 1
    dim = call.argument(position, "dim", -1)
    dim = int(dim if isinstance(dim, int) and not isinstance(dim, bool) else -1)
    dim %= max(len(x.shape), 1)
    for layer in state.of(x):
        if dim in layer.dims:
            state.freeze_layer(layer, f"it is sorted: {call.place}")
    for output in call.outputs:
        if isinstance(output, Value):
            passed = [layer for layer in state.of(x) if dim not in layer.dims]
            kept = len(output.shape) == len(x.shape)
            state.set(output, [widen(layer, output.shape) for layer in passed] if kept else [])


def _dims(call: Call, ndim: int) -> tuple[int, ...]:
    position = 2 if call.name in ("aten.linalg_vector_norm", "aten.norm") else 1
    given = call.argument(position, "dim")
    if isinstance(given, int) and not isinstance(given, bool) and ndim:
        return (given % ndim,)
    if isinstance(given, list | tuple) and given:
        return tuple(dim % ndim for dim in given)
    return tuple(range(ndim))


_REDUCE = ("mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean",
    "linalg_vector_norm", "norm", "logsumexp", "nansum", "aminmax")  # fmt: skip
_POSITIONAL = ("argmax", "argmin", "prod", "any", "all", "max", "min", "median", "mode",
    "count_nonzero")  # fmt: skip
_SOFTMAX = ("_softmax", "_log_softmax", "softmax", "_safe_softmax")
_CUMULATIVE = ("cumsum", "cumprod", "logcumsumexp")

HANDLERS: dict[str, Handler] = {
    **{f"aten.{name}": reduce for name in _REDUCE},
    **{f"aten.{name}": positional for name in _POSITIONAL},
    **{f"aten.{name}": softmax for name in _SOFTMAX},
    **{f"aten.{name}": cumulative for name in _CUMULATIVE},
    **{f"aten.{name}": ranked for name in ("topk", "sort", "argsort", "kthvalue", "msort")},
}
