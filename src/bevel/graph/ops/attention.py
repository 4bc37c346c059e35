"""Fused attention kernels: as `softmax(q k^T * scale) v`, head by head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.nn import functional as F

from bevel.graph.layers import Layer, compact
from bevel.graph.ops.elementwise import Operand, combine
from bevel.graph.ops.matmul import contracted
from bevel.graph.propagate import FrameHandler, Handler, Propagation
from bevel.graph.recording import Call, Frame, Value


def attention(state: Propagation, call: Call) -> None:
    """`attention(q, k, v, ...)`: q (..., M, D), k (..., N, D), v (..., N, E) -> (..., M, E)."""
    q, k, v = call.arguments[:3]
    output = call.output
    k, v = (_grouped(state, value, q) for value in (k, v))
    last = len(output.shape) - 1
    contracted(state, call, q, k, (last, last))
    operands = [_outer(state, call, x, keep) for x, keep in ((q, last - 1), (k, None), (v, last))]
    layers = combine(state, operands, output.shape, call.place)
    for mask in call.inputs[3:]:
        layers = _masked(state, call, layers, mask)
    _cost(state, call, q, k, v, layers)
    state.set_outputs(call, layers)


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
    if value.index in state.zeros.bent:
        state.zeros.bent.add(wide.index)
    return wide


def _outer(state: Propagation, call: Call, value: Value, keep: int | None) -> Operand:
    """What the output has of a tensor: its leading axes, and `keep` of the last two."""
    positions = len(value.shape) - 2
    kept = [dim for dim in range(len(value.shape)) if dim < positions or dim == keep]
    layers = []
    for layer in state.of(value):
        if layer.dim in kept:
            layer = state.only(layer, kept, f"its layout is not by head: {call.place}")
            layers.append(layer.moved(compact(layer.ids, kept), layer.dim))
        elif layer.dim == positions:
            state.freeze_layer(layer, f"it varies over positions: {call.place}")
    return tuple(n if dim in kept else 1 for dim, n in enumerate(value.shape)), layers


def _masked(state: Propagation, call: Call, layers: Sequence[Layer], mask: Value) -> list[Layer]:
    """A mask or bias (..., M, N) meets the leading axes only."""
    shape = call.output.shape
    operands = [(shape, layers), _outer(state, call, mask, None)]
    state.freeze_dim(mask, len(mask.shape) - 1, f"it varies over positions: {call.place}")
    return combine(state, operands, shape, call.place)


def _cost(
    state: Propagation, call: Call, q: Value, k: Value, v: Value, layers: Sequence[Layer]
) -> None:
    """`q k^T` costs M N D per head, the product with v M N E."""
    last = len(q.shape) - 1
    heads = [state.extents([x], x.dim) for x in layers if x.dim < last - 1]
    inner = state.extents(state.of(q), last)
    outer = state.extents(layers, last)
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
