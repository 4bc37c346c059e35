"""Normalisations: by channel, which prune exactly, and across channels, which do not.

A statistic over channels changes with the channels that are left, so removing some is not the
same as setting them to zero: such ids are marked inexact.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from bevel.graph.layers import Extent, Layer
from bevel.graph.ops.elementwise import combine
from bevel.graph.propagate import Blocks, Handler, Propagation, SizeSite
from bevel.graph.recording import Call, Value


def batch_norm(state: Propagation, call: Call) -> None:
    """`batch_norm(x, weight, bias, running_mean, running_var, ...)`, x of shape (N, C, ...).

    With statistics of the batch itself (instance norm, standardised weights), axes other than
    the channels are averaged over.
    """
    x = call.arguments[0]
    channels = state.ids_along(x, 1, f"its layout is not by channel: {call.place}")
    for value in call.arguments[1:5]:
        if isinstance(value, Value):
            state.adopt(value, 0, channels, f"its input has a fixed size: {call.place}")
    layers = state.of(x)
    for layer in layers:
        if layer.dim != 1 and not isinstance(call.arguments[3], Value):
            state.mark_inexact(layer, f"a statistic across it: {call.place}")
    state.set(call.output, layers)


def layer_norm(state: Propagation, call: Call) -> None:
    """`native_layer_norm(x, normalized_shape, weight, bias, eps)`: over the last dimensions."""
    x, shape = call.arguments[0], call.arguments[1]
    affine = [value for value in call.arguments[2:4] if isinstance(value, Value)]
    _over_last(state, call, x, len(shape), affine)


def rms_norm(state: Propagation, call: Call) -> None:
    """`_fused_rms_norm(x, normalized_shape, weight, eps)`."""
    x, shape, weight = call.arguments[:3]
    _over_last(state, call, x, len(shape), [weight] if isinstance(weight, Value) else [])


def _over_last(
    state: Propagation, call: Call, x: Value, count: int, affine: Sequence[Value]
) -> None:
    first = len(x.shape) - count
    layers: list[Layer] = []
    for layer in state.of(x):
        layers.append(layer)
        if layer.dim >= first:
            state.mark_inexact(layer, f"a statistic across it: {call.place}")
            if layer.flat:
                state.expect(x.shape[layer.dim], layer.vector())
                if isinstance(state.modules.get(call.module), nn.LayerNorm | nn.RMSNorm):
                    path = f"normalized_shape[{layer.dim - first}]"
                    extents = (Extent(layer.vector().numpy()),)
                    state.sizes.append(SizeSite(call.module, path, extents))
    if count == 1 and len(own := [x for x in layers if x.dim == first]) == 1 and own[0].flat:
        for value in affine:
            state.adopt(value, 0, own[0].vector(), f"fixed: {call.place}")
    elif affine:
        operands = [(x.shape, layers), *((value.shape, state.of(value)) for value in affine)]
        layers = combine(state, operands, x.shape, call.place)
    state.set_outputs(call, layers)


def group_norm(state: Propagation, call: Call) -> None:
    """`native_group_norm(x, weight, bias, N, C, HxW, groups, eps)`: equal counts per group."""
    x, weight, bias = call.arguments[:3]
    groups = int(call.arguments[6])
    reason = f"its layout is not by channel: {call.place}"
    channels = state.ids_along(x, 1, reason)
    for value in (weight, bias):
        if isinstance(value, Value):
            state.adopt(value, 0, channels, f"its input has a fixed size: {call.place}")
    for layer in state.of(x):
        if layer.dim == 1:
            state.mark_inexact(layer, f"a statistic across it: {call.place}")
        elif layer.dim > 1:
            state.freeze_layer(layer, f"a statistic across it: {call.place}")
    if channels is not None and groups > 1:
        state.blocks.append(Blocks(channels.reshape(groups, -1).numpy(), call.place))
    state.set_outputs(call, state.of(x))


def weight_norm(state: Propagation, call: Call) -> None:
    """`_weight_norm_interface(v, g, dim)`: the norm of what is left; zeros do not count."""
    v, g = call.arguments[:2]
    output = call.output
    operands = [(v.shape, state.of(v)), (g.shape, state.of(g))]
    state.set_outputs(call, combine(state, operands, output.shape, call.place))


HANDLERS: dict[str, Handler] = {
    **{
        f"aten.{name}": batch_norm
        for name in (
            "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm",
            "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
            "_batch_norm_no_update", "_batch_norm_with_update", "batch_norm",
        )
    },
    "aten.native_layer_norm": layer_norm,
    "aten._fused_rms_norm": rms_norm,
    "aten.native_group_norm": group_norm,
    "aten._weight_norm_interface": weight_norm,
}  # fmt: skip
