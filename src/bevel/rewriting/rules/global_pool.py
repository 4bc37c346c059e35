"""Means over height and width in any form -> the one operator for that; exact."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bevel.graph.patches import pair
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = True
MEANS = (torch.mean, Tensor.mean)


def match(seen: Seen) -> Iterator[Node]:
    """Means of (N, C, H, W) over H and W, and average pools as large as what they pool."""
    for node in seen.calls((*MEANS, F.avg_pool2d)):
        shape = node.frame.arguments[0].shape
        if len(shape) != 4:
            continue
        if node.function is F.avg_pool2d:
            if pair(node.frame.argument(1, "kernel_size")) == shape[2:]:
                yield node
            continue
        dims = node.frame.argument(1, "dim")
        if isinstance(dims, list | tuple) and sorted(dim % 4 for dim in dims) == [2, 3]:
            yield node


def check(seen: Seen, node: Node) -> str | None:  # noqa: ARG001
    """Why a place cannot be rewritten."""
    if node.function is F.avg_pool2d:
        padding = node.frame.argument(3, "padding")
        if padding is not None and pair(padding) != (0, 0):
            return "it pads"
        if node.frame.argument(6, "divisor_override") is not None:
            return "it divides by a number of its own"
    elif node.frame.keyword("dtype") is not None:
        return "it gives another type"
    elif node.frame.argument(2, "keepdim") and not node.frame.keyword("keepdim"):
        return "it is told by position to keep the axes"
    return None


def rewrite(surgeon: Surgeon, node: Node) -> None:
    """Call the operator for it."""
    kept = node.function is F.avg_pool2d
    surgeon.divert(node, "global average kept" if kept else "global average")
