"""From when to when the tensors of a recorded pass are needed, if it runs call by call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

from bevel.graph.recording import Call, Recording, Value

IN_PLACE = frozenset(("aten.native_batch_norm", "aten._native_batch_norm_legit_no_training",
                      "aten.batch_norm", "aten.cudnn_batch_norm", "aten.native_dropout",
                      "aten._batch_norm_with_update"))  # fmt: skip
"""Element by element in evaluation, though torch does not tag them so."""

VIEWS = frozenset(("aten._unsafe_view", "aten.alias", "aten.detach", "aten._reshape_alias"))
"""The same elements in another shape, though the schema does not say so."""


@dataclass(frozen=True, eq=False)
class Buffer:
    """Memory for a tensor and for what takes its place, from call `first` to call `last`."""

    value: Value
    first: int
    last: int


def buffers(recording: Recording) -> list[Buffer]:
    """The activations of a pass and when they are alive, the network's inputs among them.

    A view is the memory of what it views. An operator that works element by element writes over
    an input that nothing reads any more, as runtimes do and as fusion into the layer before does.
    """
    root = _views(recording)
    values = {v.index: v for call in recording.calls for v in (*call.inputs, *_outputs(call))}
    end = len(recording.calls)
    last = {root[output.index]: end for output in recording.outputs if output.index in root}
    first: dict[int, int] = {}
    for position, call in enumerate(recording.calls):
        for value in call.inputs:
            own = root[value.index]
            first.setdefault(own, 0)  # nothing in the pass made it: an input of the network
            last[own] = max(last.get(own, 0), position)
        for value in _outputs(call):
            first.setdefault(root[value.index], position)
    held = _in_place(recording, root, last, end)
    return [
        Buffer(values[own], first[own], held[own])
        for own in first
        if own in held and values[own].name is None
    ]


def _outputs(call: Call) -> Iterator[Value]:
    return (output for output in call.outputs if isinstance(output, Value))


def _views(recording: Recording) -> dict[int, int]:
    """Index of each value -> that of the value whose memory it is."""
    root: dict[int, int] = {}
    for call in recording.calls:
        given = call.inputs
        for value in given:
            root.setdefault(value.index, value.index)
        views = bool(given) and _is_view(call)
        for value in _outputs(call):
            own = root[given[0].index] if views else value.index
            root.setdefault(value.index, own)
    return root


def _is_view(call: Call) -> bool:
    """Whether an operator's outputs are the memory of its first input."""
    return call.name in VIEWS or _aliases(call.function)


@cache
def _aliases(function: torch._ops.OpOverload) -> bool:
    """Whether an operator's schema says that an output is the memory of an input."""
    return any(given.alias_info is not None for given in function._schema.returns)


def _in_place(
    recording: Recording, root: dict[int, int], last: dict[int, int], end: int
) -> dict[int, int]:
    """The last call of each memory, once outputs have taken the place of inputs."""
    held, place = dict(last), {own: own for own in root.values()}
    sizes = {v.index: v for call in recording.calls for v in (*call.inputs, *_outputs(call))}
    for position, call in enumerate(recording.calls):
        if call.name not in IN_PLACE and torch.Tag.pointwise not in call.function.tags:
            continue
        output = next(_outputs(call), None)
        if output is None or root[output.index] not in held:
            continue
        own = root[output.index]
        for value in call.inputs:
            taken = place[root[value.index]]
            over = value.name is None and held.get(taken) == position != end
            alike = sizes[taken].shape == output.shape and sizes[taken].dtype == output.dtype
            if over and alike and taken != own:
                held[taken] = held.pop(own)
                place[own] = taken
                break
    return held
