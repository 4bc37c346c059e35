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


def test_what_cannot_shrink_is_left_alone():
    groups = [group("a", 8, "a"), group("b", 8, "b", "network output"), group("c", 1, "c")]
    assert all(cut[1] == 8 and cut[2] == 1 for cut in cuts(groups, many=True))
    assert cuts(groups[1:], many=True) == []
