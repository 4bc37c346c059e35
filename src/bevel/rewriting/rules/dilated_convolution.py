"""Dilated convolution -> a plain one with zeros between its weights, up to size 7; exact."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = True
LARGEST = 7


def match(seen: Seen) -> Iterator[Node]:
    """2-d convolutions with a dilation."""
    for node in seen.calls([torch.conv2d]):
        conv = seen.modules.get(node.module)
        if isinstance(conv, nn.Conv2d) and set(conv.dilation) != {1}:
            yield node


def check(seen: Seen, node: Node) -> str | None:
    """Why a place cannot be rewritten."""
    conv = seen.modules[node.module]
    assert isinstance(conv, nn.Conv2d)  # noqa: S101  # `match` saw that
    if type(conv) is not nn.Conv2d or not seen.are_whole([node]):
        return "it is a class of its own"
    if seen.owner_of_weight(node) is None:
        return "its weight is computed, or it runs several times"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return "it pads with other than a number of zeros"
    if max(_sizes(conv)) > LARGEST:
        return f"without dilation its kernel would be of size {max(_sizes(conv))}"
    return None


def rewrite(surgeon: Surgeon, node: Node) -> None:
    """Write the zeros out."""
    conv = surgeon.net.get_submodule(node.module)
    assert isinstance(conv, nn.Conv2d)  # noqa: S101  # `check` saw that
    kernel = conv.weight.new_zeros(*conv.weight.shape[:2], *_sizes(conv))
    kernel[:, :, :: conv.dilation[0], :: conv.dilation[1]] = conv.weight.detach()
    surgeon.put_convolution(
        node.module,
        kernel,
        stride=list(conv.stride),
        padding=[int(pad) for pad in conv.padding],
        groups=conv.groups,
    )


def _sizes(conv: nn.Conv2d) -> tuple[int, int]:
    down, right = (
        spread * (size - 1) + 1
        for size, spread in zip(conv.kernel_size, conv.dilation, strict=True)
    )
    return down, right
