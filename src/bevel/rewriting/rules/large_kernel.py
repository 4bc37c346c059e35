"""Convolution of size k > 7 -> of size 7, fitted to what it gave.

The middle of the kernel is where it starts; the least squares fit of all layers that follows
surgery (`rewriting.reconstruction`) moves it to what comes closest on the calibration images.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from bevel.rewriting.convolutions import convolution, convolutions, padding, why_not_resized
from bevel.rewriting.fitting import Error
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = False
LARGEST = 7


def match(seen: Seen) -> Iterator[Node]:
    """2-d convolutions of a size above 7 in either direction that are not one patch each."""
    return (node for node, conv in convolutions(seen) if max(conv.kernel_size) > LARGEST)


def check(seen: Seen, node: Node) -> str | None:
    """Why a place cannot be rewritten."""
    conv, why = convolution(seen, node), why_not_resized(seen, node)
    if why is not None:
        return why
    if conv.stride == conv.kernel_size:
        return "it cuts the image into patches"
    if any(size > LARGEST and size % 2 == 0 for size in conv.kernel_size):
        return "its size is even: even_kernel makes it odd"
    if any(pad < cut for pad, cut in zip(padding(conv), _cuts(conv), strict=True)):
        return "it pads less than what would be cut off"
    return None


def rewrite(surgeon: Surgeon, node: Node) -> Error:
    """Cut the kernel down to its middle."""
    conv = surgeon.net.get_submodule(node.module)
    assert isinstance(conv, nn.Conv2d)  # noqa: S101  # `check` saw that
    (down, right), weight = _cuts(conv), conv.weight.detach()
    middle = weight[:, :, down : weight.shape[2] - down, right : weight.shape[3] - right]
    squares = float(weight.square().sum())
    error = 1 - float(middle.square().sum()) / max(squares, 1e-30)
    surgeon.put_convolution(
        node.module,
        middle.clone(),
        stride=list(conv.stride),
        padding=[padding(conv)[0] - down, padding(conv)[1] - right],
        groups=conv.groups,
    )
    return Error(error, error)


def _cuts(conv: nn.Conv2d) -> tuple[int, int]:
    """Rows and columns that go on either side."""
    down, right = (max(size - LARGEST, 0) // 2 for size in conv.kernel_size)
    return down, right
