"""Score every unit of every channel group: a criterion over the group's members, then reduced.

Of a criterion of weights the rows of each weight are scored once, along each axis that any group
needs, and then gathered by unit: a unit of several indices, such as an attention head, gets the
mean of their rows. Of a criterion that looks at images, `observing` gives the scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bevel.core import plugins
from bevel.core.errors import PruningError, suggestion
from bevel.core.modes import evaluating
from bevel.core.progress import track
from bevel.graph.couplings import Analysis, Axis, ChannelGroup
from bevel.pruning.criteria import Criterion, WeightCriterion, needed, needing
from bevel.pruning.members import Member, Members, Weight
from bevel.pruning.observing import Calibration, observe
from bevel.pruning.remembering import Remembered

REDUCTIONS: Mapping[str, str] = {
    "mean": "the mean over a group's members",
    "max": "the largest of a group's members",
    "product": "the geometric mean: a channel that any member holds cheap is cheap",
    "first": "the first producer's filters only, as pruning layer by layer does",
}
"""How the scores of a group's members become one, by name."""


def check_reduction(name: str) -> None:
    """Refuse a reduction that does not exist.

    Raises:
        PruningError: the message names the nearest.
    """
    if name not in REDUCTIONS:
        raise PruningError(f"no reduction called '{name}'. {suggestion(name, REDUCTIONS)}")


def check_calibration(criterion: str, how: str = "pass calibration") -> None:
    """Refuse a criterion that looks at images, because there are none.

    Args:
        criterion: the criterion's name.
        how: what to do, in the words of the place where it was named.

    Raises:
        UnknownNameError: there is no such criterion.
        PruningError: it needs images; names those that need none.
    """
    needs = needed(criterion)
    if needs == "weights":
        return
    what = "labelled images" if needs == "labels" else "images"
    raise PruningError(
        f"the criterion '{criterion}' looks at {what}: {how}; without images: {needing('weights')}"
    )


def score_groups(
    net: nn.Module,
    analysis: Analysis,
    criterion: str,
    *,
    reduction: str = "mean",
    calibration: Calibration | None = None,
    folder: Path | None = None,
    seed: int = 0,
) -> dict[int, np.ndarray]:
    """Scores per prunable group: index in `analysis.groups` -> (size,) float64, low goes first.

    Where a criterion's values differ in unit between tensors, each member's are divided by their
    mean before the reduction, and the group's by theirs after it: members weigh alike in a group,
    and groups are comparable. A group the criterion has nothing to say about is left out.

    Args:
        net: the network that was analysed.
        analysis: its groups.
        criterion: how a unit is scored (`bevel list criteria`).
        reduction: mean, max, product or first, over the members of a group.
        calibration: re-iterable batches for criteria that look at images: (images, labels), or
            images alone where no labels are needed.
        folder: where the scores that such criteria find are kept, for the same network and images.
        seed: for criteria that draw random numbers.

    Raises:
        UnknownNameError: there is no such criterion.
        PruningError: there is no such reduction, a score is not a finite number, or the criterion
            needs images and there are none, or none that it can use.
    """
    check_reduction(reduction)
    plugin: Criterion = plugins.load("criteria", criterion)
    if plugin.NEEDS == "weights":
        generator = torch.Generator().manual_seed(seed)
        members = _Scorer(net, plugin, generator).all(analysis, criterion, reduction == "first")
    elif calibration is None:
        check_calibration(criterion)
    else:
        remembered = Remembered(folder, net, analysis, criterion, calibration)
        members = remembered.get() or remembered.put(observe(net, analysis, criterion, calibration))
        if reduction == "first":
            members = {index: rows[:1] for index, rows in members.items()}
    return {
        index: _scores(rows, analysis.groups[index], criterion, reduction)
        for index, rows in members.items()
    }


def _scores(members: np.ndarray, group: ChannelGroup, criterion: str, reduction: str) -> np.ndarray:
    """One score per unit, comparable between groups: (members, size) -> (size,)."""
    plugin: Criterion = plugins.load("criteria", criterion)
    if not plugin.COMPARABLE:
        members = members / np.maximum(members.mean(axis=1, keepdims=True), 1e-30)
    if reduction == "product" and members.min() < 0:
        raise PruningError(
            f"reduction 'product' takes no scores below 0, and '{criterion}' gives such for "
            f"{group.name}: take mean, max or first"
        )
    value = _reduced(members, reduction)
    if not plugin.COMPARABLE:
        value = value / max(value.mean(), 1e-30)
    if not np.isfinite(value).all():
        raise PruningError(
            f"'{criterion}' gives scores for {group.name} that are not finite: the "
            "weights there hold nan or inf, or are out of range"
        )
    return value


def _reduced(members: np.ndarray, reduction: str) -> np.ndarray:
    """Scores of shape (members, size) -> (size,)."""
    if reduction == "max":
        reduced: np.ndarray = members.max(axis=0)
    elif reduction == "product":
        with np.errstate(divide="ignore"):
            reduced = np.exp(np.log(members).mean(axis=0))
    elif reduction == "first":
        reduced = members[0]
    else:
        reduced = members.mean(axis=0)
    return reduced


class _Scorer:
    """The rows of a network's weights, each scored once."""

    def __init__(self, net: nn.Module, plugin: WeightCriterion, generator: torch.Generator) -> None:
        self.net, self.plugin, self.generator = net, plugin, generator
        self.members = Members(net)
        self._rows: dict[tuple[str, str, int, int], np.ndarray] = {}

    def all(self, analysis: Analysis, label: str, first: bool) -> dict[int, np.ndarray]:
        """Scores (members, size) of each prunable group that has any, filters before the rest."""
        free = {i: group for i, group in enumerate(analysis.groups) if group.frozen is None}
        with evaluating(self.net), torch.no_grad():  # a parametrisation may change itself
            if "unit" in self.plugin.ROLES[0]:
                return {i: self._score(torch.ones(g.size), [0])[None] for i, g in free.items()}
            end = 1 if first else None
            members = {i: self.members.of(g, self.plugin.ROLES)[:end] for i, g in free.items()}
            self._read([member for some in members.values() for member in some], label)
            return {i: self._by_unit(some, free[i].size) for i, some in members.items() if some}

    def _read(self, members: Sequence[Member], label: str) -> None:
        """Score every member's rows, all axes of a weight while the processor has it at hand."""
        by_weight: dict[tuple[str, str], list[Member]] = {}
        for weight, axis in members:
            by_weight.setdefault(weight.key, []).append((weight, axis))
        for some in track(list(by_weight.values()), f"scoring ({label})", len(by_weight)):
            for member in some:
                self._scored(*member)

    def _by_unit(self, members: Sequence[Member], size: int) -> np.ndarray:
        """The mean score of each unit's rows, (members, size)."""
        shape = (len(members), size + 1)  # of each member, the first place is for rows of no unit
        places = [
            axis.units.reshape(-1) + (number * shape[1] + 1)
            for number, (_, axis) in enumerate(members)
        ]
        place = np.concatenate(places)
        rows = np.concatenate([self._scored(*member) for member in members])
        total = np.bincount(place, rows, minlength=math.prod(shape))
        count = np.bincount(place, minlength=math.prod(shape))
        return (total / np.maximum(count, 1)).reshape(shape)[:, 1:]

    def _scored(self, weight: Weight, axis: Axis) -> np.ndarray:
        """Scores of all rows along an axis, in the order of `axis.units.reshape(-1)`."""
        blocks = axis.units.shape[0] if axis.units.ndim == 2 else 0
        key = (*weight.key, axis.dim, blocks)
        if key not in self._rows:
            tensor, kept = weight.tensor, [axis.dim]
            if blocks:
                tensor = tensor.unflatten(0, (blocks, tensor.shape[0] // blocks))
                kept = [0, axis.dim + 1]
            self._rows[key] = self._score(tensor, kept)
        return self._rows[key]

    def _score(self, tensor: Tensor, kept: Sequence[int]) -> np.ndarray:
        """Scores of the rows along the kept dimensions, flat, float64."""
        tensor = tensor.unsqueeze(-1)  # so that there always is something to reduce
        over = tuple(dim for dim in range(tensor.ndim) if dim not in kept)
        scores = self.plugin.score(tensor, over, self.generator)
        flat: np.ndarray = scores.double().reshape(-1).cpu().numpy()
        return flat
