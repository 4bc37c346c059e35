"""Fused attention kernels: as `softmax(q k^T * scale) v`, head by head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.nn import functional as F

from bevel.graph.layers import Layer
from bevel.graph.ops.elementwise import combine
from bevel.graph.ops.movement import join
from bevel.graph.propagate import FrameHandler, Handler, Propagation
from bevel.graph.record import Call, Frame, Value


def attention(state: Propagation, call: Call) -> None:
    """`attention(q, k, v, ...)`: q (..., M, D), k (..., N, D), v (..., N, E) -> (..., M, E)."""
    q, k, v = call.arguments[:3]
    output = call.output
    k, v = (_grouped(state, value, q) for value in (k, v))
    last = len(output.shape) - 1
    place = call.place
    _inner(state, call, q, k)
    lead: list[Layer] = []
    operands = []
    for value, keep in ((q, last - 1), (k, None), (v, last)):
        layers = _outer(state, call, value, keep, last)
        operands.append((tuple(_lead(value, keep, last)), layers))
    lead = combine(state, operands, output.shape, place)
    for value in call.inputs()[3:]:
        lead = _mask(state, lead, value, output, place)
    _cost(state, call, q, k, v, lead)
    for position, result in enumerate(call.outputs):
        if isinstance(result, Value):
            state.set(result, lead if position == 0 else [])


def _grouped(state: Propagation, value: Value, q: Value) -> Value:
    """Grouped queries: each head of k and v serves several of q, as if it were repeated."""
    if len(q.shape) < 4 or value.shape[-3] in (1, q.shape[-3]):
        return value
    dim = len(q.shape) - 3
    times = q.shape[dim] // value.shape[dim]
    shape = (*value.shape[:dim], q.shape[dim], *value.shape[dim + 1 :])
    wide = Value(-1 - value.index, shape)
    layers = []
    for layer in state.of(value):
        small = layer.compact()
        if dim in layer.dims:
            small = small.repeat_interleave(times, dim)
        layers.append(layer.moved(small.expand(shape), layer.dim))
    state.set(wide, layers)
    return wide


def _inner(state: Propagation, call: Call, q: Value, k: Value) -> None:
    """The contracted axis of q and k."""
    last = len(q.shape) - 1
    reason = f"the other side of the attention has a fixed size: {call.place}"
    left = [state.uniform(x, last - 1, reason) for x in state.on(q, last)]
    right = [state.uniform(x, last - 1, reason) for x in state.on(k, last)]
    if len(left) != len(right):
        for layer in (*left, *right):
            state.freeze_layer(layer, reason)
        return
    if state.zeros.summed(q, k):
        for layer in (*left, *right):
            state.mark_inexact(layer, f"what is left of it is summed: {call.place}")
    for a, b in zip(left, right, strict=True):
        a = a.moved(a.ids.narrow(last - 1, 0, 1), last)
        b = b.moved(b.ids.narrow(last - 1, 0, 1), last)
        join(state, a, b, reason)


def _outer(
    state: Propagation, call: Call, value: Value, keep: int | None, last: int
) -> Sequence[Layer]:
    """The layers of a tensor that the output has: its leading axes, and one of the last two."""
    layers = []
    for layer in state.of(value):
        if layer.dim in (last - 1, last) and layer.dim != keep:
            if layer.dim == last - 1:
                state.freeze_layer(layer, f"it varies over positions: {call.place}")
            continue
        for dim in (last - 1, last):
            if dim != keep and dim in layer.dims:
                layer = state.uniform(layer, dim, f"its layout is not by head: {call.place}")
        ids = layer.ids
        for dim in (last - 1, last):
            if dim != keep:
                ids = ids.narrow(dim, 0, 1)
        layers.append(layer.moved(ids, layer.dim))
    return layers


def _lead(value: Value, keep: int | None, last: int) -> list[int]:
    return [n if dim < last - 1 or dim == keep else 1 for dim, n in enumerate(value.shape)]


def _mask(
    state: Propagation, lead: list[Layer], mask: Value, output: Value, place: str
) -> list[Layer]:
    """A mask or bias (..., M, N) meets the leading axes only."""
    last = len(output.shape) - 1
    own = []
    offset = len(output.shape) - len(mask.shape)
    for layer in state.of(mask):
        if layer.dim + offset >= last - 1:
            state.freeze_layer(layer, f"it varies over positions: {place}")
            continue
        ids = layer.ids.narrow(-1, 0, 1)
        ids = ids.narrow(-2, 0, 1) if ids.ndim > 1 else ids
        own.append(layer.moved(ids, layer.dim))
    shape = (*mask.shape[:-2], 1, 1)
    return combine(state, [(output.shape, lead), (shape, own)], output.shape, place)


def _cost(
    state: Propagation, call: Call, q: Value, k: Value, v: Value, lead: Sequence[Layer]
) -> None:
    """`q k^T` costs M N D per head, the product with v M N E."""
    last = len(q.shape) - 1
    heads = [state.extents([x], x.dim) for x in lead if x.dim < last - 1]
    inner = state.extents(state.of(q), last)
    outer = state.extents(lead, last)
    batch = math.prod(call.output.shape[:-2]) * q.shape[-2] * k.shape[-2]
    state.cost(call, float(batch * q.shape[-1]), *heads, inner)
    state.cost(call, float(batch * v.shape[-1]), *heads, outer)


def scaled(state: Propagation, frame: Frame) -> None:
    """`scaled_dot_product_attention` without a scale of its own divides by sqrt(D)."""
    if frame.keyword("scale") is not None:
        return
    q = frame.arguments[0]
    for layer in state.on(q, len(q.shape) - 1):
        place = frame.module or "the network itself"
        state.mark_inexact(layer, f"the scale depends on it: attention in {place}")


FRAME_HANDLERS: dict[Callable[..., Any], FrameHandler] = {F.scaled_dot_product_attention: scaled}

HANDLERS: dict[str, Handler] = {
    f"aten.{name}": attention
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "scaled_dot_product_attention",
        "_scaled_dot_product_attention_math",
    )
}
