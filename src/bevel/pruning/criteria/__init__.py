"""Criteria: how much a channel matters. One file each; the file name is the criterion's name.

A criterion has `COMPARABLE` (whether its scores mean the same in every layer; if not they are
divided by the group's mean) and `score`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Member:
    """The slices of one parameter that belong to a group's units, one row each.

    Attributes:
        tensor: the parameter's name.
        role: "filter" (what makes the channel), "input" (what reads it), "norm" (the scale of a
            normalisation) or "bias".
        rows: (n, k) weights; row i belongs to unit `units[i]`.
        units: (n,) positions of the units in the group.
    """

    tensor: str
    role: str
    rows: Tensor
    units: Tensor


class Criterion(Protocol):
    """What a criterion's module offers."""

    COMPARABLE: bool

    def score(
        self, members: Sequence[Member], size: int, generator: torch.Generator
    ) -> Tensor | None:
        """Scores of shape (size,), low for what can go; None if there is nothing to score."""


def per_unit(
    members: Sequence[Member], role: str, size: int, measure: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """Mean over a group's members of `measure` ((n, k) rows -> (n,) scores), per unit: (size,).

    None if no member has that role.
    """
    total = torch.zeros(size, dtype=torch.float64)
    count = torch.zeros(size, dtype=torch.float64)
    for member in members:
        if member.role == role:
            total.index_add_(0, member.units, measure(member.rows).double())
            count.index_add_(0, member.units, torch.ones(len(member.units), dtype=torch.float64))
    if not bool(count.any()):
        return None
    return total / count.clamp(min=1)
