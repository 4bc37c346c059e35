"""Pooling and resampling: positions change, channels stay."""

from __future__ import annotations

from torch import Tensor

from bevel.graph.propagate import Handler, Propagation, compact, varying
from bevel.graph.record import Call, Value


def pool(state: Propagation, call: Call) -> None:
    """Every output (N, C, ...) has the channels of the first input (N, C, ...)."""
    x = call.arguments[0]
    for output in call.outputs:
        if isinstance(output, Value):
            state.set(output, [_resize(state, call, layer, output) for layer in state.of(x)])


def _resize(state: Propagation, call: Call, layer: Tensor, output: Value) -> Tensor:
    """The layer at the output's positions; ids that vary over positions are frozen."""
    if any(layer.shape[dim] != output.shape[dim] for dim in varying(layer)):
        state.freeze(layer, f"it varies over pooled positions: {call.place}")
        for dim in varying(layer):
            if layer.shape[dim] != output.shape[dim]:
                layer = layer.narrow(dim, 0, 1)
    return compact(layer).expand(output.shape)


HANDLERS: dict[str, Handler] = {
    f"aten.{name}": pool
    for name in (
        "max_pool1d", "max_pool2d", "max_pool3d",
        "max_pool2d_with_indices", "max_pool3d_with_indices", "mkldnn_max_pool2d",
        "avg_pool1d", "avg_pool2d", "avg_pool3d",
        "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d",
        "adaptive_max_pool2d", "adaptive_max_pool3d",
        "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
        "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
        "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
        "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample_linear1d",
        "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
        "replication_pad1d", "replication_pad2d", "replication_pad3d",
    )
}  # fmt: skip
