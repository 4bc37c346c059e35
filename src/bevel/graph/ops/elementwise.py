"""Pointwise operators: elements that meet must go together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bevel.graph.layers import Layer, widen
from bevel.graph.ops.movement import repeated
from bevel.graph.propagate import Handler, Propagation
from bevel.graph.recording import Call, Value

Operand = tuple[tuple[int, ...], Sequence[Layer]]
"""Shape and layers of a tensor."""


def pointwise(state: Propagation, call: Call) -> None:
    """`out[i] = f(x[i], y[i], ...)` with broadcasting.

    The function's value at zero does not matter: whoever reads a removed channel loses the
    weights that read it.
    """
    values = call.inputs
    outputs = [output for output in call.outputs if isinstance(output, Value)]
    if not outputs:
        return
    shape = outputs[0].shape
    if len(values) == 1 and values[0].shape == shape:
        layers: Sequence[Layer] = state.of(values[0])
    else:
        operands = [(value.shape, state.of(value)) for value in values]
        layers = combine(state, operands, shape, call.place)
    for output in outputs:
        state.set(output, layers)


def combine(
    state: Propagation, operands: Sequence[Operand], shape: tuple[int, ...], place: str
) -> list[Layer]:
    """Layers of the elementwise combination of tensors that broadcast to `shape`."""
    wide = [
        [layer if own == shape else widen(layer, shape) for layer in layers]
        for own, layers in operands
    ]
    result: list[Layer] = []
    for dim in range(len(shape)):
        if shape[dim] == 1:
            continue
        lengths = [_size(own, dim - len(shape)) for own, _ in operands]
        mine = [
            [layer for layer in layers if layer.dim == dim]
            for layers, length in zip(wide, lengths, strict=True)
            if length > 1
        ]
        result += _meet(state, mine, place)
    return result


def _size(shape: tuple[int, ...], dim: int) -> int:
    """The length of a dimension counted from the last; 1 where there is none."""
    return shape[dim] if -dim <= len(shape) else 1


def _meet(state: Propagation, own: Sequence[Sequence[Layer]], place: str) -> list[Layer]:
    """Join the layers of one dimension over all operands that have its full length."""
    found: Sequence[Layer] = max(own, key=_detail) if own else ()
    if not found:
        return []
    for layers in own:
        if layers is found:
            continue
        if len(layers) != len(found):
            for layer in (*found, *layers):
                state.freeze_layer(layer, f"it meets a tensor of fixed size: {place}")
            continue
        for a, b in zip(found, layers, strict=True):
            state.join(a, b, f"a fixed part meets it: {place}")
    if any(layer.virtual for layer in found):
        real = [layers for layers in own if layers and not any(x.virtual for x in layers)]
        return list(max(real, key=_detail) if real else found)
    return list(found)


def _detail(layers: Iterable[Layer]) -> tuple[int, int]:
    dims = [len(layer.dims) for layer in layers]
    return len(dims), max(dims, default=0)


def glu(state: Propagation, call: Call) -> None:
    """`glu(x, dim)`: the first half times the sigmoid of the second; equal indices go."""
    x, output = call.arguments[0], call.output
    dim = int(call.argument(1, "dim", -1)) % len(x.shape)
    halves: list[list[Layer]] = [[], []]
    for layer in state.of(x):
        if layer.dim != dim and dim in layer.dims:
            layer = state.uniform(layer, dim, f"its halves meet: {call.place}")
        for half, ids in zip(halves, layer.ids.chunk(2, dim), strict=True):
            half.append(layer.moved(ids, layer.dim))
    operands = [(output.shape, half) for half in halves]
    state.set(output, combine(state, operands, output.shape, call.place))


def constant(state: Propagation, call: Call) -> None:
    """Operators that fill a new tensor with one value: it can have any length."""
    output = call.output
    if output.data is not None or len(output.shape) < 2:
        return state.set(output, [])
    return state.set(output, repeated(state, (), output.shape))


def like(state: Propagation, call: Call) -> None:
    """`zeros_like(x)`: as long as x everywhere."""
    source = call.inputs[0]
    state.set(call.output, state.of(source) if source.shape == call.output.shape else [])


def nothing(state: Propagation, call: Call) -> None:
    """Operators that make new data by position: their outputs carry no ids."""
    state.set_outputs(call)


# Pointwise in effect, though torch does not tag them so. `x.copy_(y)` is: x, or the part of a
# larger tensor that x is, has the elements of y.
_POINTWISE = (
    "hardswish", "hardtanh", "relu6", "prelu", "_prelu_kernel", "celu", "softplus", "where",
    "masked_fill", "rrelu_with_noise", "log_sigmoid_forward", "bernoulli", "lerp", "addcmul",
    "addcdiv", "floor_divide", "fake_quantize_per_tensor_affine", "glu_jvp", "copy",
    "dequantize",
)  # fmt: skip
_CONSTANT = ("zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones",
    "new_full", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted")  # fmt: skip
_LIKE = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
_NOTHING = ("arange", "scalar_tensor", "linspace", "eye", "randint", "randperm", "tril_indices",
    "triu_indices", "_local_scalar_dense", "logspace")  # fmt: skip

HANDLERS: dict[str, Handler] = {
    **{f"aten.{name}": pointwise for name in _POINTWISE},
    **{f"aten.{name}": constant for name in _CONSTANT},
    **{f"aten.{name}": like for name in _LIKE},
    **{f"aten.{name}": nothing for name in _NOTHING},
    "aten.glu": glu,
    **{f"aten.{name}": like for name in ("uniform_", "normal_", "fill", "zero",
        "bernoulli_", "random_", "exponential_")},
}  # fmt: skip
