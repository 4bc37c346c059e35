"""Where the units of channel groups can be seen when a network runs.

A unit is seen where it is read. A convolution or linear layer that has an input slice for the unit
gets it after the norm, the activation, the addition and whatever else the network has in between,
be they modules or functions, and removing the unit is the same as having these readers get zeros.
So the tensors that a group's readers get are its feature maps, and factors of 1 on them are its
gates. What no such layer reads, as the queries and keys of an attention, is seen where the layers
that make it give it out. Weights that are used by functions, as those of `nn.MultiheadAttention`,
are no such layers: what only they read and make is not scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bevel.graph.couplings import Analysis
from bevel.pruning.members import Members


@dataclass(frozen=True, eq=False)
class Place:
    """A tensor on which a group's units lie.

    Attributes:
        group: position in `Analysis.groups`.
        size: units of the group.
        module: the layer that reads the tensor, or makes it.
        reads: which of both.
        units: (channels,) int64, the unit of each of the tensor's channels, -1 for none.
    """

    group: int
    size: int
    module: nn.Module
    reads: bool
    units: Tensor

    def fits(self, x: Any) -> bool:
        """Whether this is a batch with these channels."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or not len(x):
            return False
        dims = len(self.module.kernel_size) + 2 if isinstance(self.module, _ConvNd) else 2
        right = x.ndim == dims if isinstance(self.module, _ConvNd) else x.ndim >= dims
        return right and x.shape[self.axis] == len(self.units)

    @property
    def axis(self) -> int:
        """Where the channels of the tensor are."""
        return 1 if isinstance(self.module, _ConvNd) else -1

    @cached_property
    def channels(self) -> Tensor:
        """The channels in the order of their units; each unit has equally many."""
        order = torch.argsort(self.units, stable=True)
        return order[int((self.units < 0).sum()) :]

    def maps(self, x: Tensor) -> Tensor:
        """(N, units, rows, columns); channels of a unit lie under each other."""
        x = x.movedim(self.axis, 1)
        if not torch.equal(self.channels, torch.arange(x.shape[1])):
            x = x.index_select(1, self.channels.to(x.device))
        x = x if x.element_size() >= 4 else x.float()
        columns = x.shape[-1] if x.ndim > 2 else 1
        return x.reshape(len(x), self.size, -1, columns)

    def gated(self, x: Tensor, gates: Tensor) -> Tensor:
        """The tensor times gates (N, units); rows that images were cut into share theirs."""
        closed = torch.cat([gates, gates.new_ones(len(gates), 1)], dim=1)
        factors = closed[:, self.units.to(x.device)].repeat_interleave(len(x) // len(gates), 0)
        shape = [1] * x.ndim
        shape[0], shape[self.axis] = len(x), len(self.units)
        return x * factors.reshape(shape).to(x.dtype)


def places(net: nn.Module, analysis: Analysis) -> list[Place]:
    """Where the units of each prunable group can be seen."""
    members = Members(net)
    found = []
    for index, group in enumerate(analysis.groups):
        if group.frozen is not None:
            continue
        for role in ("input", "filter"):
            here = [
                Place(
                    index,
                    group.size,
                    weight.module,
                    role == "input",
                    torch.from_numpy(axis.units.reshape(-1).astype(np.int64)),
                )
                for weight, axis in members.of(group, ({role},))
                if isinstance(weight.module, _ConvNd | nn.Linear)
            ]
            found += here
            if here:
                break
    return found
