"""Cuts to rehearse: which amounts of which groups tell one size from another."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from bevel.graph.grouping import ChannelGroup, Grouping

TINY = 16
"""Lengths below this agree by chance in two random cuts too often to rely on it."""


def trials(grouping: Grouping, *, many: bool) -> Iterator[dict[int, np.ndarray]]:
    """Masks that cut the groups that can shrink, so that the cuts can be told from each other.

    If the first cut leaves each group a length that no other length equals, what the code does
    with it is seen in one rehearsal. Otherwise sizes may agree by chance, and a second cut is
    random. With `many` each two groups differ in one more cut at least, without it those whose tiny
    lengths agree within one module.
    """
    lengths = {
        number: _rows(group).shape[1]
        for number, group in enumerate(grouping.groups)
        if group.frozen is None and _rows(group).shape[1] > 1
    }
    generator = np.random.default_rng(0)
    counts, distinct, alike = _distinct(grouping, lengths)
    cuts = [counts]
    if many or not distinct:
        cuts.append({number: int(generator.integers(n)) for number, n in lengths.items()})
    ranks = {n: rank for rank, n in enumerate(lengths)} if many else _ranks(alike)
    cuts += _told_apart({number: (rank, lengths[number]) for number, rank in ranks.items()})
    for counts in cuts:
        keep = _cut(grouping, counts, generator)
        if keep:
            yield keep


def _distinct(
    grouping: Grouping, lengths: Mapping[int, int]
) -> tuple[dict[int, int], bool, dict[int, set[int]]]:
    """Per group, how many go: what is left differs from all else, as far as it can.

    And whether it does; and the groups of tiny lengths for which it does not even do so within
    their modules, each with those before it that it cannot be told from.
    """
    counts: dict[int, int] = {}
    everywhere = {_rows(group).shape[1] for group in grouping.groups}
    inside: defaultdict[str, defaultdict[int, set[int]]]
    inside = defaultdict(lambda: defaultdict(set))
    distinct, alike = True, {}
    for number, length in lengths.items():
        homes = _homes(grouping.groups[number])
        near = {left for home in homes for left in inside[home]}
        # Half of two lengths that differ by one is the smaller of them: two is better.
        around = {left + by for left in near for by in (-1, 0, 1)}
        usual = 1 + number % max(length // 2, 1)
        order = [*range(length - usual, 0, -1), *range(length - 1, length - usual, -1)]
        left = next((n for n in order if n not in everywhere and n not in around), None)
        if left is None:
            distinct = False
            left = next((n for n in order if n not in around), None)
        if left is None:
            left = next((n for n in order if n not in near), None)
        if left is None:
            left = length - usual
            if length < TINY:
                alike[number] = set().union(*(inside[home][left] for home in homes))
        counts[number] = length - left
        everywhere.add(left)
        for home in homes:
            inside[home][left].add(number)
    return counts, distinct, alike


def _ranks(alike: Mapping[int, set[int]]) -> dict[int, int]:
    """Small numbers for these groups, different ones for those that cannot be told apart."""
    ranks: dict[int, int] = {}
    for number, others in alike.items():
        for other in sorted(others):
            ranks.setdefault(other, 0)
        taken = {ranks[other] for other in others}
        ranks[number] = next(rank for rank in itertools.count() if rank not in taken)
    return ranks


def _homes(group: ChannelGroup) -> set[str]:
    """The modules that hold the group's parameters, and those around these."""
    owners = {axis.tensor.rpartition(".")[0] for axis in group.axes}
    return owners | {owner.rpartition(".")[0] for owner in owners if "." in owner}


def _told_apart(ranked: Mapping[int, tuple[int, int]]) -> list[dict[int, int]]:
    """Cuts by much or not at all, by each bit of a group's rank, and by its complement.

    Two groups of different ranks differ in one of them, and a size that is too large shows in
    another way than one that is too small. `ranked`: rank and length of each group.
    """
    bits = max((rank for rank, _ in ranked.values()), default=0).bit_length()
    return [
        {
            number: (length - 1) * ((rank >> bit & 1) == value)
            for number, (rank, length) in ranked.items()
        }
        for bit in range(bits)
        for value in (0, 1)
    ]


def _rows(group: ChannelGroup) -> np.ndarray:
    """(blocks, n): unit positions, of which every block keeps equally many."""
    return group.blocks if group.blocks is not None else np.arange(group.size)[None]


def _cut(
    grouping: Grouping, counts: Mapping[int, int], generator: np.random.Generator
) -> dict[int, np.ndarray]:
    """Masks that drop so many random units of each block."""
    keep = {}
    for number, count in counts.items():
        if count:
            group = grouping.groups[number]
            keep[number] = np.ones(group.size, dtype=bool)
            for row in _rows(group):
                keep[number][generator.permutation(row)[:count]] = False
    return keep
