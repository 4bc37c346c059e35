"""From a request to a plan: analyse, score, allocate, and check that the result runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from bevel.core import plugins
from bevel.core.errors import PruningError
from bevel.core.garbage import without_collection
from bevel.graph.couplings import Analysis, analyze
from bevel.graph.record import ExampleInputs
from bevel.pruning.allocate import Allocator, Problem, RankedGroup, rank_all
from bevel.pruning.plan import PruningPlan, make_plan
from bevel.pruning.scoring import check_calibration, check_reduction, score_groups
from bevel.pruning.sensitivity import Sensitivity

LabelledBatches = Iterable[tuple[Tensor, Tensor]]
"""Re-iterable batches of images (N, C, H, W) and labels (N,)."""


@without_collection()
def plan_pruning(
    net: nn.Module,
    example_inputs: ExampleInputs,
    *,
    criterion: str = "l2",
    allocate: str = "global",
    reduction: str = "mean",
    ratio: float | None = None,
    budget: Mapping[str, float] | None = None,
    align: int = 8,
    ignore: Sequence[str] = (),
    calibration: LabelledBatches | None = None,
    folder: Path | None = None,
    seed: int = 0,
) -> PruningPlan:
    """Choose what to remove. The network is not changed.

    Args:
        net: the trained network.
        example_inputs: a tensor or the forward's positional arguments.
        criterion: how channels are scored (`bevel list criteria`).
        allocate: how the cut is spread over the groups (`bevel list allocators`).
        reduction: how the scores of a group's members become one: mean, max, product (their
            geometric mean), or first (the producer's filters only, as pruning layer by layer does).
        ratio: what is removed, as a share of the prunable channels (0.5: half of them).
        budget: what may remain, as fractions ({"macs": 0.5, "params": 0.6}); all must hold.
        align: widths become multiples of this, by keeping the best extra channels; a group that
            is no wider keeps its width. Of attention heads it is the width of one head, and whole
            heads go one by one.
        ignore: module names or globs whose output channels all stay.
        calibration: re-iterable batches of (images (N, C, H, W), labels (N,)), held out from
            training, for allocators that measure and criteria that look at images. Criteria that
            need no labels take batches of images alone, too.
        folder: where scores that were found on images are kept, and found again for the same
            network, criterion and images; without it they are not kept.
        seed: for criteria that draw random numbers.

    Raises:
        PruningError: the request contradicts itself or cannot be met; says what can be, in
            words and in the attribute `reachable`.
        UnknownNameError: no such criterion or allocator.
        ModelError: the network does not run on the example inputs.
    """
    limits = _limits(ratio, budget)
    allocator = _named(criterion, allocate, reduction, calibration)
    if align < 1:
        raise PruningError(f"align is {align}, expected 1 or more")
    analysis = analyze(net, example_inputs, ignore=ignore)
    scores = score_groups(
        net,
        analysis,
        criterion,
        reduction=reduction,
        calibration=calibration,
        folder=folder,
        seed=seed,
    )
    request: dict[str, Any] = {
        "criterion": criterion,
        "allocate": allocate,
        "reduction": reduction,
        "align": align,
        "seed": seed,
    }
    request |= {"ratio": ratio} if ratio is not None else {"budget": dict(budget or {})}
    groups = rank_all(analysis, scores, align)
    open_groups = [group for group in groups if len(group.levels) > 1]
    notes = _notes(analysis, _reasons(analysis, groups, criterion))
    problem = Problem(analysis, open_groups, limits, notes=notes)
    if allocator.NEEDS_CALIBRATION and calibration is not None:
        degradation = Sensitivity(net, analysis, calibration)
        problem = dataclasses.replace(problem, degradation=degradation)
    kept = allocator.allocate(problem)
    keep = {g.index: g.keep_mask(int(k)) for g, k in zip(open_groups, kept, strict=True)}
    return make_plan(analysis, keep, request=request, notes=notes)


def _named(
    criterion: str, allocate: str, reduction: str, calibration: LabelledBatches | None
) -> Allocator:
    """The allocator; all three exist and have the images that they need, or it is an error."""
    allocator: Allocator = plugins.load("allocators", allocate)
    plugins.find("criteria", criterion)
    check_reduction(reduction)
    if calibration is None:
        check_calibration(criterion)
        if allocator.NEEDS_CALIBRATION:
            raise PruningError(
                f"the allocator '{allocate}' measures on held-out images: pass calibration"
            )
    return allocator


def _limits(ratio: float | None, budget: Mapping[str, float] | None) -> dict[str, float]:
    if (ratio is None) == (budget is None):
        raise PruningError("give either ratio (what is removed) or budget (what may remain)")
    if ratio is not None:
        if not 0 < ratio < 1:
            raise PruningError(f"ratio is {ratio}, expected a share between 0 and 1")
        return {"channels": 1 - ratio}
    limits = dict(budget or {})
    if not limits:
        raise PruningError("the budget is empty, expected macs, params or both")
    for name, limit in limits.items():
        if name not in ("macs", "params"):
            raise PruningError(f"no budget called '{name}'. Available: macs, params.")
        if not 0 < limit <= 1:
            raise PruningError(
                f"the {name} budget is {limit}, expected a fraction above 0, up to 1"
            )
    return limits


def _reasons(analysis: Analysis, ranked: Sequence[RankedGroup], criterion: str) -> dict[int, str]:
    """Why groups stay whole, by their position; a single run has nothing that could go."""
    reasons = {i: g.frozen for i, g in enumerate(analysis.groups) if g.frozen is not None}
    reasons |= {group.index: group.narrow for group in ranked if len(group.levels) == 1}
    scored = {group.index for group in ranked}
    for index in range(len(analysis.groups)):
        if index not in reasons and index not in scored:
            reasons[index] = f"the criterion '{criterion}' has nothing to score in it"
    groups = analysis.groups
    return {i: r for i, r in reasons.items() if groups[i].size > 1 or not groups[i].runs}


def _notes(analysis: Analysis, reasons: Mapping[int, str]) -> list[str]:
    """What stays whole and why, dearest first; groups that stay for one reason share a line.

    Reasons are one if they differ only in numbers, as those of the blocks of a network do. A
    line's share of the MACs is that of all calls whose size depends on any of its groups.
    """
    alike: dict[str, list[int]] = {}
    for index, reason in reasons.items():
        alike.setdefault(re.sub(r"\d+", "*", reason), []).append(index)
    shares = _shares_touched(analysis, list(alike.values()))
    lines = []
    for indices, share in zip(alike.values(), shares, strict=True):
        groups = [analysis.groups[index] for index in indices]
        name, sizes = groups[0].name, sorted({group.size for group in groups})
        if len(groups) > 1:
            name += f" and {len(groups) - 1} more"
        width = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
        touched = f"{share:.0%}" if share >= 0.01 else "under 1%"
        reason = _common([reasons[index] for index in indices])
        lines.append((share, f"{name} ({width}; {touched} of MACs): {reason}"))
    lines.sort(key=lambda line: -line[0])
    return [line for _, line in lines]


def _common(reasons: Sequence[str]) -> str:
    """Texts that differ only in numbers as one, with a star where they do."""
    columns = zip(*(re.split(r"(\d+)", reason) for reason in reasons), strict=True)
    return "".join(column[0] if len(set(column)) == 1 else "*" for column in columns)


def _shares_touched(analysis: Analysis, sets: Sequence[Sequence[int]]) -> list[float]:
    """For each set of groups, the share of the MACs in calls whose size depends on any of them."""
    macs, _ = analysis.totals
    values = macs.each(analysis.shares(analysis.full()))
    touched = []
    for indices in sets:
        groups = np.zeros(len(analysis.groups) + 1, dtype=bool)
        groups[list(indices)] = True
        touched.append(float(values[macs.touched(groups)].sum()))
    everything = max(analysis.cost().macs, 1)
    return [share / everything for share in touched]
