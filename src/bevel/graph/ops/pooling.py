"""Pooling, resampling and windows: positions change, channels stay."""

from __future__ import annotations

import math

from bevel.graph.layers import Layer, along
from bevel.graph.propagate import Handler, Propagation
from bevel.graph.record import Call, Value


def pool(state: Propagation, call: Call) -> None:
    """Every output (N, C, ...) has the channels of the first input (N, C, ...)."""
    x = call.arguments[0]
    for output in call.outputs:
        if isinstance(output, Value):
            state.set(output, _resized(state, call, state.of(x), x, output))


def _resized(
    state: Propagation, call: Call, layers: list[Layer], x: Value, output: Value
) -> list[Layer]:
    """The layers at the output's positions; positions that are pooled must not shrink."""
    result = []
    same = len(x.shape) - len(output.shape) == 0
    # Every kernel works on the last dimensions; what is before them passes through.
    first = next(
        (d for d in range(len(output.shape)) if not same or x.shape[d] != output.shape[d]),
        len(output.shape),
    )
    first = min(first, 2)
    for layer in layers:
        if layer.dim >= first:
            state.freeze_layer(layer, f"it varies over pooled positions: {call.place}")
            continue
        for dim in layer.dims:
            if dim >= first:
                layer = state.uniform(layer, dim, f"it is pooled over: {call.place}")
        ids = layer.compact().expand(output.shape)
        result.append(layer.moved(ids, layer.dim))
    return result


def by_channel(state: Propagation, call: Call) -> None:
    """`grid_sampler(x, grid)`, `roi_align(x, boxes)`: channels of x at other positions."""
    x, output = call.arguments[0], call.output
    for value in call.inputs()[1:]:
        state.freeze_value(value, f"positions to sample at: {call.place}")
    channels = state.ids_along(x, 1, f"its layout is not by channel: {call.place}")
    for layer in state.of(x):
        if layer.dim != 1:
            state.freeze_layer(layer, f"it is sampled: {call.place}")
    state.set(output, [] if channels is None else [along(channels, 1, output.shape)])


def windows(state: Propagation, call: Call) -> None:
    """`im2col(x, kernel, ...)`: (N, C, H, W) -> (N, C * kernel, positions)."""
    x, output = call.arguments[0], call.output
    area = math.prod(int(k) for k in call.arguments[1])
    channels = state.ids_along(x, 1, f"its layout is not by channel: {call.place}")
    ids = None if channels is None else channels.repeat_interleave(area)
    state.set(output, [] if ids is None else [along(ids, 1, output.shape)])


def unwindow(state: Propagation, call: Call) -> None:
    """`col2im(x, size, kernel, ...)`: the window's positions of a channel go together."""
    x, output = call.arguments[0], call.output
    area = math.prod(int(k) for k in call.arguments[2])
    ids = state.ids_along(x, 1, f"its layout is not by channel: {call.place}")
    if ids is None:
        return state.set(output, [])
    runs = ids.reshape(-1, area)
    state.tie(runs, runs[:, :1], call.place)
    nodes = state.node_ids(runs, len(runs))
    state.freeze(runs, f"a part of a window: {call.place}", level=True)
    return state.set(output, [along(nodes, 1, output.shape)])


def pixel_shuffle(state: Propagation, call: Call) -> None:
    """`pixel_shuffle(x, r)`: (N, C r r, H, W) -> (N, C, H r, W r): r r channels go together."""
    x, output = call.arguments[0], call.output
    area = int(call.arguments[1]) ** 2
    dim = len(x.shape) - 3
    ids = state.ids_along(x, dim, f"its layout is not by channel: {call.place}")
    if ids is None:
        return state.set(output, [])
    runs = ids.reshape(-1, area)
    state.freeze(runs, f"a part of a pixel: {call.place}", level=True)
    return state.set(output, [along(state.node_ids(runs, len(runs)), dim, output.shape)])


def pixel_unshuffle(state: Propagation, call: Call) -> None:
    """`pixel_unshuffle(x, r)`: (N, C, H r, W r) -> (N, C r r, H, W)."""
    x, output = call.arguments[0], call.output
    area = int(call.arguments[1]) ** 2
    dim = len(x.shape) - 3
    ids = state.ids_along(x, dim, f"its layout is not by channel: {call.place}")
    layers = [] if ids is None else [along(ids.repeat_interleave(area), dim, output.shape)]
    state.set(output, layers)


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
            layers.append(layer.moved(layer.compact().expand(output.shape), layer.dim))
    return state.set(output, layers)


_POOL = (
    "max_pool1d", "max_pool2d", "max_pool3d",
    "max_pool2d_with_indices", "max_pool3d_with_indices", "mkldnn_max_pool2d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_max_pool1d",
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
