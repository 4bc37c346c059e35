"""A prune step's request as a plan: which target it means, and what has to be measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bevel.core.recipe import Quantization, Target
from bevel.core.steps import PruneStep
from bevel.pipeline.within import LATENCY, Timing, plan_within
from bevel.pruning.plan import PruningPlan
from bevel.pruning.planning import LabelledBatches, plan_pruning
from bevel.runtimes import channel_step


def plan_step(
    net: nn.Module,
    example: Tensor,
    settings: PruneStep,
    calibration: LabelledBatches | None,
    *,
    target: Target,
    align: int,
    seed: int = 0,
    quantization: Quantization | None = None,
    images: Callable[[], Iterable[Any]] = tuple,
    folder: Path | None = None,
) -> tuple[PruningPlan, Timing | None]:
    """The plan that a prune step asks for, and how its latency came about, if that is limited.

    Args:
        net: the network.
        example: images for its recording.
        settings: the step.
        calibration: held-out images with labels, for allocators that measure.
        target: whose latency and bytes a budget means.
        align: the step's, or what its `auto` stands for.
        seed: for criteria that draw random numbers.
        quantization: how float becomes int8, where the latency of int8 is limited.
        images: gives the batches that int8 takes its ranges from.
        folder: where a sensitivity map is kept.
    """
    budget = settings.budget.limits() if settings.budget else None
    request: dict[str, Any] = {
        "criterion": settings.criterion,
        "allocate": settings.allocate,
        "reduction": settings.reduction,
        "align": align,
        "ignore": settings.ignore,
        "calibration": calibration,
        "seed": seed,
        "folder": folder,
    }
    if budget is None or LATENCY not in budget:
        request |= {"ratio": settings.ratio, "ratios": settings.ratios, "budget": budget}
        return plan_pruning(net, example, precision=target.precision, **request), None
    return plan_within(
        net,
        example,
        budget=budget,
        target=target,
        images=images(),
        quantization=quantization,
        **request,
    )


def budget_target(targets: Sequence[Target]) -> Target:
    """The target whose latency and bytes a budget means: the first int8 one, else the first."""
    return next((target for target in targets if target.precision == "int8"), targets[0])


def alignment(settings: PruneStep, targets: Sequence[Target]) -> int:
    """The number that widths become multiples of; `auto` asks the targets' runtimes."""
    if settings.align == "auto":
        return channel_step((target.runtime, target.precision) for target in targets)
    return settings.align
