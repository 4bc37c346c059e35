"""Pooling, resampling and windows: positions change, channels stay."""

from __future__ import annotations

import math

from torch import Tensor

from bevel.graph.layers import Layer, along, widen
from bevel.graph.propagate import Handler, Propagation
from bevel.graph.recording import Call, Value


def pool(state: Propagation, call: Call) -> None:
    """Every output (N, C, ...) has the channels of the first input (N, C, ...)."""
    x = call.arguments[0]
    for output in call.outputs:
        if isinstance(output, Value):
            state.set(output, _resized(state, call, x, output))


def _resized(state: Propagation, call: Call, x: Value, output: Value) -> list[Layer]:
    """The layers at the output's positions; positions that are pooled must not shrink."""
    result = []
    # Every kernel works on the last dimensions; what is before them passes through.
    first = 0
    while first < 2 and x.shape[: first + 1] == output.shape[: first + 1]:
        first += 1
    for layer in state.of(x):
        if layer.dim >= first:
            state.freeze_layer(layer, f"it varies over pooled positions: {call.place}")
            continue
        for dim in layer.dims:
            if dim >= first:
                layer = state.uniform(layer, dim, f"it is pooled over: {call.place}")
        result.append(widen(layer, output.shape))
    return result


def by_channel(state: Propagation, call: Call) -> None:
    """`grid_sampler(x, grid)`, `roi_align(x, boxes)`: channels of x at other positions."""
    for value in call.inputs[1:]:
        state.freeze_value(value, f"positions to sample at: {call.place}")
    _set_channels(state, call, 1, _channels(state, call, 1))


def _channels(state: Propagation, call: Call, dim: int) -> Tensor | None:
    """The ids of the first input's channels; its other axes must not shrink."""
    x = call.arguments[0]
    channels = state.ids_along(x, dim, f"its layout is not by channel: {call.place}")
    for layer in state.of(x):
        if layer.dim != dim:
            state.freeze_layer(layer, f"it varies over positions: {call.place}")
    return channels


def _set_channels(state: Propagation, call: Call, dim: int, channels: Tensor | None) -> None:
    """Only the channels of the output can shrink."""
    shape = call.output.shape
    state.set(call.output, [] if channels is None else [along(channels, dim, shape)])


def windows(state: Propagation, call: Call) -> None:
    """`im2col(x, kernel, ...)`: (N, C, H, W) -> (N, C * kernel, positions)."""
    _spread(state, call, math.prod(int(k) for k in call.arguments[1]))


def pixel_unshuffle(state: Propagation, call: Call) -> None:
    """`pixel_unshuffle(x, r)`: (N, C, H r, W r) -> (N, C r r, H, W)."""
    _spread(state, call, int(call.arguments[1]) ** 2)


def _spread(state: Propagation, call: Call, area: int) -> None:
    """Positions become channels: `area` of them, behind each other, are one of x (..., C, H, W)."""
    dim = len(call.arguments[0].shape) - 3
    channels = _channels(state, call, dim)
    spread = None if channels is None else channels.repeat_interleave(area)
    _set_channels(state, call, dim, spread)


def unwindow(state: Propagation, call: Call) -> None:
    """`col2im(x, size, kernel, ...)`: (N, C * kernel, positions) -> (N, C, H, W)."""
    _gathered(state, call, math.prod(int(k) for k in call.arguments[2]), "a part of a window")


def pixel_shuffle(state: Propagation, call: Call) -> None:
    """`pixel_shuffle(x, r)`: (N, C r r, H, W) -> (N, C, H r, W r)."""
    _gathered(state, call, int(call.arguments[1]) ** 2, "a part of a pixel")


def _gathered(state: Propagation, call: Call, area: int, part: str) -> None:
    """Channels become positions: `area` of them, behind each other, go together."""
    dim = len(call.output.shape) - 3
    channels = _channels(state, call, dim)
    if channels is not None:
        runs = channels.reshape(-1, area)
        state.freeze(runs, f"{part}: {call.place}", level=True)
        channels = state.node_ids(runs, len(runs))
    _set_channels(state, call, dim, channels)


def average(state: Propagation, call: Call) -> None:
    """`avg_pool2d/3d`; with windows (k, 1, ...) it is local response norm's mean of neighbours."""
    x, output = call.arguments[0], call.output
    kernel = [int(k) for k in call.arguments[1]]
    dim = len(x.shape) - len(kernel)
    if kernel[0] == 1 or len(kernel) == 1 or any(k != 1 for k in kernel[1:]):
        return pool(state, call)
    layers = []
    for layer in state.of(x):
        if layer.dim == dim and layer.flat and x.shape[dim] - kernel[0] + 1 == output.shape[dim]:
            state.mark_inexact(layer, f"a statistic across neighbours: {call.place}")
            middle = layer.vector()[kernel[0] // 2 :][: output.shape[dim]]
            layers.append(along(middle, dim, output.shape))
        elif layer.dim == dim or dim in layer.dims:
            state.freeze_layer(layer, f"it varies over pooled positions: {call.place}")
        else:
            layers.append(widen(layer, output.shape))
    return state.set(output, layers)


_POOL = (
    "max_pool1d", "max_pool2d", "max_pool3d",
    "max_pool2d_with_indices", "max_pool3d_with_indices", "mkldnn_max_pool2d",
    "avg_pool1d", "adaptive_max_pool1d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample_linear1d",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d",
)  # fmt: skip
_BY_CHANNEL = (
    "aten.grid_sampler_2d", "aten.grid_sampler_3d", "torchvision.roi_align",
    "torchvision.roi_pool", "aten.grid_sampler", "aten._grid_sampler_2d_cpu_fallback",
)  # fmt: skip

HANDLERS: dict[str, Handler] = {
    **{f"aten.{name}": pool for name in _POOL},
    "aten.avg_pool2d": average,
    "aten.avg_pool3d": average,
    **dict.fromkeys(_BY_CHANNEL, by_channel),
    "aten.im2col": windows,
    "aten.col2im": unwindow,
    "aten.pixel_shuffle": pixel_shuffle,
    "aten.pixel_unshuffle": pixel_unshuffle,
}
