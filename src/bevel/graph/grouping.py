"""From ids to channel groups: what is one and the same, what goes together, what is alike.

Union-find over single indices gives the exact sets. Two indices are in one group when they touch
the same axes of the same parameters in the same way, so any of them can be removed in place of
another and a group's cost depends only on how many of its units stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bevel.graph.components import merged
from bevel.graph.cost import Length
from bevel.graph.layers import Extent
from bevel.graph.nodes import NodeTable
from bevel.graph.propagate import Blocks, Mark, Propagation

EMPTY = np.zeros(0, dtype=np.int64)


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

    Attributes:
        name: the module whose output the units are.
        size: how many there are.
        axes: what of the parameters they are.
        blocks: (b, n / b) unit positions; every block must keep equally many. None: no such rule.
        frozen: why none of the units can be removed, or None.
        inexact: why removing them is not the same as setting them to zero, or None.
        runs: whether a unit is a run of other groups' units, as an attention head is.
    """

    name: str
    size: int
    axes: tuple[Axis, ...]
    blocks: np.ndarray | None
    frozen: str | None
    inexact: str | None = None
    runs: bool = False


@dataclass(frozen=True, eq=False)
class _Entry:
    """Ids along one axis of a parameter: its own, or the nodes that hold them (0: none)."""

    tensor: str
    dim: int
    ids: np.ndarray
    node: bool


class Grouping:
    """The groups of a propagation, and lengths in terms of them."""

    def __init__(self, state: Propagation, table: NodeTable) -> None:
        self.state = state
        self._same = table.same
        self.class_of = table.tied()
        self._slots = table.slots(self.class_of)
        self.entries = list(self._entries(table))
        # Of all entries, one after the other; not kept, as there are many.
        ids = np.concatenate([EMPTY, *(entry.ids.reshape(-1) for entry in self.entries)])
        self._blocks = self._resolve_blocks(ids)
        self._reasons = self._marked(state.frozen)
        self._freeze_blocks()
        self._inexact = self._marked(state.inexact)
        self._lengths: dict[tuple[Any, ...], Length] = {}
        self._of_extent: dict[Extent, Length] = {}
        self._group_of, self._position, self._members, self.groups = self._collect(ids)

    # -- nodes ----------------------------------------------------------------------------

    def nodes(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """The nodes that hold these ids, level by level, 0 where there is none."""
        same = self._same[ids]
        for slot in self._slots:
            held = slot[same]
            if held.any():
                yield held

    def _entries(self, table: NodeTable) -> Iterator[_Entry]:
        classes = table.classes() if len(self._slots) else EMPTY
        levels = [slot[classes] for slot in self._slots]
        held = [np.logical_or.reduceat(level != 0, table.starts) for level in levels]
        for number, ((name, dim, ids), start) in enumerate(
            zip(table.axes, table.starts, strict=True)
        ):
            yield _Entry(name, dim, ids, node=False)
            for level, holds in zip(levels, held, strict=True):
                if holds[number]:
                    nodes = level[start : start + ids.size].reshape(ids.shape)
                    yield _Entry(name, dim, nodes, node=True)

    # -- constraints ----------------------------------------------------------------------

    def _signatures(self, ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """For each class, a hash of its signature: which axes it touches, how often.

        A random 64-bit number stands for each axis, and the sum of those that it touches for a
        class; two of a million classes share a sum by chance in 3 of 10^8 networks.
        """
        sums = np.zeros(int(self.class_of.max()) + 1, dtype=np.uint64)
        np.add.at(sums, self.class_of[ids], labels)
        return sums

    def _labels(self) -> np.ndarray:
        """For each id of each entry, the number that stands for its axis."""
        numbers: dict[tuple[str, int, bool], int] = {}
        axes = [numbers.setdefault((e.tensor, e.dim, e.node), len(numbers)) for e in self.entries]
        hashes = _mixed(np.arange(1, len(numbers) + 1, dtype=np.uint64))
        labels: np.ndarray = np.repeat(hashes[axes], [entry.ids.size for entry in self.entries])
        return labels

    def _resolve_blocks(self, ids: np.ndarray) -> list[np.ndarray]:
        """Equal-count constraints as (b, n) arrays of classes.

        Where units of one block are not interchangeable, or two constraints cut the same units
        differently, the units at equal positions are tied instead, which always keeps the counts
        equal.
        """
        constraints = [*self.state.blocks, *self._node_blocks()]
        pending = list(constraints)
        labels = self._labels()
        while True:
            self.signatures = self._signatures(ids, labels)
            kept, clash = self._compatible(pending)
            if not clash:
                return kept
            rows = [(live[0], row) for c in clash for live in (_live(c.ids),) for row in live[1:]]
            pending = [c for c in pending if not any(c is t for t in clash)]
            self.class_of = merged(self.class_of, rows)

    def _compatible(self, constraints: Sequence[Blocks]) -> tuple[list[np.ndarray], list[Blocks]]:
        """The constraints that hold as they are, and those whose units have to be tied."""
        signatures = self.signatures
        kept: dict[bytes, np.ndarray] = {}
        owned = np.zeros(len(signatures), dtype=bool)
        clash: list[Blocks] = []
        for constraint in constraints:
            live = _live(constraint.ids)
            if live.shape[1] == 0 or len(live) == 1:
                continue
            classes = self.class_of[live]
            ordered = np.sort(classes, axis=1)
            if (ordered == ordered[0]).all():  # every block holds the same units
                continue
            key = ordered[np.lexsort(ordered.T[::-1])].tobytes()
            if key in kept:
                continue
            flat = np.unique(classes)
            distinct = flat.size == classes.size
            alike = bool((signatures[flat] == signatures[flat[0]]).all())
            fresh = not owned[flat].any()
            if distinct and alike and fresh and live.shape == constraint.ids.shape:
                kept[key] = classes
                owned[flat] = True
            else:
                clash.append(constraint)
        return list(kept.values()), clash

    def _node_blocks(self) -> Iterator[Blocks]:
        """Blocks that must stay equal when nodes go: equally many nodes in each block."""
        for constraint in self.state.blocks:
            if constraint.whole:
                continue
            for held in self.nodes(constraint.ids):
                rows = [np.unique(row[row != 0]) for row in held]
                sizes = {row.size for row in rows}
                merged = np.concatenate(rows)
                inside = len(np.unique(merged)) == merged.size and len(sizes) == 1
                if inside and 0 not in sizes:
                    yield Blocks(np.stack(rows), constraint.where)
                elif merged.size:
                    self.state.frozen.append(Mark(np.unique(merged), constraint.where, True))

    def _marked(self, marks: Sequence[Mark]) -> _Said:
        """What is said of each class; the first reason met counts."""
        said = _Said(len(self.class_of))
        for mark in marks:
            for ids in [mark.ids] if mark.level else [mark.ids, *self.nodes(mark.ids)]:
                said.say(self.class_of[ids[ids != 0]], mark.reason)
        return said

    def _freeze_blocks(self) -> None:
        """A block or node with a fixed element stays; one frozen unit freezes its constraint."""
        reasons = self._reasons
        for family in self.state.nodes.values():
            fixed = family.nodes[(family.leaves == 0).any(axis=1)]
            reasons.say(self.class_of[fixed], "it holds a fixed part")
        for constraint in self.state.blocks:
            columns = constraint.ids[:, (constraint.ids == 0).any(axis=0)]
            where = f"a block has a fixed part: {constraint.where}"
            reasons.say(self.class_of[columns[columns != 0]], where)
        for classes in self._blocks:
            stuck = reasons.first(classes)
            if stuck is not None:
                reasons.say(classes.reshape(-1), stuck)

    # -- groups ---------------------------------------------------------------------------

    def _collect(
        self, ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], list[ChannelGroup]]:
        """Group and position of each class, the classes of each group, and the groups."""
        count = int(self.class_of.max()) + 1
        group_of = np.full(count, -1, dtype=np.int64)
        position = np.full(count, -1, dtype=np.int64)
        if not self.entries:
            return group_of, position, [], []
        constraint_of = np.full(count, -1, dtype=np.int64)
        for index, classes in enumerate(self._blocks):
            constraint_of[classes] = index
        order = self._in_order(ids, count)
        kinds = _combined(
            self.signatures[order],
            self._reasons.of(order),
            self._inexact.of(order),
            constraint_of[order],
        )
        group = _numbered(kinds)
        group_of[order] = group
        ends = np.cumsum(np.bincount(group))
        members = np.split(order[np.argsort(group, kind="stable")], ends[:-1])
        for units in members:
            position[units] = np.arange(len(units))
        touching, runs = self._axes_by_group(ids, group_of, position, len(members))
        names = _names(touching)
        groups = []
        for number, units in enumerate(members):
            unit = units[:1]
            constraint = int(constraint_of[unit[0]])
            groups.append(
                ChannelGroup(
                    name=names[number],
                    size=len(units),
                    axes=tuple(touching[number]),
                    blocks=position[self._blocks[constraint]] if constraint >= 0 else None,
                    frozen=self._reasons.first(unit),
                    inexact=self._inexact.first(unit),
                    runs=runs[number],
                )
            )
        return group_of, position, members, groups

    def _in_order(self, ids: np.ndarray, count: int) -> np.ndarray:
        """The classes that lie along an axis, in the order in which they are met."""
        classes = self.class_of[ids[ids != 0]]
        places = np.arange(len(classes))
        first = np.zeros(count, dtype=np.int64)
        first[classes[::-1]] = places[::-1]  # of several places, the last one written stays
        found: np.ndarray = classes[first[classes] == places]
        return found

    def _axes_by_group(
        self, ids: np.ndarray, group_of: np.ndarray, position: np.ndarray, count: int
    ) -> tuple[list[list[Axis]], list[bool]]:
        touching: list[list[Axis]] = [[] for _ in range(count)]
        runs = [False] * count
        classes = self.class_of[ids]
        owners, units = np.where(ids == 0, -1, group_of[classes]), position[classes]
        ends = np.cumsum([entry.ids.size for entry in self.entries], dtype=np.int64)
        starts = np.r_[0, ends[:-1]]
        changed = np.r_[False, owners[1:] != owners[:-1]]
        changed[starts] = False
        mixed = np.logical_or.reduceat(changed, starts)  # several groups along one entry
        for entry, start, end, several in zip(self.entries, starts, ends, mixed, strict=True):
            own, places = owners[start:end], units[start:end]
            for number in _distinct(own) if several else [int(own[0])]:
                if number >= 0:
                    mine = np.where(own == number, places, -1) if several else places
                    axis = Axis(entry.tensor, entry.dim, mine.reshape(entry.ids.shape))
                    touching[number].append(axis)
                    runs[number] |= entry.node
        return touching, runs

    def group_of(self, ids: np.ndarray) -> np.ndarray:
        """The group of each id, -1 where there is none."""
        found: np.ndarray = np.where(ids == 0, -1, self._group_of[self.class_of[ids]])
        return found

    def same(self, ids: np.ndarray) -> np.ndarray:
        """Classes of ids that are one and the same index."""
        found: np.ndarray = self._same[ids]
        return found

    def plain_axes(self, modules: Sequence[str]) -> list[np.ndarray]:
        """The ids of the parameter axes of the first of these modules that has any.

        Those of grouped convolutions, which hold several channels at one position, are left out.
        """
        plain = [entry for entry in self.entries if not entry.node and entry.ids.ndim == 1]
        for module in modules:
            own = f"{module}." if module else ""
            found = [entry.ids for entry in plain if entry.tensor.startswith(own)]
            if found:
                return found
        return []

    def ids_of(self, number: int) -> np.ndarray:
        """All ids of a group."""
        return np.flatnonzero(self.group_of(np.arange(self.state.count)) == number)

    def length(self, extent: Extent) -> Length:
        """An extent in terms of the groups; the blocks of a grouped axis share one length."""
        known = self._of_extent.get(extent)
        if known is None:
            ids = extent.ids
            key = (self._same[ids].tobytes(), ids.shape, extent.level)  # many are one and the same
            if key not in self._lengths:
                self._lengths[key] = self._length(extent)
            known = self._of_extent[extent] = self._lengths[key]
        return known

    def _length(self, extent: Extent) -> Length:
        flat = extent.ids.reshape(-1)
        divisor = extent.ids.shape[0] if extent.ids.ndim == 2 else 1
        rows, _ = self.members(Extent(flat, extent.level))
        if rows.size and (rows == rows[0]).all():
            numbers = np.zeros(len(rows), dtype=np.int64)
        else:
            numbers = _numbered(_combined(*rows.T))
        counts = np.bincount(numbers) / divisor
        table = np.zeros((len(counts), rows.shape[1]), dtype=np.int64)
        table[numbers] = rows
        free = (table < 0).all(axis=1)
        return Length(float(counts[free].sum()), counts[~free], table[~free])

    def members(self, extent: Extent) -> tuple[np.ndarray, np.ndarray]:
        """(n, depth) groups and unit positions that the n ids of an extent depend on, -1: none."""
        ids = [extent.ids, *([] if extent.level else self.nodes(extent.ids))]
        groups = np.stack([self.group_of(held) for held in ids], axis=1)
        units = np.stack([self._position[self.class_of[held]] for held in ids], axis=1)
        for later in range(1, groups.shape[1]):  # nodes that turned out to be the same
            for earlier in range(later):
                same = (groups[:, later] == groups[:, earlier]) & (
                    units[:, later] == units[:, earlier]
                )
                groups[same, later] = -1
        return groups, units

    def kept(self, keep: dict[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Per id whether it stays, by itself and with the nodes that hold it."""
        by_class = np.ones(len(self._group_of), dtype=bool)
        for number, mask in keep.items():
            by_class[self._members[number]] = mask
        own = by_class[self.class_of]
        own[0] = True
        whole = own.copy()
        every = np.arange(len(own))
        for held in self.nodes(every):
            whole &= own[held]
        return own, whole


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spread 64-bit integers evenly: the finaliser of SplitMix64, Steele et al., OOPSLA 2014."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    spread: np.ndarray = mixed ^ (mixed >> np.uint64(31))
    return spread


def _combined(*columns: np.ndarray) -> np.ndarray:
    """Per row, one 64-bit hash of several columns of integers."""
    combined = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        combined = _mixed(combined ^ column.astype(np.uint64))
    return combined


def _numbered(values: np.ndarray) -> np.ndarray:
    """Per value, its number in the order of first appearance; neighbours are often equal."""
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    _, first, inverse = np.unique(values[starts], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    lengths = np.diff(np.r_[starts, len(values)])
    numbers: np.ndarray = np.repeat(rank[inverse], lengths)
    return numbers


def _distinct(values: np.ndarray) -> list[int]:
    """The distinct values, ascending; neighbours are often equal."""
    flat = values.reshape(-1)
    if flat.size and (flat == flat[0]).all():
        return [int(flat[0])]
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return sorted({*flat[:1].tolist(), *flat[changes + 1].tolist()})


class _Said:
    """What is said of each class: at most one reason."""

    def __init__(self, count: int) -> None:
        self.number = np.full(count, -1, dtype=np.int64)
        self.reasons: dict[str, int] = {}

    def say(self, classes: np.ndarray, reason: str) -> None:
        """Say this of those of the classes of which nothing is said yet."""
        number = self.reasons.setdefault(reason, len(self.reasons))
        self.number[classes[self.number[classes] < 0]] = number

    def of(self, classes: np.ndarray) -> np.ndarray:
        """Per class, the number of its reason, -1 where there is none."""
        found: np.ndarray = self.number[classes]
        return found

    def first(self, classes: np.ndarray) -> str | None:
        """The first reason among these classes."""
        numbers = self.number[classes.reshape(-1)]
        said = numbers[numbers >= 0]
        return list(self.reasons)[int(said[0])] if said.size else None


def _live(ids: np.ndarray) -> np.ndarray:
    """The columns without fixed elements."""
    return ids[:, (ids != 0).all(axis=0)]


def _names(touching: Sequence[Sequence[Axis]]) -> list[str]:
    """The module whose output the units are: the first that owns them on its first axis."""
    taken: set[str] = set()
    names = []
    for axes in touching:
        owners = [axis.tensor.rpartition(".")[0] or axis.tensor for axis in axes if axis.dim == 0]
        first = owners[0] if owners else axes[0].tensor
        name, number = first, 2
        while name in taken:
            name, number = f"{first}#{number}", number + 1
        taken.add(name)
        names.append(name)
    return names
