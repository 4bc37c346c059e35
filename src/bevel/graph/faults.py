"""Faults: places where a network's own code does not follow the sizes of a cut."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import FrameType

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
        written: the numbers at fault, if they are known.
        blamed: the layers involved.
        error: what happened.
        kind: what sort of fault it is.
        lengths: all lengths of the results that can shrink.
        changes: numbers among the arguments that differ: recorded and now.
    """

    modules: tuple[str, ...]
    place: str
    names: frozenset[str]
    written: tuple[Written, ...]
    blamed: tuple[Layer, ...]
    error: str
    kind: Kind
    lengths: tuple[Written, ...] = ()
    changes: tuple[tuple[int, int], ...] = ()


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
