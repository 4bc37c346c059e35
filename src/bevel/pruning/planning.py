"""From a request to a plan: analyse, score, allocate, and check that the result runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from bevel.core import plugins
from bevel.core.errors import PruningError
from bevel.graph.couplings import Analysis, analyze
from bevel.graph.record import ExampleInputs
from bevel.pruning.allocate import Allocator, Problem, RankedGroup, rank
from bevel.pruning.plan import PruningPlan, make_plan
from bevel.pruning.scoring import score_groups
from bevel.pruning.sensitivity import Sensitivity

LabelledBatches = Iterable[tuple[Tensor, Tensor]]


def plan_pruning(
    net: nn.Module,
    example_inputs: ExampleInputs,
    *,
    criterion: str = "l2",
    allocate: str = "global",
    ratio: float | None = None,
    budget: Mapping[str, float] | None = None,
    align: int = 8,
    ignore: Sequence[str] = (),
    calibration: LabelledBatches | None = None,
    seed: int = 0,
) -> PruningPlan:
    """Choose what to remove. The network is not changed.

    Args:
        net: the trained network.
        example_inputs: a tensor or the forward's positional arguments.
        criterion: how channels are scored (`bevel list criteria`).
        allocate: how the cut is spread over the groups (`bevel list allocators`).
        ratio: what is removed, as a share of the prunable channels (0.5: half of them).
        budget: what may remain, as fractions ({"macs": 0.5, "params": 0.6}); all must hold.
        align: widths become multiples of this, by keeping the best extra channels; a group that
            is no wider keeps its width.
        ignore: module names or globs whose output channels all stay.
        calibration: re-iterable batches of (images (N, C, H, W), labels (N,)), held out from
            training, for allocators that measure.
        seed: for criteria that draw random numbers.

    Raises:
        PruningError: the request contradicts itself or cannot be met; says what can be.
        UnknownNameError: no such criterion or allocator.
        ModelError: the network does not run on the example inputs.
    """
    limits = _limits(ratio, budget)
    allocator: Allocator = plugins.load("allocators", allocate)
    plugins.find("criteria", criterion)
    if align < 1:
        raise PruningError(f"align is {align}, expected 1 or more")
    if allocator.NEEDS_CALIBRATION and calibration is None:
        raise PruningError(
            f"the allocator '{allocate}' measures on held-out images: pass calibration"
        )
    analysis = analyze(net, example_inputs, ignore=ignore)
    scores = score_groups(net, analysis, criterion, seed=seed)
    request: dict[str, Any] = {
        "criterion": criterion,
        "allocate": allocate,
        "align": align,
        "seed": seed,
    }
    request |= {"ratio": ratio} if ratio is not None else {"budget": dict(budget or {})}
    groups = [
        rank(i, g, scores[i], align)
        for i, g in enumerate(analysis.groups)
        if g.frozen is None and i in scores
    ]
    open_groups = [group for group in groups if len(group.levels) > 1]
    problem = Problem(analysis, open_groups, limits)
    if allocator.NEEDS_CALIBRATION and calibration is not None:
        degradation = Sensitivity(net, analysis, calibration)
        problem = dataclasses.replace(problem, degradation=degradation)
    kept = allocator.allocate(problem)
    keep = {g.index: g.keep_mask(int(k)) for g, k in zip(open_groups, kept, strict=True)}
    notes = _notes(analysis, scores, groups, criterion, align)
    return make_plan(analysis, keep, request=request, notes=notes)


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


def _notes(
    analysis: Analysis,
    scores: Mapping[int, np.ndarray],
    groups: Sequence[RankedGroup],
    criterion: str,
    align: int,
) -> list[str]:
    """What stays whole and why, dearest first."""
    reasons = {i: g.frozen for i, g in enumerate(analysis.groups) if g.frozen is not None}
    for index, group in enumerate(analysis.groups):
        if group.frozen is None and index not in scores:
            reasons[index] = f"the criterion '{criterion}' has nothing to score in it"
    for ranked in groups:
        if len(ranked.levels) == 1:
            reasons[ranked.index] = ranked.fixed_reason(align)
    touched = analysis.macs_touched()
    order = sorted(reasons, key=lambda index: -touched[index])
    return [f"{analysis.groups[i].name} ({analysis.groups[i].size}): {reasons[i]}" for i in order]
