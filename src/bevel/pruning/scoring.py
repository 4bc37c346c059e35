"""Score every unit of every channel group with a criterion."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bevel.core import plugins
from bevel.core.progress import track
from bevel.graph.couplings import Analysis, Axis, ChannelGroup
from bevel.pruning.criteria import Criterion, Member


def score_groups(
    net: nn.Module, analysis: Analysis, criterion: str, *, seed: int = 0
) -> dict[int, np.ndarray]:
    """Scores per prunable group: index in `analysis.groups` -> (size,) float64, low goes first.

    A criterion whose scores differ in unit between layers is divided by each group's mean, which
    makes them comparable. A group the criterion has nothing to say about is left out.

    Raises:
        UnknownNameError: there is no such criterion.
    """
    plugin: Criterion = plugins.load("criteria", criterion)
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(net.named_parameters())
    modules = dict(net.named_modules())
    scores: dict[int, np.ndarray] = {}
    for index, group in track(
        list(enumerate(analysis.groups)), f"scoring ({criterion})", len(analysis.groups)
    ):
        if group.frozen is not None:
            continue
        members = list(_members(group, parameters, modules))
        value = plugin.score(members, group.size, generator)
        if value is None:
            continue
        if not plugin.COMPARABLE:
            value = value / value.mean().clamp(min=1e-30)
        scores[index] = value.numpy()
    return scores


def _members(
    group: ChannelGroup, parameters: dict[str, nn.Parameter], modules: dict[str, nn.Module]
) -> Iterator[Member]:
    for axis in group.axes:
        parameter = parameters.get(axis.tensor)
        if parameter is None:  # a buffer: statistics are not scored
            continue
        owner, _, leaf = axis.tensor.rpartition(".")
        role = _role(modules[owner], leaf, axis.dim)
        if role is not None:
            rows = _rows(parameter.detach(), axis)
            units = torch.from_numpy(axis.units.reshape(-1))
            live = units >= 0
            yield Member(axis.tensor, role, rows[live], units[live])


def _role(module: nn.Module, leaf: str, dim: int) -> str | None:
    """What a parameter's axis is to the channels on it."""
    if leaf == "bias":
        return "bias"
    if leaf != "weight":
        return None
    if isinstance(module, _ConvTransposeNd):
        return ("input", "filter")[dim] if dim < 2 else None
    if isinstance(module, _ConvNd | nn.Linear):
        return ("filter", "input")[dim] if dim < 2 else None
    if isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm):
        return "norm"
    return None


def _rows(weight: Tensor, axis: Axis) -> Tensor:
    """One row of weights per index of the axis, in the order of `axis.units.reshape(-1)`."""
    if axis.units.ndim == 1:
        return weight.movedim(axis.dim, 0).reshape(weight.shape[axis.dim], -1)
    blocks = axis.units.shape[0]
    split = weight.reshape(blocks, weight.shape[0] // blocks, *weight.shape[1:])
    return split.movedim(axis.dim + 1, 1).reshape(axis.units.size, -1)
