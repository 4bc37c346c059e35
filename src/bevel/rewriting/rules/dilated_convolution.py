"""Dilated convolution -> a plain one with zeros between its weights, up to size 7; exact."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from bevel.rewriting.convolutions import convolution, convolutions, is_dilated, padding, why_fixed
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = True
LARGEST = 7


def match(seen: Seen) -> Iterator[Node]:
    """2-d convolutions with a dilation."""
    return (node for node, conv in convolutions(seen) if is_dilated(conv))


def check(seen: Seen, node: Node) -> str | None:
    """Why a place cannot be rewritten."""
    conv, why = convolution(seen, node), why_fixed(seen, node)
    if why is not None:
        return why
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
        padding=list(padding(conv)),
        groups=conv.groups,
    )


def _sizes(conv: nn.Conv2d) -> tuple[int, int]:
    down, right = (
        spread * (size - 1) + 1
        for size, spread in zip(conv.kernel_size, conv.dilation, strict=True)
    )
    return down, right
