"""Faults: places where a network's own code does not follow the sizes of a cut."""

from __future__ import annotations

import dis
import os
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType

import numpy as np
import torch

from bevel.graph.layers import Extent, Layer


class Kind(Enum):
    """Sorts of faults."""

    HERE = "a size does not follow the tensors here"
    ELSEWHERE = "a size follows tensors from elsewhere in the network"
    RAISED = "the network's own code raises an error"
    PATH = "the code takes another path"
    NUMBER = "a number that is no size is computed from a size"


@dataclass(frozen=True, eq=False)
class Written:
    """A number in the code that ought to follow these lengths.

    `ids` are all ids of the layer whose length it is, in the order of the tensor's elements.
    """

    number: int
    predicted: int
    extents: tuple[Extent, ...]
    ids: np.ndarray


@dataclass(frozen=True, eq=False)
class Fault:
    """A place where the network's code does not follow the new sizes.

    Attributes:
        modules: the modules whose forward is running, innermost first.
        place: file and line.
        names: the attribute names that the code there uses.
        given: those among the arguments of the running call, in their order, with repeats.
        written: the numbers at fault, if they are known.
        blamed: the layers involved.
        error: what happened.
        kind: what sort of fault it is.
        lengths: all lengths of the results that can shrink.
        changes: numbers among the arguments that differ: recorded and now.
        position: how many recorded torch functions were met until then.
    """

    modules: tuple[str, ...]
    place: str
    names: frozenset[str]
    written: tuple[Written, ...]
    blamed: tuple[Layer, ...]
    error: str
    kind: Kind
    given: tuple[str, ...] = ()
    lengths: tuple[Written, ...] = ()
    changes: tuple[tuple[int, int], ...] = ()
    position: int = 0


_OTHERS = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parent}{os.sep}", "<")
"""Code that is not the network's own: torch, the recording, generated functions."""


def is_user(frame: FrameType) -> bool:
    """Whether a frame runs the network's own code."""
    return not frame.f_code.co_filename.startswith(_OTHERS)


def user_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame of the network's own code."""
    while frame is not None and not is_user(frame):
        frame = frame.f_back
    return frame


def place_of(frame: FrameType | None) -> str:
    """File and line."""
    if frame is None:
        return "torch"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def given_names(frame: FrameType | None) -> tuple[str, ...]:
    """The names that stand in the arguments of the call that a frame is at, in their order.

    Nothing where Python keeps no positions (`-X no_debug_ranges`).
    """
    return () if frame is None else _given_names(frame.f_code, frame.f_lasti)


@lru_cache(maxsize=256)
def _given_names(code: CodeType, offset: int) -> tuple[str, ...]:
    steps = [step for step in dis.get_instructions(code) if step.positions is not None]
    running = [step for step in steps if step.offset <= offset]  # it may point behind the call
    if not running or None in (running[-1].positions or ()):
        return ()
    begin, end = _span(running[-1])
    # What is called, `x.view(...).split`, begins where the whole call does.
    spans = [(*_span(step), step.argval) for step in steps]
    called = max((last for first, last, _ in spans if first == begin and last < end), default=begin)
    inside = (name for first, last, name in spans if first >= called and last <= end)
    return tuple(name for name in inside if name in code.co_names)


def _span(step: dis.Instruction) -> tuple[tuple[int, int], tuple[int, int]]:
    """Line and column where an instruction's source begins and ends, -1 where that is not known."""
    first, last, begin, end = (
        -1 if place is None else place for place in step.positions or (None,) * 4
    )
    return (first, begin), (last, end)
