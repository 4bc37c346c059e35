"""The cuts that are rehearsed tell every group from every other."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bevel.graph.grouping import Axis, ChannelGroup
from bevel.graph.trials import TINY, trials


def group(name: str, size: int, module: str, frozen: str | None = None) -> ChannelGroup:
    axis = Axis(f"{module}.weight", 0, np.arange(size))
    return ChannelGroup(name, size, (axis,), None, frozen)


def cuts(groups: list[ChannelGroup], *, many: bool) -> list[dict[int, int]]:
    """Per trial, what is left of each group."""
    grouping = SimpleNamespace(groups=groups)
    return [
        {n: int(keep[n].sum()) if n in keep else g.size for n, g in enumerate(groups)}
        for keep in trials(grouping, many=many)
    ]


def test_wide_groups_need_one_rehearsal_with_lengths_that_are_all_different():
    found = cuts([group(str(i), 64, f"block{i}.conv") for i in range(20)], many=False)
    assert len(found) == 1
    left = list(found[0].values())
    assert len({*left, 64}) == 21


def test_within_a_module_lengths_are_two_apart_where_there_are_enough():
    found = cuts([group(str(i), 16, "block.conv") for i in range(6)], many=False)
    gaps = [abs(a - b) for a, b in combinations(found[0].values(), 2)]
    assert min(gaps) >= 2


sizes = st.lists(st.integers(2, 9), min_size=2, max_size=12)


@settings(max_examples=100, deadline=None)
@given(sizes)
def test_any_two_groups_of_a_small_network_are_cut_differently_at_least_once(widths):
    groups = [group(str(i), n, "net.conv") for i, n in enumerate(widths)]
    found = cuts(groups, many=True)
    for a, b in combinations(range(len(widths)), 2):
        assert any((cut[a] == groups[a].size) != (cut[b] == groups[b].size) for cut in found)
    assert all(1 <= left <= groups[n].size for cut in found for n, left in cut.items())


@pytest.mark.parametrize("width, more", [(TINY - 1, True), (TINY, False)])
def test_tiny_lengths_that_agree_in_a_module_need_more_cuts(width, more):
    found = cuts([group(str(i), width, "net.conv") for i in range(2 * width)], many=False)
    assert (len(found) > 2) == more


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(2, TINY - 1), st.integers(0, 3)), min_size=2, max_size=24))
def test_tiny_groups_of_one_module_are_told_apart_among_any_number_of_modules(drawn):
    groups = [group(str(i), n, f"net.block{home}.conv") for i, (n, home) in enumerate(drawn)]
    found = cuts(groups, many=False)
    for a, b in combinations(range(len(drawn)), 2):
        if drawn[a][1] == drawn[b][1]:
            whole = (groups[a].size, groups[b].size)
            assert any(cut[a] != cut[b] and (cut[a], cut[b]) != whole for cut in found)


def test_tiny_groups_of_many_modules_take_no_more_cuts_than_those_of_one():
    one = [group(str(i), 3, "net.block0.conv") for i in range(3)]
    eight = [group(str(i), 3, f"net{i // 3}.block.conv") for i in range(24)]
    assert len(cuts(eight, many=False)) <= len(cuts(one, many=False))


def test_what_cannot_shrink_is_left_alone():
    groups = [group("a", 8, "a"), group("b", 8, "b", "network output"), group("c", 1, "c")]
    assert all(cut[1] == 8 and cut[2] == 1 for cut in cuts(groups, many=True))
    assert cuts(groups[1:], many=True) == []
