"""Data movement: the same operator, applied to the layers of ids."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from bevel.graph.propagate import (
    Handler,
    Propagation,
    SizeSite,
    along,
    compact,
    settle,
    varying,
)
from bevel.graph.record import Call, Value


def move(state: Propagation, call: Call) -> None:
    """Run the operator on each layer of its only tensor."""
    source = call.inputs()[0]
    outputs = [output for output in call.outputs if isinstance(output, Value)]
    layers: list[list[Tensor]] = [[] for _ in outputs]
    for layer in state.of(source):
        arguments, keywords = tree_map(
            lambda leaf, layer=layer: layer if isinstance(leaf, Value) else leaf,
            (call.arguments, dict(call.keywords)),
        )
        # A layer's strides differ from its tensor's, so a view of the tensor may need a copy here.
        function = torch.ops.aten.reshape.default if call.name in _VIEWS else call.function
        result = function(*arguments, **keywords)
        moved = result if isinstance(result, tuple | list) else (result,)
        for index, tensor in enumerate(moved):
            settled = settle(tensor)
            if settled is not None:
                layers[index].append(settled)
    for output, own in zip(outputs, layers, strict=True):
        state.set(output, own)


def same(state: Propagation, call: Call) -> None:
    """The output has the elements of the first tensor, in place."""
    source = call.inputs()[0]
    for output in call.outputs:
        if isinstance(output, Value):
            state.set(output, state.of(source) if output.shape == source.shape else [])


def cat(state: Propagation, call: Call) -> None:
    """`cat(tensors, dim)`: ids follow their tensors; a tensor without ids adds fixed elements."""
    parts = [value for value in call.arguments[0] if len(value.shape) > 1 or value.shape != (0,)]
    output = cast(Value, call.outputs[0])
    dim = int(call.arguments[1] if len(call.arguments) > 1 else call.keywords.get("dim", 0))
    dim %= len(output.shape)
    lengthwise = [
        state.ids_along(value, dim, f"its layout is not by channel: {call.place}")
        for value in parts
    ]
    layers = []
    if any(ids is not None for ids in lengthwise):
        joined = torch.cat(
            [
                ids if ids is not None else torch.zeros(value.shape[dim], dtype=torch.long)
                for ids, value in zip(lengthwise, parts, strict=True)
            ]
        )
        layers.append(along(joined, dim, output.shape))
    across: dict[tuple[int, ...], Tensor] = {}
    for value in parts:
        own = {varying(layer): layer for layer in state.of(value) if dim not in varying(layer)}
        for dims, layer in own.items():
            if dims in across:
                state.unify(compact(across[dims]), compact(layer), f"a fixed part: {call.place}")
            across.setdefault(dims, layer)
    for dims, layer in across.items():
        if any(all(varying(other) != dims for other in state.of(value)) for value in parts):
            state.freeze(layer, f"it is joined with a tensor of fixed size: {call.place}")
        layers.append(layer.narrow(dim, 0, 1).expand(output.shape))
    state.set(output, layers)


def pad(state: Propagation, call: Call) -> None:
    """`constant_pad_nd(x, [last_front, last_back, ...], value)`.

    Padding along channels adds channels of a constant. Where the module keeps the two amounts in
    attributes (`channel_padding`), they can shrink as any channel can; else they are fixed.
    """
    x, amounts = call.arguments[0], [int(amount) for amount in call.arguments[1]]
    output = cast(Value, call.outputs[0])
    layers = []
    for layer in state.of(x):
        inner = [d for d in varying(layer) if _amounts(amounts, d, len(x.shape)) != (0, 0)]
        for dim in range(layer.ndim):
            front, back = _amounts(amounts, dim, layer.ndim)
            if dim not in inner:
                layer = layer.narrow(dim, 0, 1).expand(
                    *layer.shape[:dim], output.shape[dim], *layer.shape[dim + 1 :]
                )
            elif varying(layer) == (dim,):
                ids = _padded(state, call, compact(layer).reshape(-1), front, back)
                layer = along(ids, dim, [*layer.shape[:dim], ids.numel(), *layer.shape[dim + 1 :]])
            else:
                state.freeze(layer, f"it is padded: {call.place}")
                return state.set(output, [])
        layers.append(layer)
    return state.set(output, layers)


def _padded(state: Propagation, call: Call, ids: Tensor, front: int, back: int) -> Tensor:
    """The ids with new ones before and after, tied to the module's attributes."""
    new = [state.fresh(front), state.fresh(back)]
    attributes: Any = getattr(state.modules.get(call.module), "channel_padding", None)
    for index, amount in enumerate((front, back)):
        if not amount:
            continue
        if attributes is None:
            state.freeze(new[index], f"a fixed amount of padding: {call.place}")
        else:
            state.sizes.append(SizeSite(call.module, attributes[index], new[index].numpy()))
    return torch.cat([new[0], ids, new[1]])


def _amounts(amounts: list[int], dim: int, ndim: int) -> tuple[int, int]:
    position = 2 * (ndim - 1 - dim)
    return (amounts[position], amounts[position + 1]) if position < len(amounts) else (0, 0)


_VIEWS = ("aten.view", "aten._unsafe_view")
_MOVE = (
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "slice", "select", "split",
    "split_with_sizes", "chunk", "unbind", "expand", "squeeze", "unsqueeze", "flip", "roll",
    "repeat", "flatten", "unflatten", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "native_channel_shuffle", "movedim", "narrow", "diagonal",
)  # fmt: skip
_SAME = (
    "clone", "detach", "alias", "contiguous", "_to_copy", "to", "lift_fresh", "dropout",
    "native_dropout",
)  # fmt: skip

HANDLERS: dict[str, Handler] = {
    **{f"aten.{name}": move for name in _MOVE},
    **{f"aten.{name}": same for name in _SAME},
    "aten.cat": cat,
    "aten.constant_pad_nd": pad,
}
