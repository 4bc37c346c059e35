"""Average pool of size 4, 8, 9, ... at steps of its size -> a stack of pools of 2 or 3; exact."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import nn

from bevel.graph.patches import pair
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = True


def match(seen: Seen) -> Iterator[Node]:
    """Average pools that are larger than 3 and smaller than what they pool."""
    for node in seen.calls([F.avg_pool2d]):
        size = pair(node.frame.argument(1, "kernel_size"))
        if max(size) > 3 and size != node.frame.arguments[0].shape[2:]:
            yield node


def check(seen: Seen, node: Node) -> str | None:
    """Why a place cannot be rewritten."""
    module = seen.modules.get(node.module)
    if not isinstance(module, nn.AvgPool2d) or not seen.are_whole([node]):
        return "it is called as a function, not by an nn.AvgPool2d"
    size, step, padding = (
        pair(value) for value in (module.kernel_size, module.stride, module.padding)
    )
    if step != size or padding != (0, 0) or module.ceil_mode:
        return "pools that overlap, pad or round up are no stack of small ones"
    if size[0] != size[1] or _factor(size[0]) is None:
        return f"{size[0]}x{size[1]} is no power of 2x2 or 3x3"
    return None


def rewrite(surgeon: Surgeon, node: Node) -> None:
    """Stack the small pools."""
    module = surgeon.seen.modules[node.module]
    assert isinstance(module, nn.AvgPool2d)  # noqa: S101  # `check` saw that
    if not isinstance(surgeon.net.get_submodule(node.module), nn.AvgPool2d):
        return  # it runs several times and is done
    found = _factor(pair(module.kernel_size)[0])
    assert found is not None  # noqa: S101  # `check` saw that
    base, times = found
    surgeon.replace(node.module, "AvgPool2d", repeat=times, kernel_size=base, stride=base)


def _factor(size: int) -> tuple[int, int] | None:
    """2 or 3, and the power of it that the size is."""
    for base in (2, 3):
        for power in range(2, 10):
            if base**power == size:
                return base, power
    return None
