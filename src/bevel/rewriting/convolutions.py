"""Convolutions as rules meet them: what they are, and when one can stand in for another."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from bevel.rewriting.seen import Node, Seen


def convolutions(seen: Seen) -> Iterator[tuple[Node, nn.Conv2d]]:
    """The calls of 2-d convolutions that an `nn.Conv2d` makes, with their modules."""
    for node in seen.calls([torch.conv2d]):
        module = seen.modules.get(node.module)
        if isinstance(module, nn.Conv2d):
            yield node, module


def convolution(seen: Seen, node: Node) -> nn.Conv2d:
    """The module of a call that `convolutions` gave."""
    module = seen.modules[node.module]
    assert isinstance(module, nn.Conv2d)  # noqa: S101  # `convolutions` gave it
    return module


def why_fixed(seen: Seen, node: Node) -> str | None:
    """Why no other convolution can stand in for one; None where one can."""
    conv = convolution(seen, node)
    if type(conv) is not nn.Conv2d or not seen.are_whole([node]):
        return "it is a class of its own"
    if seen.owner_of_weight(node) is None:
        return "its weight is computed, or it runs several times"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return "it pads with other than a number of zeros"
    return None


def why_not_resized(seen: Seen, node: Node) -> str | None:
    """Why no convolution with a kernel of another size can stand in for one."""
    dilated = "it is dilated" if is_dilated(convolution(seen, node)) else None
    return why_fixed(seen, node) or dilated


def is_dilated(conv: nn.Conv2d) -> bool:
    """Whether there are gaps between the places that its weights read."""
    return set(conv.dilation) != {1}


def padding(conv: nn.Conv2d) -> tuple[int, int]:
    """Rows and columns of zeros on either side, of one that `why_fixed` has nothing against."""
    assert not isinstance(conv.padding, str)  # noqa: S101  # `why_fixed` saw that
    return conv.padding[0], conv.padding[1]
