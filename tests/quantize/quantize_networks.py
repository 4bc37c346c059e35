"""The digits network made hard for int8."""

from __future__ import annotations

import copy

import torch
from torch import nn


def uneven(net: nn.Sequential, decades: float = 1.5) -> nn.Sequential:
    """The same function, with channels of very different ranges between its convolutions.

    Args:
        net: that of the fixture `digits`.
        decades: the largest channel is 10 to twice this power of the smallest.
    """
    net = copy.deepcopy(net)
    factors = torch.logspace(-decades, decades, 16)
    with torch.no_grad():
        net[1].weight *= factors
        net[1].bias *= factors
        net[4].weight /= factors.reshape(1, -1, 1, 1)
    return net
