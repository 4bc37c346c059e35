"""Convolution of even size k -> of size k + 1 with zeros at its first row and column; exact."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn import functional

from bevel.rewriting.convolutions import convolution, convolutions, padding, why_not_resized
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = True


def match(seen: Seen) -> Iterator[Node]:
    """2-d convolutions with an even size, other than 1 by something."""
    for node, conv in convolutions(seen):
        if any(size % 2 == 0 for size in conv.kernel_size):
            yield node


def check(seen: Seen, node: Node) -> str | None:
    """Why a place cannot be rewritten."""
    conv, why = convolution(seen, node), why_not_resized(seen, node)
    if why is not None:
        return why
    if conv.stride == conv.kernel_size and max(conv.kernel_size) > 7:
        return "it cuts the image into patches"
    for size, side, step, pad in zip(
        conv.kernel_size, _sides(node), conv.stride, padding(conv), strict=True
    ):
        if size % 2 == 0 and (side + 2 * pad - size) % step == step - 1:
            return f"on {side} pixels one more place of the larger kernel would fit"
    return None


def rewrite(surgeon: Surgeon, node: Node) -> None:
    """Put the kernel behind a row and a column of zeros, and pad one more on each side."""
    conv = surgeon.net.get_submodule(node.module)
    assert isinstance(conv, nn.Conv2d)  # noqa: S101  # `check` saw that
    more = [1 - size % 2 for size in conv.kernel_size]
    surgeon.put_convolution(
        node.module,
        functional.pad(conv.weight.detach(), (more[1], 0, more[0], 0)),
        stride=list(conv.stride),
        padding=[pad + extra for pad, extra in zip(padding(conv), more, strict=True)],
        groups=conv.groups,
    )


def _sides(node: Node) -> tuple[int, int]:
    """Height and width of what it reads."""
    shape = node.frame.arguments[0].shape
    return int(shape[-2]), int(shape[-1])
