"""Which slices of which parameters must be removed together: the channel groups of a network.

Union-find over single indices gives the exact sets. Two indices are in one group when they touch
the same axes of the same parameters in the same way, so any of them can be removed in place of
another and a group's cost depends only on how many of its units stay.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn

from bevel.core.records import Cost
from bevel.graph.ops import handler
from bevel.graph.propagate import Propagation, SizeSite, propagate
from bevel.graph.record import ExampleInputs, record


@dataclass(frozen=True, eq=False)
class Axis:
    """How a group touches one axis of one parameter.

    `units` holds, for each index along the axis, the position of the unit in the group it belongs
    to, or -1. Its shape is (size,), or (blocks, size) where the index means another channel in
    each block of the parameter's first axis (grouped convolution).
    """

    tensor: str
    dim: int
    units: np.ndarray


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Units that are interchangeable; each is a set of parameter slices that go together.

    `blocks` of shape (b, n / b) lists unit positions; every block must keep equally many.
    `frozen` says why none of the units can be removed, or is None.
    """

    name: str
    size: int
    axes: tuple[Axis, ...]
    blocks: np.ndarray | None
    frozen: str | None


@dataclass(frozen=True, eq=False)
class Length:
    """A length as a function of the groups' kept units: fixed + sum(per_group * kept)."""

    fixed: float
    groups: np.ndarray
    per_unit: np.ndarray

    def at(self, kept: np.ndarray) -> float:
        """The length with these kept units per group."""
        return self.fixed + float((self.per_unit * kept[self.groups]).sum())


@dataclass(frozen=True, eq=False)
class Term:
    """`factor` times the product of lengths; `module` says where."""

    module: str
    factor: float
    lengths: tuple[Length, ...]

    def at(self, kept: np.ndarray) -> float:
        """The value with these kept units per group."""
        value = self.factor
        for length in self.lengths:
            value *= length.at(kept)
        return value


@dataclass(frozen=True, eq=False)
class SizeAttribute:
    """A module attribute whose value is the number of kept units among these."""

    module: str
    attribute: str
    members: tuple[tuple[int, np.ndarray], ...]
    """(group, unit positions) pairs."""
    fixed: int


@dataclass(frozen=True, eq=False)
class Analysis:
    """What can be removed from a network, what cannot and why, and what it all costs."""

    groups: tuple[ChannelGroup, ...]
    macs: tuple[Term, ...]
    params: tuple[Term, ...]
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

    def full(self) -> np.ndarray:
        """Kept units per group when nothing is removed."""
        return np.array([group.size for group in self.groups], dtype=np.int64)

    def cost(self, kept: np.ndarray | None = None) -> Cost:
        """MACs of the recorded pass divided by its batch size, and parameters."""
        kept = self.full() if kept is None else kept
        return Cost(
            macs=round(sum(term.at(kept) for term in self.macs)),
            params=round(sum(term.at(kept) for term in self.params)),
        )

    def macs_touched(self) -> np.ndarray:
        """For each group, the MACs of the calls whose size depends on it."""
        touched = np.zeros(len(self.groups))
        full = self.full()
        for term in self.macs:
            value = term.at(full)
            for index in {int(g) for length in term.lengths for g in length.groups}:
                touched[index] += value
        return touched


def analyze(
    net: nn.Module, example_inputs: ExampleInputs, *, ignore: Sequence[str] = ()
) -> Analysis:
    """Find the channel groups of a network from one recorded forward pass.

    Args:
        net: any module; it is not changed.
        example_inputs: a tensor or the forward's positional arguments; the first tensor's first
            dimension is taken as the batch.
        ignore: module names or globs; the channels that these modules produce all stay.

    Raises:
        ModelError: the network cannot be run on these inputs.
    """
    recording = record(net, example_inputs)
    state = propagate(net, recording, handler)
    for name, axes in state.axes.items():
        owner = name.rpartition(".")[0]
        pattern = next((glob for glob in ignore if fnmatch.fnmatchcase(owner, glob)), None)
        if pattern is not None and axes and axes[0] is not None:
            state.frozen.append((axes[0].reshape(-1), f"ignored on request ('{pattern}')"))
    batch = _batch(example_inputs)
    return _Grouping(net, state, batch).analysis()


def _batch(example_inputs: ExampleInputs) -> int:
    first = example_inputs if not isinstance(example_inputs, Sequence) else example_inputs[0]
    shape = getattr(first, "shape", (1,))
    return int(shape[0]) if len(shape) else 1


class _Grouping:
    """From ids and unions to groups."""

    def __init__(self, net: nn.Module, state: Propagation, batch: int) -> None:
        self.net, self.state, self.batch = net, state, batch
        self.axes = [
            (name, dim, ids)
            for name, dims in state.axes.items()
            for dim, ids in enumerate(dims)
            if ids is not None
        ]
        self.class_of = self._classes(state.unions)
        self.blocks = self._resolve_blocks()
        self.reasons = self._reasons()
        self.group_of, self.position, self.groups = self._groups()

    def _classes(self, unions: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        count = self.state.count
        if not unions:
            return np.arange(count)
        left = np.concatenate([a for a, _ in unions])
        right = np.concatenate([b for _, b in unions])
        graph = coo_matrix((np.ones(len(left), dtype=bool), (left, right)), shape=(count, count))
        labels: np.ndarray = connected_components(graph, directed=False)[1].astype(np.int64)
        return labels

    def _signatures(self) -> np.ndarray:
        """For each class, the number of its signature: which axes it touches, how often."""
        classes = np.concatenate([self.class_of[ids.reshape(-1)] for *_, ids in self.axes])
        labels = np.concatenate(
            [np.full(ids.size, index) for index, (*_, ids) in enumerate(self.axes)]
        )
        pairs, counts = np.unique(np.stack([classes, labels]), axis=1, return_counts=True)
        numbers = np.full(int(self.class_of.max()) + 1, -1, dtype=np.int64)
        known: dict[bytes, int] = {}
        rows = np.stack([pairs[1], counts], axis=1)
        starts = np.flatnonzero(np.r_[True, np.diff(pairs[0]) != 0])
        for start, end in zip(starts, np.r_[starts[1:], len(rows)], strict=True):
            key = rows[start:end].tobytes()
            numbers[pairs[0, start]] = known.setdefault(key, len(known))
        return numbers

    def _resolve_blocks(self) -> list[np.ndarray]:
        """Equal-count constraints as (b, n) arrays of classes.

        Where units of one block are not interchangeable, or two constraints cut the same units
        differently, the units at equal positions are tied instead, which always keeps the counts
        equal.
        """
        if not self.axes:
            return []
        signatures = self._signatures()
        kept: dict[bytes, np.ndarray] = {}
        owner: dict[int, bytes] = {}
        ties: list[tuple[np.ndarray, np.ndarray]] = []
        for constraint in self.state.blocks:
            live = constraint.ids[:, (constraint.ids != 0).all(axis=0)]
            if live.shape[1] == 0:
                continue
            classes = self.class_of[live]
            key = np.sort(classes, axis=1).tobytes()
            distinct = len(np.unique(classes)) == classes.size
            alike = len(np.unique(signatures[classes])) == 1
            fresh = all(owner.get(int(c), key) == key for c in classes.reshape(-1))
            if distinct and alike and fresh and live.shape == constraint.ids.shape:
                kept[key] = classes
                owner.update({int(c): key for c in classes.reshape(-1)})
            else:
                ties += [(live[0], row) for row in live[1:]]
        if ties:
            # Positions are tied within each constraint; constraints kept so far are tied too,
            # because a tie can join their units.
            for constraint in self.state.blocks:
                live = constraint.ids[:, (constraint.ids != 0).all(axis=0)]
                ties += [(live[0], row) for row in live[1:]]
            self.class_of = self._classes([*self.state.unions, *ties])
            return []
        return list(kept.values())

    def _reasons(self) -> dict[int, str]:
        """Class -> why it can never go; the first reason met counts."""
        reasons: dict[int, str] = {}
        for ids, reason in self.state.frozen:
            for index in np.unique(self.class_of[ids]):
                reasons.setdefault(int(index), reason)
        for constraint in self.state.blocks:  # a block with a fixed element
            fixed = constraint.ids[:, (constraint.ids == 0).any(axis=0)]
            for index in np.unique(self.class_of[fixed[fixed != 0]]):
                reasons.setdefault(int(index), f"a block has a fixed part: {constraint.where}")
        for classes in self.blocks:  # equal counts: one frozen unit freezes the constraint
            stuck = next((reasons[int(c)] for c in classes.reshape(-1) if int(c) in reasons), None)
            if stuck is not None:
                for index in classes.reshape(-1):
                    reasons.setdefault(int(index), stuck)
        return reasons

    def _groups(self) -> tuple[np.ndarray, np.ndarray, list[ChannelGroup]]:
        count = int(self.class_of.max()) + 1 if len(self.class_of) else 0
        group_of = np.full(count, -1, dtype=np.int64)
        position = np.full(count, -1, dtype=np.int64)
        if not self.axes:
            return group_of, position, []
        signatures = self._signatures()
        constraint_of: dict[int, int] = {
            int(c): index for index, classes in enumerate(self.blocks) for c in classes.reshape(-1)
        }
        members: dict[tuple[int, str | None, int], list[int]] = {}
        seen: set[int] = set()
        for *_, ids in self.axes:
            for index in self.class_of[ids.reshape(-1)]:
                if int(index) in seen:
                    continue
                seen.add(int(index))
                key = (
                    int(signatures[index]),
                    self.reasons.get(int(index)),
                    constraint_of.get(int(index), -1),
                )
                members.setdefault(key, []).append(int(index))
        for number, classes in enumerate(members.values()):
            group_of[classes] = number
            position[classes] = np.arange(len(classes))
        touching = self._axes_by_group(group_of, position, len(members))
        taken: set[str] = set()
        groups = []
        for number, ((_, reason, constraint), classes) in enumerate(members.items()):
            blocks = position[self.blocks[constraint]] if constraint >= 0 else None
            name = self._name(touching[number], taken)
            groups.append(ChannelGroup(name, len(classes), tuple(touching[number]), blocks, reason))
        return group_of, position, groups

    def _axes_by_group(
        self, group_of: np.ndarray, position: np.ndarray, count: int
    ) -> list[list[Axis]]:
        touching: list[list[Axis]] = [[] for _ in range(count)]
        for name, dim, ids in self.axes:
            classes = self.class_of[ids]
            owners = group_of[classes]
            for number in np.unique(owners):
                units = np.where(owners == number, position[classes], -1)
                touching[int(number)].append(Axis(name, dim, units))
        return touching

    @staticmethod
    def _name(axes: Sequence[Axis], taken: set[str]) -> str:
        """The module whose output the units are: the first that owns them on its first axis."""
        owners = [axis.tensor.rpartition(".")[0] or axis.tensor for axis in axes if axis.dim == 0]
        first = owners[0] if owners else axes[0].tensor
        name, number = first, 2
        while name in taken:
            name, number = f"{first}#{number}", number + 1
        taken.add(name)
        return name

    def _length(self, ids: np.ndarray) -> Length:
        """Kept length of an axis as a function of the groups; blocks share one length."""
        divisor = ids.shape[0] if ids.ndim == 2 else 1
        owners = self.group_of[self.class_of[ids.reshape(-1)]]
        owners = np.where(ids.reshape(-1) == 0, -1, owners)
        fixed = float((owners < 0).sum()) / divisor
        groups, counts = np.unique(owners[owners >= 0], return_counts=True)
        sizes = np.array([self.groups[g].size for g in groups], dtype=np.float64)
        return Length(fixed, groups, counts / divisor / np.maximum(sizes, 1))

    def _attribute(self, site: SizeSite) -> SizeAttribute:
        classes = self.class_of[site.ids]
        owners = self.group_of[classes]
        members = tuple(
            (int(g), self.position[classes[owners == g]]) for g in np.unique(owners[owners >= 0])
        )
        return SizeAttribute(site.module, site.attribute, members, int((owners < 0).sum()))

    def analysis(self) -> Analysis:
        macs = tuple(
            Term(term.module, term.factor / self.batch, tuple(map(self._length, term.lengths)))
            for term in self.state.costs
        )
        params = []
        for name, parameter in self.net.named_parameters():
            axes = self.state.axes.get(name, [])
            live = [(dim, ids) for dim, ids in enumerate(axes) if ids is not None]
            factor = float(parameter.numel())
            for dim, _ in live:
                factor /= parameter.shape[dim]
            owner = name.rpartition(".")[0]
            params.append(Term(owner, factor, tuple(self._length(ids) for _, ids in live)))
        return Analysis(
            groups=tuple(self.groups),
            macs=macs,
            params=tuple(params),
            attributes=tuple(self._attribute(site) for site in self.state.sizes),
            shapes={name: tuple(t.shape) for name, t in self.state.parameters.items()},
        )
