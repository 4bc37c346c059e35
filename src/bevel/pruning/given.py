"""Ratios that the user gives layer by layer."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import numpy as np

from bevel.core.errors import PruningError, suggestion
from bevel.graph.couplings import Analysis, ChannelGroup
from bevel.pruning.allocate import RankedGroup


def given(
    analysis: Analysis, groups: Sequence[RankedGroup], ratios: Mapping[str, float]
) -> np.ndarray:
    """Kept rows per group, int64 of shape (groups,).

    A glob means the groups of every module that it matches; of several that match a group the last
    holds, so that `{"*": 0.5, "stem": 0}` says what it seems to. What no glob matches stays whole.

    Args:
        analysis: the network.
        groups: all that are ranked.
        ratios: glob of module names -> share of the channels to remove; widths are rounded up.

    Raises:
        PruningError: a ratio is out of range, or a glob matches nothing that can shrink.
    """
    if not ratios:
        raise PruningError("ratios is empty, expected globs of module names, such as layer1.*: 0.5")
    kept = np.array([group.size for group in groups], dtype=np.int64)
    names = [_modules(analysis.groups[group.index]) for group in groups]
    for glob, ratio in ratios.items():
        if not 0 <= ratio < 1:
            raise PruningError(f"the ratio of '{glob}' is {ratio}, expected a share from 0 below 1")
        met = [i for i, own in enumerate(names) if fnmatch.filter(own, glob)]
        if ratio and all(len(groups[i].levels) == 1 for i in met):
            raise PruningError(_nothing(analysis, groups, glob))
        for i in met:
            kept[i] = groups[i].fit((1 - ratio) * groups[i].size)
    return kept


def _modules(group: ChannelGroup) -> list[str]:
    """The group's name, and the modules whose outputs are of the group."""
    owners = (axis.tensor.rpartition(".")[0] for axis in group.axes if axis.dim == 0)
    return list(dict.fromkeys([group.name, *owners]))


def _nothing(analysis: Analysis, groups: Sequence[RankedGroup], glob: str) -> str:
    """Why a glob matches nothing that can shrink."""
    stuck = {group.index: group.narrow for group in groups if len(group.levels) == 1}
    for index, group in enumerate(analysis.groups):
        reason = group.frozen or stuck.get(index)
        if reason is not None and fnmatch.filter(_modules(group), glob):
            return f"ratios: '{glob}' matches only what keeps its width: {group.name}: {reason}"
    names = [group.name for group in groups if group.index not in stuck]
    return f"ratios: no channel group of '{glob}'. {suggestion(glob, names)}"
