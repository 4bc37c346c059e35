"""Max pool of odd size k > 3 and stride 1 -> (k - 1) / 2 max pools of size 3; exact."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from bevel.graph.patches import pair
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = True


def match(seen: Seen) -> Iterator[Node]:
    """Max pools that are larger than 3."""
    for node in seen.calls([F.max_pool2d, torch.max_pool2d]):
        if max(pair(node.frame.argument(1, "kernel_size"))) > 3:
            yield node


def check(seen: Seen, node: Node) -> str | None:
    """Why a place cannot be rewritten."""
    module = seen.modules.get(node.module)
    if not isinstance(module, nn.MaxPool2d) or not seen.are_whole([node]):
        return "it is called as a function, not by an nn.MaxPool2d"
    (size, other), stride, padding, dilation = (
        pair(value)
        for value in (module.kernel_size, module.stride, module.padding, module.dilation)
    )
    if size != other or size % 2 == 0:
        return f"its kernel is {size}x{other}, not odd and square"
    if stride != (1, 1) or dilation != (1, 1) or module.ceil_mode:
        return "only a stride of 1 without dilation and ceil_mode is a stack of small pools"
    if padding != (size // 2, size // 2) and padding != (0, 0):
        return f"its padding of {padding[0]} is neither none nor half of its size"
    return None


def rewrite(surgeon: Surgeon, node: Node) -> None:
    """Stack pools of size 3, padded as the large one was."""
    module = surgeon.seen.modules[node.module]
    assert isinstance(module, nn.MaxPool2d)  # noqa: S101  # `check` saw that
    if not isinstance(surgeon.net.get_submodule(node.module), nn.MaxPool2d):
        return  # it runs several times and is done
    size, padded = pair(module.kernel_size)[0], pair(module.padding)[0] > 0
    surgeon.replace(
        node.module,
        "MaxPool2d",
        repeat=size // 2,
        kernel_size=3,
        stride=1,
        padding=1 if padded else 0,
    )
