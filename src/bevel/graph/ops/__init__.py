"""What each operator does to index ids: one file per kind of operator.

Every file has `HANDLERS`, a mapping from operator name to handler. An operator that no file knows
freezes what it touches and says so by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bevel.graph.ops import (
    attention,
    convolution,
    elementwise,
    indexing,
    joining,
    matmul,
    movement,
    normalization,
    pooling,
    recurrent,
    reduction,
    views,
)
from bevel.graph.propagate import FrameHandler, Handler, Propagation
from bevel.graph.recording import Call

HANDLERS: dict[str, Handler] = {
    **convolution.HANDLERS,
    **matmul.HANDLERS,
    **normalization.HANDLERS,
    **elementwise.HANDLERS,
    **pooling.HANDLERS,
    **reduction.HANDLERS,
    **movement.HANDLERS,
    **joining.HANDLERS,
    **views.HANDLERS,
    **indexing.HANDLERS,
    **attention.HANDLERS,
    **recurrent.HANDLERS,
}

FRAME_HANDLERS: dict[Callable[..., Any], FrameHandler] = {
    **attention.FRAME_HANDLERS,
    **movement.FRAME_HANDLERS,
}
"""Of torch functions that do more than their operators show."""


def handler(call: Call) -> Handler:
    """The handler of a call: by name, else by torch's own tag for pointwise operators."""
    name = call.name
    known = HANDLERS.get(name) or HANDLERS.get(name.removesuffix("_"))
    if known is not None:
        return known
    if torch.Tag.pointwise in call.function.tags:
        return elementwise.pointwise
    return unknown


def unknown(state: Propagation, call: Call) -> None:
    """Freeze everything the operator touches; its outputs carry no ids."""
    for value in call.inputs:
        state.freeze_value(value, f"bevel does not know the operator {call.place}")
    state.set_outputs(call)
