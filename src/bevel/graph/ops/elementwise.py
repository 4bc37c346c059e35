"""Pointwise operators: elements that meet must go together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bevel.graph.propagate import Handler, Propagation, compact, varying
from bevel.graph.record import Call, Value

Operand = tuple[tuple[int, ...], Sequence[Tensor]]
"""Shape and layers of a tensor."""


def pointwise(state: Propagation, call: Call) -> None:
    """`out[i] = f(x[i], y[i], ...)` with broadcasting.

    The function's value at zero does not matter: whoever reads a removed channel loses the
    weights that read it.
    """
    output = call.outputs[0]
    if not isinstance(output, Value):
        return
    operands = [(value.shape, state.of(value)) for value in call.inputs()]
    state.set(output, combine(state, operands, output.shape, call.place))


def combine(
    state: Propagation, operands: Sequence[Operand], shape: tuple[int, ...], place: str
) -> list[Tensor]:
    """Layers of the elementwise combination of tensors that broadcast to `shape`."""
    merged: dict[tuple[int, ...], Tensor] = {}
    for _, layers in operands:
        for layer in layers:
            wide = _widen(layer, shape)
            dims = varying(wide)
            if dims in merged:
                state.unify(compact(merged[dims]), compact(wide), f"a fixed part meets it: {place}")
            else:
                merged[dims] = wide
    _freeze_mismatches(state, operands, merged, shape, place)
    return list(merged.values())


def _freeze_mismatches(
    state: Propagation,
    operands: Sequence[Operand],
    merged: dict[tuple[int, ...], Tensor],
    shape: tuple[int, ...],
    place: str,
) -> None:
    """Freeze ids that meet a tensor of full length there which cannot shrink with them."""
    for dims, layer in merged.items():
        for own, layers in operands:
            offset = len(shape) - len(own)
            if not any(d >= offset and own[d - offset] > 1 for d in dims):
                continue
            if dims not in [varying(_widen(other, shape)) for other in layers]:
                state.freeze(layer, f"it meets a tensor of fixed size: {place}")
                break


def _widen(layer: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (
        compact(layer)
        .reshape((1,) * (len(shape) - layer.ndim) + compact(layer).shape)
        .expand(shape)
    )


def nothing(state: Propagation, call: Call) -> None:
    """Operators that make new data of a given size: their outputs carry no ids."""
    for output in call.outputs:
        if isinstance(output, Value):
            state.set(output, [])


def copy_into(state: Propagation, call: Call) -> None:
    """`x.copy_(y)` may write into part of a larger tensor: what is written cannot shrink."""
    for value in call.inputs():
        state.freeze_value(value, f"it is copied into a tensor of fixed size: {call.place}")


# Pointwise in effect, though torch does not tag them so.
_POINTWISE = (
    "hardswish", "hardtanh", "relu6", "prelu", "_prelu_kernel", "celu", "softplus", "where",
    "masked_fill", "rrelu_with_noise", "log_sigmoid_forward", "bernoulli",
)  # fmt: skip
_CREATION = (
    "zeros", "ones", "full", "empty", "arange", "rand", "randn", "scalar_tensor", "zeros_like",
    "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "linspace", "eye", "randint", "randperm", "empty_strided",
    "new_empty_strided",
)  # fmt: skip

HANDLERS: dict[str, Handler] = {
    **{f"aten.{name}": pointwise for name in _POINTWISE},
    **{f"aten.{name}": nothing for name in _CREATION},
    "aten.copy_": copy_into,
}
