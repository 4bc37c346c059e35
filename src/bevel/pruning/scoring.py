"""Score every unit of every channel group: a criterion over the group's members, then reduced.

A *member* is one axis of one parameter on which the group's units lie: a filter that makes them,
an input slice that reads them, a normalisation's scale. The rows of each weight are scored once,
along each axis that any group needs, and then gathered by unit: a unit of several indices, such as
an attention head, gets the mean of their rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bevel.core import plugins
from bevel.core.errors import PruningError, suggestion
from bevel.core.modes import evaluating
from bevel.core.progress import track
from bevel.graph.couplings import Analysis, Axis, ChannelGroup
from bevel.pruning.criteria import Criterion

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


def score_groups(
    net: nn.Module, analysis: Analysis, criterion: str, *, reduction: str = "mean", seed: int = 0
) -> dict[int, np.ndarray]:
    """Scores per prunable group: index in `analysis.groups` -> (size,) float64, low goes first.

    Where a criterion's values differ in unit between tensors, each member's are divided by their
    mean before the reduction, and the group's by theirs after it: members weigh alike in a group,
    and groups are comparable. A group the criterion has nothing to say about is left out.

    Args:
        net: the network that was analysed.
        analysis: its groups.
        criterion: how one row of weights is scored (`bevel list criteria`).
        reduction: mean, max, product or first, over the members of a group.
        seed: for criteria that draw random numbers.

    Raises:
        UnknownNameError: there is no such criterion.
        PruningError: there is no such reduction, or a score is not a finite number.
    """
    check_reduction(reduction)
    plugin: Criterion = plugins.load("criteria", criterion)
    scorer = _Scorer(net, plugin, torch.Generator().manual_seed(seed))
    scores: dict[int, np.ndarray] = {}
    numbered = list(enumerate(analysis.groups))
    with evaluating(net), torch.no_grad():  # a parametrisation may change itself in training
        for index, group in track(numbered, f"scoring ({criterion})", len(numbered)):
            if group.frozen is not None:
                continue
            members = scorer.members(group, first=reduction == "first")
            if not len(members):
                continue
            value = _reduced(members, reduction)
            if not plugin.COMPARABLE:
                value = value / max(value.mean(), 1e-30)
            if not np.isfinite(value).all():
                raise PruningError(
                    f"'{criterion}' gives scores for {group.name} that are not finite: the "
                    "weights there hold nan or inf, or are out of range"
                )
            scores[index] = value
    return scores


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


@dataclass(frozen=True, eq=False)
class _Weight:
    """A tensor as a module uses it.

    Attributes:
        key: the module's name and the tensor's in it; parts of a parametrised weight share them.
        module: the module.
        tensor: its value.
    """

    key: tuple[str, str]
    module: nn.Module
    tensor: Tensor


class _Scorer:
    """The rows of a network's weights, each scored once."""

    def __init__(self, net: nn.Module, plugin: Criterion, generator: torch.Generator) -> None:
        self.plugin, self.generator = plugin, generator
        self.modules = dict(net.named_modules(remove_duplicate=False))
        self._weights: dict[str, _Weight | None] = {}
        self._roles: dict[tuple[str, int], str | None] = {}
        self._rows: dict[tuple[str, str, int, int], np.ndarray] = {}

    def members(self, group: ChannelGroup, *, first: bool) -> np.ndarray:
        """Scores of shape (members, size), filters before the rest; no rows if nothing is scored.

        Each row is divided by its mean unless the criterion is comparable by itself.
        """
        if "unit" in self.plugin.ROLES[0]:
            return self._score(torch.ones(group.size), [0])[None]
        by_role: dict[str, list[tuple[_Weight, Axis]]] = {}
        for axis in group.axes:
            weight, role = self._weight(axis.tensor), self._role(axis)
            if weight is not None and role is not None:
                by_role.setdefault(role, []).append((weight, axis))
        wanted = next((roles for roles in self.plugin.ROLES if roles & by_role.keys()), set())
        roles = sorted(wanted & by_role.keys(), key=lambda role: (role != "filter", role))
        members: dict[tuple[str, str, int], tuple[_Weight, Axis]] = {}
        for role in roles:
            for weight, axis in by_role[role]:  # of a weight in parts, the first counts
                members.setdefault((*weight.key, axis.dim), (weight, axis))
        chosen = list(members.values())[: 1 if first else None]
        if not chosen:
            return np.zeros((0, group.size))
        scores = self._by_unit(chosen, group.size)
        if not self.plugin.COMPARABLE:
            scores /= np.maximum(scores.mean(axis=1, keepdims=True), 1e-30)
        return scores

    def _by_unit(self, members: Sequence[tuple[_Weight, Axis]], size: int) -> np.ndarray:
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

    def _scored(self, weight: _Weight, axis: Axis) -> np.ndarray:
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

    def _weight(self, name: str) -> _Weight | None:
        """The weight that a parameter is or is a part of; None for statistics and the like."""
        if name not in self._weights:
            self._weights[name] = self._found(name)
        return self._weights[name]

    def _found(self, name: str) -> _Weight | None:
        head, parametrised, rest = f".{name}".partition(".parametrizations.")
        if parametrised:
            leaf, _, part = rest.partition(".")
            owner = head.removeprefix(".")
            if not part.startswith("original"):  # a state of the parametrisation
                return None
        else:
            owner, _, leaf = name.rpartition(".")
        module = self.modules[owner]
        if not parametrised:
            stem = leaf.rpartition("_")[0]  # torch.nn.utils: weight_g and weight_v, weight_orig
            if leaf in (f"{stem}_g", f"{stem}_v", f"{stem}_orig") and hasattr(module, stem):
                leaf = stem
        holder, _, part = name.rpartition(".")
        held = self.modules[holder]
        own: Tensor | None = held._parameters.get(part)
        if own is None and leaf == "weight":  # a frozen normalisation's scale
            own = held._buffers.get(part)
        if own is None:
            return None
        tensor = getattr(module, leaf, own)
        if not isinstance(tensor, Tensor) or tensor.ndim < own.ndim:
            tensor = own
        return _Weight((owner, leaf), module, tensor.detach())

    def _role(self, axis: Axis) -> str | None:
        key = (axis.tensor, axis.dim)
        if key not in self._roles:
            weight = self._weight(axis.tensor)
            role = None
            if weight is not None and weight.tensor.shape[axis.dim] == axis.units.shape[-1]:
                role = role_of(weight.module, weight.key[1], weight.tensor, axis.dim)
            self._roles[key] = role
        return self._roles[key]


def role_of(module: nn.Module, leaf: str, tensor: Tensor, dim: int) -> str | None:
    """What an axis of a module's tensor is to the channels on it; None: nothing to score."""
    if "bias" in leaf:
        return "bias" if tensor.ndim == 1 else "other"
    if isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
        return "norm" if leaf == "weight" else None
    if isinstance(module, nn.PReLU):
        return "other"
    if leaf == "weight" and tensor.ndim == 1:  # somebody's own normalisation
        return "norm"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag | _ConvTransposeNd):
        return ("input", "filter", "other")[min(dim, 2)]
    if isinstance(module, _ConvNd):
        return ("filter", "input", "other")[min(dim, 2)]
    if any(word in leaf for word in ("pos", "token", "cls", "class", "embed")):
        return "other"
    if sum(size > 1 for size in tensor.shape) < 2:
        return "other"
    return "filter" if dim == 0 else "input"
