"""From a request to a plan: analyse, score, allocate, and check that the result runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from bevel.core import plugins
from bevel.core.errors import PruningError, suggestion
from bevel.core.garbage import without_collection
from bevel.core.limits import QUANTITIES, Amount, Limit, parse_limit
from bevel.graph.couplings import Analysis, analyze
from bevel.graph.naming import named_modules, named_tensors
from bevel.graph.record import ExampleInputs
from bevel.pruning.allocate import Allocator, Problem, RankedGroup, rank_all
from bevel.pruning.criteria import Criterion
from bevel.pruning.given import given
from bevel.pruning.plan import PruningPlan, make_plan
from bevel.pruning.quantities import KNOWN, WEIGHT_BYTES, Build, Quantity
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
    ratios: Mapping[str, float] | None = None,
    budget: Mapping[str, Amount] | None = None,
    precision: str = "float32",
    quantities: Mapping[str, Build] | None = None,
    align: int = 8,
    ignore: Sequence[str] = (),
    calibration: LabelledBatches | None = None,
    seed: int = 0,
    folder: Path | str | None = None,
    analysis: Analysis | None = None,
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
        ratios: what is removed layer by layer: globs of module names, later ones over earlier ones,
            with the share of the channels that goes ({"layer1.*": 0.25}); what none of them
            matches stays whole, and there is nothing left to allocate.
        budget: what may remain; all must hold. Numbers up to 1 and percentages are shares of the
            original ({"macs": 0.5, "params": "60 %"}), other numbers amounts ({"size_kb": 300});
            see `bevel.core.limits`.
        precision: of the target, for `size_kb` and `peak_memory_kb`.
        quantities: further ones that the budget may name, such as a measured latency.
        align: widths become multiples of this, by keeping the best extra channels; a group that
            is no wider keeps its width. Of attention heads it is the width of one head, and whole
            heads go one by one.
        ignore: module names or globs whose output channels all stay.
        calibration: re-iterable batches of (images (N, C, H, W), labels (N,)), held out from
            training, for allocators that measure and criteria that look at images. Criteria that
            need no labels take batches of images alone, too.
        seed: for criteria that draw random numbers.
        folder: where what is measured on images is kept (`sensitivity.json` of allocators,
            `scores` of criteria), so that a killed call goes on; None: nowhere.
        analysis: what `bevel.analyze` said of this network and these inputs, `ignore` included;
            None: it is asked now. Several plans for one network need one analysis.

    Raises:
        PruningError: the request contradicts itself or cannot be met; says what can be, in
            words and in the attribute `reachable`.
        UnknownNameError: no such criterion or allocator.
        ModelError: the network does not run on the example inputs.
    """
    known = {**KNOWN, **(quantities or {})}
    asked, limits = _request(ratio, ratios, budget, known)
    _check(align, precision)
    check_reduction(reduction)
    if calibration is None:
        check_calibration(criterion)
    allocator = _allocator(allocate, can_measure=calibration is not None or ratios is not None)
    if analysis is None:
        analysis = analyze(net, example_inputs, ignore=ignore)
    else:
        _check_analysis(analysis, net, ignore)
    scores = score_groups(
        net,
        analysis,
        criterion,
        reduction=reduction,
        calibration=calibration,
        folder=Path(folder) / "scores" if folder is not None else None,
        seed=seed,
    )
    request: dict[str, Any] = {
        "criterion": criterion,
        "allocate": allocate,
        "reduction": reduction,
        "align": align,
        "seed": seed,
    }
    request |= asked
    groups = rank_all(analysis, scores, align)
    notes = _notes(analysis, _reasons(analysis, groups, criterion))
    if ratios is not None:
        kept = given(analysis, groups, ratios)
    else:
        groups = [group for group in groups if len(group.levels) > 1]
        built = {name: known[name](analysis, precision) for name in limits if name in known}
        problem = _problem(analysis, groups, limits, built, notes, criterion)
        if allocator.NEEDS_CALIBRATION and calibration is not None:
            where = Path(folder) if folder is not None else None
            degradation = Sensitivity(net, analysis, groups, calibration, where)
            problem = dataclasses.replace(problem, degradation=degradation)
        kept = allocator.allocate(problem)
    keep = {g.index: g.keep_mask(int(k)) for g, k in zip(groups, kept, strict=True)}
    return make_plan(analysis, keep, request=request, notes=notes)


def _check_analysis(analysis: Analysis, net: nn.Module, ignore: Sequence[str]) -> None:
    """Refuse an analysis that was made of another network, or for another request."""
    if ignore:
        raise PruningError("ignore decides what an analysis finds: give it to bevel.analyze")
    tensors = named_tensors(named_modules(net))
    here = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in (*here, *analysis.shapes):
        if here.get(name) != analysis.shapes.get(name):
            ours, theirs = (
                "missing" if shape is None else "x".join(map(str, shape))
                for shape in (here.get(name), analysis.shapes.get(name))
            )
            raise PruningError(
                f"the analysis is of another network: {name} is {ours} here and {theirs} there; "
                "analyze this one"
            )


def _allocator(name: str, *, can_measure: bool) -> Allocator:
    allocator: Allocator = plugins.load("allocators", name)
    if allocator.NEEDS_CALIBRATION and not can_measure:
        raise PruningError(f"the allocator '{name}' measures on held-out images: pass calibration")
    return allocator


def _check(align: int, precision: str) -> None:
    if precision not in WEIGHT_BYTES:
        raise PruningError(f"no precision '{precision}'. {suggestion(precision, WEIGHT_BYTES)}")
    if align < 1:
        raise PruningError(f"align is {align}, expected 1 or more")


def _problem(
    analysis: Analysis,
    groups: Sequence[RankedGroup],
    limits: Mapping[str, Limit],
    quantities: Mapping[str, Quantity],
    notes: Sequence[str],
    criterion: str,
) -> Problem:
    """The allocator's problem, with all limits as shares of what the network has."""
    scorer: Criterion = plugins.load("criteria", criterion)
    full = analysis.full()
    shares = {
        name: limit.of(quantities[name].at(full)) if name in quantities else limit.value
        for name, limit in limits.items()
    }
    return Problem(
        analysis,
        groups,
        shares,
        notes=notes,
        quantities=quantities,
        comparable=scorer.COMPARABLE,
    )


def _request(
    ratio: float | None,
    ratios: Mapping[str, float] | None,
    budget: Mapping[str, Amount] | None,
    known: Collection[str],
) -> tuple[dict[str, Any], dict[str, Limit]]:
    """What was asked, as the plan records it, and as limits; of ratios by layer there are none."""
    if [ratio, ratios, budget].count(None) != 2:
        raise PruningError(
            "give either ratio (what is removed) or budget (what may remain), or ratios by layer"
        )
    if ratios is not None:
        return {"ratios": dict(ratios)}, {}
    if ratio is not None:
        if not 0 < ratio < 1:
            raise PruningError(f"ratio is {ratio}, expected a share between 0 and 1")
        return {"ratio": ratio}, {"channels": Limit(1 - ratio, share=True)}
    written = dict(budget or {})
    if not written:
        raise PruningError(f"the budget is empty, expected one or more of {', '.join(known)}")
    return {"budget": written}, {name: _limit(name, v, known) for name, v in written.items()}


def _limit(name: str, written: Amount, known: Collection[str]) -> Limit:
    if name in QUANTITIES and name not in known:
        raise PruningError(
            f"the {name} budget is measured on a target: use a recipe, bevel prune --target, or "
            "bevel.plan_within"
        )
    if name not in known:
        raise PruningError(f"no budget called '{name}'. {suggestion(name, known)}")
    try:
        return parse_limit(name, written)
    except ValueError as error:
        raise PruningError(f"the {name} budget is {written}, {error}") from error


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
