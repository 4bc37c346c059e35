"""What is among the arguments of a call: tensors, sizes, numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bevel.graph.recording import Value

ARITHMETIC = frozenset(
    {
        "mul", "div", "add", "sub", "pow", "rsub", "true_divide", "floor_divide", "__rtruediv__",
        "__rdiv__", "__rsub__", "__rpow__", "__rmul__", "__radd__", "tensor", "full", "mul_",
        "div_", "add_", "sub_", "as_tensor", "scalar_tensor", "__rfloordiv__",
        "scaled_dot_product_attention",
    }
)  # fmt: skip
"""Functions in which an integer is a number, not a size or a position."""


def name_of(function: Any) -> str:
    """The name of a torch function, of a method without its class."""
    return str(getattr(function, "__name__", function))


def leaves(item: Any) -> Iterator[Any]:
    """What `tree_leaves` gives of the usual containers, in a fraction of its time."""
    if isinstance(item, tuple | list) and not isinstance(item, torch.Size):
        for part in item:
            yield from leaves(part)
    elif isinstance(item, dict):
        for part in item.values():
            yield from leaves(part)
    elif type(item) in _LEAVES:
        yield item
    else:
        yield from tree_leaves(item)


_LEAVES = frozenset(
    (Tensor, nn.Parameter, Value, int, float, bool, str, slice, torch.Size, type(None))
)


def integers(arguments: Any) -> Iterator[int]:
    """All integers, those of slices and sizes included."""
    for leaf in leaves(arguments):
        if isinstance(leaf, int) and not isinstance(leaf, bool):
            yield leaf
        elif isinstance(leaf, slice):
            yield from (x for x in (leaf.start, leaf.stop) if isinstance(x, int))
        elif isinstance(leaf, torch.Size):
            yield from leaf


def numbers(function: Any, arguments: Any) -> list[Any]:
    """What the function computes with: floats, and integers where they are no sizes."""
    arithmetic = name_of(function) in ARITHMETIC
    return [
        leaf
        for leaf in leaves(arguments)
        if isinstance(leaf, float) or (arithmetic and isinstance(leaf, int))
    ]
