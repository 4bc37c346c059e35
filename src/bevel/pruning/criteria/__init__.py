"""Criteria: how much a channel matters. One file each; the file name is the criterion's name.

A criterion scores rows of weights of certain roles. `bevel.pruning.scoring` finds the rows that
belong to a group's units and reduces the scores of its members to one per unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from typing import Literal, Protocol

import torch
from torch import Tensor

PIECE = 1 << 17
"""Weights that are looked at in one go: they stay in the processor's cache."""

ANY_WEIGHT = ({"filter", "input"}, {"norm"}, {"other", "bias"})
"""For criteria of magnitude: what makes and reads a channel, else whatever belongs to it."""


class Criterion(Protocol):
    """What a criterion's module offers.

    Attributes:
        COMPARABLE: whether a score means the same in every tensor of the network. If not, the
            scores of each tensor are divided by their mean.
        ROLES: which members of a group are scored: those of the first set of roles that the group
            has any of. "filter" makes the channel, "input" reads it, "norm" is the scale of a
            normalisation, "bias" is added to it, "other" is none of these (position embeddings,
            class tokens, scales of layers); "unit" stands for the units themselves, as a vector
            of ones, for criteria that look at no weights.
    """

    COMPARABLE: bool
    ROLES: tuple[Set[str], ...]

    def score(self, weight: Tensor, over: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """One score per row, low for what can go: `weight` without the dimensions `over`."""


def norms(weight: Tensor, over: tuple[int, ...], order: Literal[1, 2]) -> Tensor:
    """L1 or L2 norm over these dimensions (at least one), float64."""
    last = tuple(range(weight.ndim - len(over), weight.ndim))
    if over == last and weight.is_contiguous() and weight.element_size() >= 4:
        norm: Tensor = torch.linalg.vector_norm(weight, order, over)  # makes no copy along rows
        return norm.double()
    return sums(weight, over, torch.abs) if order == 1 else sums(weight, over, torch.square).sqrt()


def sums(weight: Tensor, over: tuple[int, ...], element: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum of `element(weight)` over these dimensions (at least one), float64.

    Goes through the weight in pieces, so that no copy of it is made.
    """
    pieces = (
        element(piece if piece.element_size() >= 4 else piece.float())
        for piece in weight.split(max(PIECE // max(weight[:1].numel(), 1), 1))
    )
    if 0 not in over:
        return torch.cat([piece.sum(over).double() for piece in pieces])
    total = next(pieces).sum(0).double()
    for piece in pieces:
        total += piece.sum(0)
    rest = tuple(dim - 1 for dim in over if dim > 0)
    return total.sum(rest) if rest else total


def means(weight: Tensor, over: tuple[int, ...], element: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of `element(weight)` over these dimensions (at least one), float64."""
    return sums(weight, over, element) / math.prod(weight.shape[dim] for dim in over)
