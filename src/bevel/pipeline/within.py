"""A plan whose latency was measured: estimate, plan, measure the whole network, aim anew."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from bevel.core.errors import PruningError
from bevel.core.limits import Amount, Limit, parse_limit
from bevel.core.progress import note
from bevel.core.recipe import Quantization, Target
from bevel.core.records import Record
from bevel.graph.couplings import Analysis, analyze
from bevel.measurement.latency import Latency, Table, measure_table
from bevel.measurement.stopwatch import Stopwatch
from bevel.pruning.allocate import rank_all
from bevel.pruning.apply import prune
from bevel.pruning.plan import PruningPlan
from bevel.pruning.planning import plan_pruning
from bevel.runtimes import channel_step

LATENCY = "latency_ms"

ROUNDS = 5
"""So often, at most, a plan is made and measured."""

CLOSE = 0.9
"""A plan that takes this share of what may remain is near enough: nothing wider is tried."""

MARGIN = 0.98
"""What is aimed at, as a share of what is asked: the next measurement is not quite this one."""


class Round(Record):
    """One plan: what it was made for, what the table said, and what the target took for it.

    `before_ms` is the uncut network's time in the same process.
    """

    aim: float
    estimated_ms: float
    before_ms: float
    measured_ms: float

    @property
    def share(self) -> float:
        """What is left of the time, as measured."""
        return self.measured_ms / self.before_ms

    def __str__(self) -> str:
        return (
            f"{self.share:.1%} measured ({self.measured_ms:.3g} of {self.before_ms:.3g} ms), "
            f"{self.estimated_ms / self.before_ms:.1%} estimated"
        )


class Timing(Record):
    """How the latency of a plan came about: the rounds, and which of them is the plan's."""

    target: str
    asked: str
    rounds: list[Round] = Field(default_factory=list)
    chosen: int = 0

    def __str__(self) -> str:
        return f"{LATENCY} <= {self.asked} on {self.target}: {self.rounds[self.chosen]}"


def plan_within(
    net: nn.Module,
    example: Tensor,
    *,
    budget: Mapping[str, Amount],
    target: Target,
    images: Iterable[Any] = (),
    quantization: Quantization | None = None,
    stopwatch: Stopwatch | None = None,
    **request: Any,
) -> tuple[PruningPlan, Timing]:
    """A plan within a budget of which `latency_ms` is a part, as measured on the target.

    Args:
        net: the trained network.
        example: images (N, C, H, W).
        budget: as of `bevel.plan_pruning`.
        target: where the time counts; its precision is that of `size_kb` and `peak_memory_kb` too.
        images: batches for int8, which take their ranges from them.
        quantization: how float becomes int8.
        stopwatch: what times; None: the target itself.
        request: the other arguments of `bevel.plan_pruning`.

    Returns:
        The plan, and how it was found.

    Raises:
        PruningError: the budget cannot be reached, or what was planned is not faster.
        MeasurementError: the target gives no times.
        ExportError: the network cannot be exported for it.
    """
    try:
        limit = parse_limit(LATENCY, budget[LATENCY])
    except ValueError as error:
        raise PruningError(f"the {LATENCY} budget is {budget[LATENCY]}, {error}") from error
    timing = Timing(target=str(target), asked=str(limit))
    tried: list[tuple[PruningPlan, Round]] = []
    search = _Search()
    advice = _advice(target, request.get("align", 8))
    with stopwatch or Stopwatch(net, example, target, images, quantization) as watch:
        # Every round allocates: what an allocator measures is of use to the next.
        request["folder"] = request.get("folder") or watch.folder
        analysis, table = _table(watch, net, example, request)
        asked = limit.of(table.uncut_ms)
        aim = MARGIN * asked if asked < 1 else 1.0
        for _ in range(ROUNDS):
            limits = {**budget, LATENCY: aim}
            try:
                plan = _plan(net, example, limits, target, table, request)
            except PruningError as error:
                if tried:
                    break  # there is nothing beyond what was tried
                if aim >= asked:
                    raise PruningError(f"{error}{advice}", error.reachable) from error
                aim = asked  # without the margin, so that the error is of what was asked
                continue
            known = next((r for p, r in tried if p.groups == plan.groups), None)
            found = known or _measured(watch, net, plan, table, analysis, aim)
            held, wanted = _holds(limit, found), limit.of(found.before_ms)
            if known is None:
                tried.append((plan, found))
                note(f"round {len(tried)}: aimed at {aim:.1%}, {found}")
            if held and (found.share >= CLOSE * wanted or plan.after == plan.before):
                break
            aim = search.after(aim, held, MARGIN * wanted / found.share)
    timing = timing.model_copy(update={"rounds": [found for _, found in tried]})
    holding = [number for number, (_, found) in enumerate(tried) if _holds(limit, found)]
    if not holding:
        raise _refused(timing, advice)
    chosen = max(holding, key=lambda number: tried[number][1].share)
    plan = tried[chosen][0]
    stated = {**plan.request, "budget": dict(budget)}
    return plan.model_copy(update={"request": stated}), timing.model_copy(update={"chosen": chosen})


class _Search:
    """What to aim at next: more or less by what was missed, between what held and what did not."""

    def __init__(self) -> None:
        self.held, self.failed = 0.0, 1.0

    def after(self, aim: float, held: bool, missed: float) -> float:
        """The aim after one that held or not, and missed the limit by this factor."""
        if held:
            self.held = max(self.held, aim)
        else:
            self.failed = min(self.failed, aim)
        scaled = aim * missed
        if self.held < scaled < self.failed:
            return scaled
        return math.sqrt(max(self.held, self.failed / 4) * self.failed)


def _table(
    watch: Stopwatch, net: nn.Module, example: Tensor, request: Mapping[str, Any]
) -> tuple[Analysis, Table]:
    """The latency table; which channels of a group go does not matter for its times."""
    analysis = analyze(net, example, ignore=request.get("ignore", ()))
    scores = {index: np.zeros(group.size) for index, group in enumerate(analysis.groups)}
    groups = [g for g in rank_all(analysis, scores, request.get("align", 8)) if len(g.levels) > 1]
    return analysis, measure_table(watch, analysis, groups)


def _plan(
    net: nn.Module,
    example: Tensor,
    budget: Mapping[str, Amount],
    target: Target,
    table: Table,
    request: Mapping[str, Any],
) -> PruningPlan:
    """The plan by the table."""
    return plan_pruning(
        net,
        example,
        budget=budget,
        precision=target.precision,
        quantities={LATENCY: lambda analysis, _: Latency(analysis, table)},
        **request,
    )


def _measured(
    watch: Stopwatch,
    net: nn.Module,
    plan: PruningPlan,
    table: Table,
    analysis: Analysis,
    aim: float,
) -> Round:
    """The plan's network timed against the uncut one."""
    units = analysis.full()
    for group, cut in zip(
        (i for i, g in enumerate(analysis.groups) if g.frozen is None), plan.groups, strict=True
    ):
        units[group] = cut.after
    before, after = watch.compare(prune(net, plan))
    estimated = Latency(analysis, table).at(units) * before / table.uncut_ms
    return Round(aim=aim, estimated_ms=estimated, before_ms=before, measured_ms=after)


def _holds(limit: Limit, found: Round) -> bool:
    """Whether the limit holds as measured."""
    return found.share <= limit.value if limit.share else found.measured_ms <= limit.value


def _advice(target: Target, align: int) -> str:
    """What to say where widths are allowed that the target's kernels are slow with."""
    step = channel_step([(target.runtime, target.precision)])
    if align % step == 0:
        return ""
    return (
        f"; but {target.runtime} in {target.precision} is slow with widths that are no multiples "
        f"of {step}, so with align: {align} narrower can be slower: align: {step} may reach more"
    )


def _refused(timing: Timing, advice: str) -> PruningError:
    """What was reached instead, as measured."""
    best = min(timing.rounds, key=lambda found: found.share)
    reach = {LATENCY: best.share}
    if best.share >= 1:
        said = (
            f"the pruned network is not faster on {timing.target}: {best.measured_ms:.3g} ms "
            f"against {best.before_ms:.3g} ms; its layers are too small there for their widths to "
            "matter: take another target, runtime or align"
        )
        return PruningError(f"asked for {LATENCY} <= {timing.asked}, but {said}{advice}", reach)
    return PruningError(
        f"asked for {LATENCY} <= {timing.asked}, but only {100 * best.share:.3g}% "
        f"({best.measured_ms:.3g} of {best.before_ms:.3g} ms) was reached as measured on "
        f"{timing.target}, in {len(timing.rounds)} round(s); ask for that{advice}",
        reach,
    )
