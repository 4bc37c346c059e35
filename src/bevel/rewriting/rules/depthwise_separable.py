"""Convolution -> one per channel and one of size 1, fitted to what it gave.

The kernels of one input channel, (outputs, height x width), become the product of rank 1 that
comes closest: the singular vectors of the largest singular value. The least squares fit of all
layers that follows surgery (`rewriting.reconstruction`) moves the second convolution to what comes
closest on the calibration images. A tenth of the work of a 3x3 convolution is left, and much of
what it knew is lost, so it is in no set.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from bevel.rewriting.convolutions import convolution, convolutions, why_fixed
from bevel.rewriting.fitting import Error
from bevel.rewriting.modules import SeparableConv2d
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = False


def match(seen: Seen) -> Iterator[Node]:
    """2-d convolutions of several channels that are larger than 1x1 and not grouped."""
    for node, conv in convolutions(seen):
        if conv.kernel_size != (1, 1) and conv.groups == 1 and conv.in_channels > 1:
            yield node


def check(seen: Seen, node: Node) -> str | None:
    """Why a place cannot be rewritten."""
    conv, why = convolution(seen, node), why_fixed(seen, node)
    if why is not None:
        return why
    if conv.out_channels < conv.kernel_size[0] * conv.kernel_size[1]:
        return "it makes so few channels that nothing is saved"
    return None


@torch.no_grad()
def rewrite(surgeon: Surgeon, node: Node) -> Error:
    """Put the two convolutions there."""
    conv = surgeon.net.get_submodule(node.module)
    assert isinstance(conv, nn.Conv2d)  # noqa: S101  # `check` saw that
    weight, bias = conv.weight.detach(), conv.bias
    by_input = weight.flatten(2).transpose(0, 1).double()  # (inputs, outputs, height x width)
    left, values, right = torch.linalg.svd(by_input, full_matrices=False)
    root = values[:, 0].sqrt()
    surgeon.replace(
        node.module,
        "SeparableConv2d",
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=list(conv.kernel_size),
        stride=list(conv.stride),
        padding=list(conv.padding),
        dilation=list(conv.dilation),
        bias=bias is not None,
    )
    made = surgeon.net.get_submodule(node.module)
    assert isinstance(made, SeparableConv2d)  # noqa: S101  # it was put there
    made.depthwise.weight.copy_((right[:, 0] * root[:, None]).reshape(made.depthwise.weight.shape))
    made.pointwise.weight.copy_((left[:, :, 0] * root[:, None]).T[:, :, None, None])
    if bias is not None and made.pointwise.bias is not None:
        made.pointwise.bias.copy_(bias)
    error = 1 - float(values[:, 0].square().sum() / values.square().sum().clamp(min=1e-30))
    return Error(error, error)
