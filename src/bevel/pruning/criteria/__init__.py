"""Criteria: how much a channel matters. One file each; the file name is the criterion's name.

There are two kinds, told apart by `NEEDS`. A `WeightCriterion` scores rows of weights of certain
roles; `bevel.pruning.scoring` finds the rows that belong to a group's units. A `DataCriterion`
gathers a `Statistic` of what a network does with images; `bevel.pruning.observing` runs the network
and hands the statistic what it sees of a group's units. Either way the scores of a group's members
are reduced to one per unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from typing import Literal, Protocol

import torch
from torch import Tensor

from bevel.core import plugins

PIECE = 1 << 17
"""Weights that are looked at in one go: they stay in the processor's cache."""

MAPS = 1 << 22
"""Elements of feature maps that are worked on in one go."""

ANY_WEIGHT = ({"filter", "input"}, {"norm"}, {"other", "bias"})
"""For criteria of magnitude: what makes and reads a channel, else whatever belongs to it."""


class WeightCriterion(Protocol):
    """What the module of a criterion of weights offers.

    Attributes:
        NEEDS: "weights".
        COMPARABLE: whether a score means the same in every tensor of the network. If not, the
            scores of each tensor are divided by their mean.
        ROLES: which members of a group are scored: those of the first set of roles that the group
            has any of. "filter" makes the channel, "input" reads it, "norm" is the scale of a
            normalisation, "bias" is added to it, "other" is none of these (position embeddings,
            class tokens, scales of layers); "unit" stands for the units themselves, as a vector
            of ones, for criteria that look at no weights.
    """

    NEEDS: Literal["weights"]
    COMPARABLE: bool
    ROLES: tuple[Set[str], ...]

    def score(self, weight: Tensor, over: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """One score per row, low for what can go: `weight` without the dimensions `over`."""


class Statistic(Protocol):
    """What is gathered of the units at one place, in memory that does not grow with the images."""

    def update(self, observed: Tensor) -> None:
        """Take in some images: maps (N, units, rows, columns), or gate gradients (N, units)."""

    def scores(self) -> Tensor:
        """One score per unit, float64 of shape (units,), low for what can go."""


class DataCriterion(Protocol):
    """What the module of a criterion that looks at images offers.

    Attributes:
        NEEDS: "images" for feature maps, as `bevel.pruning.observing` finds them. "labels" for the
            gradient of each image's cross-entropy with respect to gates, factors of 1 on the
            units: dL/dz_c = sum over positions of a_c dL/da_c.
        COMPARABLE: as of criteria of weights.
    """

    NEEDS: Literal["images", "labels"]
    COMPARABLE: bool

    def start(self) -> Statistic:
        """A statistic that has seen nothing."""


Criterion = WeightCriterion | DataCriterion


def needed(criterion: str) -> str:
    """What a criterion looks at: "weights", "images" or "labels".

    Raises:
        UnknownNameError: there is no such criterion.
    """
    plugin: Criterion = plugins.load("criteria", criterion)
    return plugin.NEEDS


def needing(*needs: str) -> str:
    """The names of bevel's criteria that look at one of these, in a line."""
    return ", ".join(name for name in plugins.own("criteria") if needed(name) in needs)


class Average:
    """The mean over all images of a value of each image and unit.

    Args:
        each: maps or gate gradients of some images to values (N, units).
        finish: mean values (units,) to scores.
    """

    def __init__(
        self, each: Callable[[Tensor], Tensor], finish: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.each, self.finish = each, finish
        self.count, self.total = 0, torch.zeros((), dtype=torch.float64)

    def update(self, observed: Tensor) -> None:
        """Take in some images, a few at a time where they are large."""
        for piece in observed.split(max(MAPS // max(observed[:1].numel(), 1), 1)):
            self.total = self.total.to(piece.device) + self.each(piece).double().sum(0)
        self.count += len(observed)

    def scores(self) -> Tensor:
        """The mean, finished: (units,)."""
        mean = self.total / self.count
        return mean if self.finish is None else self.finish(mean)


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
