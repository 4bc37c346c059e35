"""Normalisations whose statistics belong to one channel each."""

from __future__ import annotations

from typing import cast

from bevel.graph.propagate import FIXED, Handler, Propagation
from bevel.graph.record import Call, Value


def batch_norm(state: Propagation, call: Call) -> None:
    """`batch_norm(x, weight, bias, running_mean, running_var, ...)`, x of shape (N, C, ...)."""
    x = call.arguments[0]
    channels = state.ids_along(x, 1, f"its layout is not by channel: {call.place}")
    for value in call.arguments[1:5]:
        if isinstance(value, Value):
            own = state.ids_along(value, 0, call.place)
            if own is not None:
                reason = f"its input has a fixed number of channels: {call.place}"
                state.unify(FIXED if channels is None else channels, own, reason)
    state.set(cast(Value, call.outputs[0]), state.of(x))


HANDLERS: dict[str, Handler] = {
    f"aten.{name}": batch_norm
    for name in (
        "native_batch_norm",
        "cudnn_batch_norm",
        "miopen_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "_batch_norm_no_update",
        "_batch_norm_with_update",
        "batch_norm",
    )
}
