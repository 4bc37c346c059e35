"""Which slices of which parameters must be removed together: the channel groups of a network."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import nn

from bevel.core.errors import ModelError
from bevel.core.garbage import without_collection
from bevel.core.records import Cost
from bevel.graph.cost import Term, Total
from bevel.graph.grouping import Axis, ChannelGroup, Grouping
from bevel.graph.hardwired import PassChangedError, follow_sizes
from bevel.graph.layers import Extent
from bevel.graph.lifetimes import Buffer, buffers
from bevel.graph.ops import FRAME_HANDLERS, handler
from bevel.graph.propagate import Mark, Propagation, propagate
from bevel.graph.record import ExampleInputs, batch_size, record

__all__ = ["Analysis", "Axis", "AxisReport", "ChannelGroup", "SizeAttribute", "analyze"]


@dataclass(frozen=True, eq=False)
class SizeAttribute:
    """A module attribute whose value is the number of indices that stay.

    Index i stays if unit `units[i, d]` of group `groups[i, d]` stays for every d; group -1 stands
    for what always stays.
    """

    module: str
    attribute: str
    groups: np.ndarray
    units: np.ndarray

    def value(self, keep: Mapping[int, np.ndarray]) -> int:
        """The value with these masks of kept units per group."""
        stays = np.ones(self.groups.shape, dtype=bool)
        for number, mask in keep.items():
            own = self.groups == number
            stays[own] = mask[self.units[own]]
        return int(stays.all(axis=1).sum())


@dataclass(frozen=True)
class AxisReport:
    """What can be done to one axis of one parameter or buffer.

    Attributes:
        tensor: its name.
        dim: the axis.
        size: its length.
        groups: the channel groups whose units lie along it; units of other axes that go with them
            are in `ChannelGroup.axes`.
        status: "prunable"; "constrained" if equal counts have to stay in blocks; "frozen".
        reason: what it is constrained to, or why it is frozen (in part, if groups remain).
    """

    tensor: str
    dim: int
    size: int
    groups: tuple[str, ...]
    status: Literal["prunable", "constrained", "frozen"]
    reason: str | None


@dataclass(frozen=True, eq=False)
class Activation:
    """A tensor of the pass: its elements for one image, and the calls that it is alive in."""

    elements: Term
    dtype: torch.dtype
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Analysis:
    """What can be removed from a network, what cannot and why, and what it all costs."""

    groups: tuple[ChannelGroup, ...]
    macs: tuple[Term, ...]
    params: tuple[Term, ...]
    activations: tuple[Activation, ...]
    attributes: tuple[SizeAttribute, ...]
    shapes: dict[str, tuple[int, ...]] = field(repr=False)

    @property
    def prunable(self) -> list[ChannelGroup]:
        """The groups whose units can be removed."""
        return [group for group in self.groups if group.frozen is None]

    @property
    def frozen(self) -> list[ChannelGroup]:
        """The groups that keep all their units, with the reason."""
        return [group for group in self.groups if group.frozen is not None]

    def axes(self) -> list[AxisReport]:
        """Every axis of every parameter and buffer: prunable, constrained or frozen, and why."""
        touching: dict[tuple[str, int], list[ChannelGroup]] = {}
        for group in self.groups:
            for axis in group.axes:
                touching.setdefault((axis.tensor, axis.dim), []).append(group)
        return [
            _axis_report(tensor, dim, size, touching.get((tensor, dim), []))
            for tensor, shape in self.shapes.items()
            for dim, size in enumerate(shape)
        ]

    def full(self) -> np.ndarray:
        """Kept units per group when nothing is removed."""
        return np.array([group.size for group in self.groups], dtype=np.int64)

    def shares(self, kept: np.ndarray) -> np.ndarray:
        """Kept shares per group, and 1 for what belongs to none."""
        return np.append(kept / np.maximum(self.full(), 1), 1.0)

    @cached_property
    def totals(self) -> tuple[Total, Total]:
        """MACs and parameters as functions of the kept shares."""
        return Total(self.macs), Total(self.params)

    def cost(self, kept: np.ndarray | None = None) -> Cost:
        """MACs of the recorded pass divided by its batch size, and parameters."""
        shares = self.shares(self.full() if kept is None else kept)
        macs, params = self.totals
        return Cost(macs=round(macs.at(shares)), params=round(params.at(shares)))

    def macs_touched(self) -> np.ndarray:
        """For each group, the MACs of the calls whose size depends on it."""
        touched = np.zeros(len(self.groups))
        shares = self.shares(self.full())
        for term in self.macs:
            value = term.at(shares)
            for index in term.touched():
                touched[index] += value
        return touched


def _axis_report(tensor: str, dim: int, size: int, groups: Sequence[ChannelGroup]) -> AxisReport:
    free = [group for group in groups if group.frozen is None]
    stuck = next((group.frozen for group in groups if group.frozen is not None), None)
    blocks = [group for group in free if group.blocks is not None]
    if not groups:
        reason = "nothing in the pass reads it by channel" if size > 1 else "it has length 1"
        return AxisReport(tensor, dim, size, (), "frozen", reason)
    names = tuple(group.name for group in groups)
    if not free:
        return AxisReport(tensor, dim, size, names, "frozen", stuck)
    if blocks:
        counts = [len(group.blocks) for group in blocks if group.blocks is not None]
        reason = f"equal counts in each of {counts[0]} blocks"
        return AxisReport(tensor, dim, size, names, "constrained", reason)
    return AxisReport(tensor, dim, size, names, "prunable", stuck)


def analyze(
    net: nn.Module, example_inputs: ExampleInputs, *, ignore: Sequence[str] = ()
) -> Analysis:
    """Find the channel groups of a network from one recorded forward pass.

    Args:
        net: any module; it is not changed.
        example_inputs: a tensor, the forward's positional arguments, or a mapping of its keyword
            arguments; the first tensor's first dimension is taken as the batch.
        ignore: module names or globs; the channels that these modules produce all stay.

    Raises:
        ModelError: the network cannot be run on these inputs.
    """
    with without_collection():
        for last in (False, True):
            recording = record(net, example_inputs)
            state = propagate(net, recording, handler, FRAME_HANDLERS)
            _ignore(state, ignore)
            try:
                grouping = follow_sizes(net, example_inputs, recording, state)
            except PassChangedError as error:  # the first pass may have filled a cache
                if last:
                    raise ModelError(
                        "the network calls other functions each time it runs on the same inputs, "
                        "so what was recorded of one pass does not hold for the next; make its "
                        "forward deterministic in eval mode"
                    ) from error
            else:
                break
        return _analysis(state, grouping, buffers(recording), batch_size(example_inputs))


def _activation(state: Propagation, grouping: Grouping, buffer: Buffer, batch: int) -> Activation:
    value = buffer.value
    factor, lengths = math.prod(value.shape) / batch, []
    for _, (extent, *_others) in state.shrinking(value):
        factor /= extent.ids.size
        lengths.append(grouping.length(extent))
    return Activation(Term("", factor, tuple(lengths)), value.dtype, buffer.first, buffer.last)


def _ignore(state: Propagation, ignore: Sequence[str]) -> None:
    for name, axes in state.axes.items():
        owner = name.rpartition(".")[0]
        pattern = next((glob for glob in ignore if fnmatch.fnmatchcase(owner, glob)), None)
        if pattern is not None and axes and axes[0] is not None:
            ids = np.unique(axes[0].reshape(-1))
            state.frozen.append(Mark(ids[ids != 0], f"ignored on request ('{pattern}')"))


def _analysis(
    state: Propagation,
    grouping: Grouping,
    held: Sequence[Buffer],
    batch: int,
) -> Analysis:
    macs = tuple(
        Term(term.module, term.factor / batch, tuple(map(grouping.length, term.extents)))
        for term in state.costs
    )
    params = []
    for name, parameter in state.parameters.items():
        if not isinstance(parameter, nn.Parameter):  # a buffer
            continue
        axes = state.axes.get(name, [])
        live = [(dim, ids) for dim, ids in enumerate(axes) if ids is not None]
        factor = float(parameter.numel())
        for dim, _ in live:
            factor /= parameter.shape[dim]
        lengths = tuple(grouping.length(Extent(ids)) for _, ids in live)
        params.append(Term(name.rpartition(".")[0], factor, lengths, name))
    attributes = tuple(
        SizeAttribute(site.module, site.attribute, *grouping.members(site.extents[0]))
        for site in state.sizes
    )
    return Analysis(
        groups=tuple(grouping.groups),
        macs=macs,
        params=tuple(params),
        activations=tuple(_activation(state, grouping, buffer, batch) for buffer in held),
        attributes=attributes,
        shapes={name: tuple(t.shape) for name, t in state.parameters.items()},
    )
