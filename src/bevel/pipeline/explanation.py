"""What a recipe would do, found out without training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bevel.core import plugins
from bevel.core.errors import DataError
from bevel.core.limits import parse_limit
from bevel.core.modes import evaluating
from bevel.core.recipe import Recipe
from bevel.core.records import Cost, Record
from bevel.core.steps import IterateStep, PruneStep, ResizeStep, SurgeryStep, TrainStep
from bevel.data import Data, check_classes
from bevel.data import load as load_data
from bevel.graph.couplings import Analysis, ChannelGroup, analyze
from bevel.models import build
from bevel.pipeline.flow import check_names
from bevel.pipeline.planning import alignment, budget_target, plan_step
from bevel.pipeline.rounds import MOST_ROUNDS, ROUNDS
from bevel.pruning.allocate import PROBES, Allocator, RankedGroup, rank_all
from bevel.pruning.criteria import needed
from bevel.pruning.scoring import score_groups


class GroupLine(Record):
    """A channel group: how wide it is, what it may become, and what hangs on it."""

    name: str
    width: int
    widths: list[int]
    """The widths it may have after the first prune step, or only the one it keeps."""
    macs_share: float
    """Share of the network's MACs in layers that this group touches; shares overlap."""
    tensors: int
    reason: str | None
    """Why it keeps its width, or None."""


class StepLine(Record):
    """A step: what it does, and an estimate of its time on this machine."""

    verb: str
    what: str
    seconds: float | None


class Explanation(Record):
    """What a recipe would do."""

    model: str
    data: str
    input_shape: list[int]
    original: Cost
    planned: Cost | None
    """After the first prune step, where nothing of it is measured, on images or on the target."""
    groups: list[GroupLine]
    steps: list[StepLine]
    targets: list[str]
    warnings: list[str]

    @staticmethod
    def of(recipe: Recipe) -> Explanation:
        """Build the network, record one pass, time one step; nothing is trained or written.

        Raises:
            BevelError: the recipe cannot be carried out; says why.
        """
        check_names(recipe)
        torch.manual_seed(recipe.seed)
        section = recipe.model
        net = build(
            section.name, section.arguments, section.checkpoint, new_head=section.head == "new"
        )
        data, shape, warnings = _data(recipe)
        if data is not None:
            try:
                check_classes(net, data)
            except DataError as error:  # the run would stop here; the network can be shown
                warnings.append(str(error))
        example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        first = next((s.pruning for s in recipe.steps if s.pruning is not None), None)
        analysis = analyze(net, example, ignore=first.ignore if first else ())
        groups = _groups(net, analysis, first, recipe)
        planned = _planned(net, example, first, recipe)
        return Explanation(
            model=section.name,
            data=recipe.data.name,
            input_shape=list(shape),
            original=analysis.cost(),
            planned=planned,
            groups=groups,
            steps=_Clock(recipe, net, example, data, groups, analysis.cost().macs).lines(),
            targets=[f"{target}, {target.threads} thread(s)" for target in recipe.targets],
            warnings=warnings,
        )

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        lines = [
            f"{self.model} on {self.data}, input {'x'.join(map(str, self.input_shape))}",
            f"original: {self.original.macs / 1e6:.1f} M MACs, "
            f"{self.original.params / 1e6:.3f} M parameters",
        ]
        if self.planned is not None:
            lines.append(
                f"after the first prune step: {self.planned.macs / 1e6:.1f} M MACs "
                f"({self.planned.macs / self.original.macs:.1%}), "
                f"{self.planned.params / 1e6:.3f} M parameters "
                f"({self.planned.params / self.original.params:.1%})"
            )
        lines += [f"warning: {warning}" for warning in self.warnings]
        can = [group for group in self.groups if group.reason is None]
        cannot = [group for group in self.groups if group.reason is not None]
        lines += ["", f"can be pruned: {len(can)} channel groups"]
        for group in can:
            widths = _few(group.widths)
            lines.append(
                f"  {group.name:<40} {group.width:>5} -> {widths:<24} "
                f"{group.macs_share:>6.1%} of MACs, {group.tensors} tensors"
            )
        lines += ["", f"keeps its width: {len(cannot)} channel groups"]
        lines += [f"  {group.name:<40} {group.width:>5}    {group.reason}" for group in cannot]
        lines += ["", "steps"]
        for step in self.steps:
            cost = (
                f"about {_duration(step.seconds)}" if step.seconds is not None else "not estimated"
            )
            lines.append(f"  {step.verb:<10} {step.what:<64} {cost}")
        lines += [f"  {'target':<10} {target}" for target in self.targets]
        return lines


def _data(recipe: Recipe) -> tuple[Data | None, tuple[int, ...], list[str]]:
    """The data and the shape of an image; without the data, the shape that the recipe states."""
    section = recipe.data
    try:
        data = load_data(section, seed=recipe.seed)
    except DataError as error:
        if section.size is None:
            raise
        channels = len(section.normalize.mean) if section.normalize else 3
        return None, (channels, section.size, section.size), [f"without the data: {error}"]
    return data, data.input_shape, []


def _planned(
    net: nn.Module, example: Tensor, step: PruneStep | None, recipe: Recipe
) -> Cost | None:
    if step is None:
        return None
    allocator: Allocator = plugins.load("allocators", step.allocate)
    measured = step.budget is not None and step.budget.latency_ms is not None
    looks = needed(step.criterion) != "weights"
    if measured or looks or (allocator.NEEDS_CALIBRATION and step.ratios is None):
        return None
    plan, _ = plan_step(
        net,
        example,
        step,
        None,
        target=budget_target(recipe.targets),
        align=alignment(step, recipe.targets),
        seed=recipe.seed,
    )
    return plan.after


def _groups(
    net: nn.Module, analysis: Analysis, step: PruneStep | None, recipe: Recipe
) -> list[GroupLine]:
    """One line per group, dearest first."""
    ranked: dict[int, RankedGroup] = {}
    if step is not None:
        # Widths do not depend on the scores, so those that need images have a stand-in.
        criterion = step.criterion if needed(step.criterion) == "weights" else "random"
        scores = score_groups(net, analysis, criterion, reduction=step.reduction, seed=recipe.seed)
        align = alignment(step, recipe.targets)
        ranked = {group.index: group for group in rank_all(analysis, scores, align)}
    touched, total = analysis.macs_touched(), max(analysis.cost().macs, 1)
    lines = []
    for index, group in enumerate(analysis.groups):
        widths, reason = [group.size], group.frozen
        if reason is None and step is not None:
            widths, reason = _widths(group, ranked.get(index), step)
        lines.append(
            GroupLine(
                name=group.name,
                width=group.size,
                widths=widths,
                macs_share=float(touched[index]) / total,
                tensors=len({axis.tensor for axis in group.axes}),
                reason=reason,
            )
        )
    return sorted(lines, key=lambda line: -line.macs_share)


def _widths(
    group: ChannelGroup, ranked: RankedGroup | None, step: PruneStep
) -> tuple[list[int], str | None]:
    if ranked is None:
        return [group.size], f"the criterion '{step.criterion}' has nothing to score in it"
    widths = [int(level) * ranked.rows.shape[1] for level in ranked.levels[1:]]
    return (widths, None) if widths else ([group.size], ranked.narrow)


class _Clock:
    """Estimates of what each step takes here, from one measured pass and training step."""

    def __init__(
        self,
        recipe: Recipe,
        net: nn.Module,
        example: Tensor,
        data: Data | None,
        groups: list[GroupLine],
        macs: int,
    ) -> None:
        self.recipe, self.net, self.data = recipe, net, data
        self.groups, self.macs, self.pixels = groups, macs, math.prod(example.shape[2:])
        batch = example[:1].expand(min(recipe.data.batch_size, 32), *example.shape[1:]).contiguous()
        self.forward_s = _timed(lambda: self._forward(batch)) / len(batch)
        self.train_s = _timed(lambda: self._backward(batch)) / len(batch)

    def lines(self) -> list[StepLine]:
        """A line per step, then the export and the measurement."""
        lines = []
        share, pixels = 1.0, self.pixels
        for step in self.recipe.steps:
            settings = step.settings
            if isinstance(settings, PruneStep):
                what = _describe(settings, alignment(settings, self.recipe.targets))
                lines.append(StepLine(verb="prune", what=what, seconds=self._pruning(settings)))
                if settings.budget is not None and settings.budget.macs is not None:
                    share *= parse_limit("macs", settings.budget.macs).of(self.macs)
            elif isinstance(settings, IterateStep):
                lines.append(self._rounds(settings, share))
            elif isinstance(settings, SurgeryStep):
                rules = settings.rules
                what = rules if isinstance(rules, str) else ", ".join(rules)
                lines.append(StepLine(verb="surgery", what=f"rules: {what}", seconds=None))
            elif isinstance(settings, ResizeStep):
                share *= settings.size**2 / pixels
                pixels = settings.size**2
                what = f"images of {settings.size} x {settings.size} pixels"
                lines.append(StepLine(verb="resize", what=what, seconds=None))
            else:
                what = f"{settings.epochs} epochs, lr {settings.lr:g}"
                what += ", learning from the original too" if settings.distill else ""
                lines.append(
                    StepLine(verb=step.verb, what=what, seconds=self._training(settings, share))
                )
        test = self._images("test")
        images = None if test is None else test * (self.forward_s * (2 + share))
        lines.append(
            StepLine(
                verb="measure", what="accuracy and parity of the exported files", seconds=images
            )
        )
        return lines

    def _rounds(self, settings: IterateStep, share: float) -> StepLine:
        """Rounds of pruning and fine-tuning; of those that back off, as many as there may be."""
        most = settings.max_accuracy_drop is not None
        count = settings.rounds or (MOST_ROUNDS if most else ROUNDS)
        what = f"{'at most ' if most else ''}{count} rounds of {settings.finetune.epochs} epochs"
        training = self._training(settings.finetune, share)
        return StepLine(
            verb="iterate", what=what, seconds=None if training is None else count * training
        )

    def _images(self, split: str) -> int | None:
        return None if self.data is None else self.data.sizes[split]

    def _training(self, settings: TrainStep, share: float) -> float | None:
        images = self._images("train")
        if images is None:
            return None
        teacher = self.forward_s if settings.distill is not None else 0.0
        return settings.epochs * images * (self.train_s * share + teacher)

    def _pruning(self, settings: PruneStep) -> float | None:
        allocator: Allocator = plugins.load("allocators", settings.allocate)
        passes = 20.0  # recording, proof in float64, validation before and after
        if allocator.NEEDS_CALIBRATION:
            widths = [len(g.widths) for g in self.groups if g.reason is None]
            probes = sum(min(count, PROBES) for count in widths)
            passes += 2.0 * self.recipe.calibration.images * probes  # statistics, then loss
        if needed(settings.criterion) != "weights":
            passes += 3.0 * self.recipe.calibration.images  # with the way back, or ranks
        validation = self._images("validation") or 0
        return self.forward_s * (passes + 2 * validation)

    def _forward(self, batch: Tensor) -> None:
        with evaluating(self.net), torch.no_grad():
            self.net(batch)

    def _backward(self, batch: Tensor) -> None:
        with evaluating(self.net):  # batch-norm statistics must stay as they are
            output = self.net(batch)
            F.cross_entropy(output, torch.zeros(len(batch), dtype=torch.long)).backward()
        self.net.zero_grad(set_to_none=True)


def _timed(work: Callable[[], None]) -> float:
    """Seconds of the faster of two runs after a warm-up."""
    work()
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def _describe(step: PruneStep, align: int) -> str:
    if step.budget is not None:
        request = ", ".join(
            f"{name} <= {parse_limit(name, limit)}" for name, limit in step.budget.limits().items()
        )
    elif step.ratios is not None:
        request = ", ".join(f"{ratio:.0%} of {glob}" for glob, ratio in step.ratios.items())
    else:
        request = f"{step.ratio:.0%} of the channels"
    scores = step.criterion + ("" if step.reduction == "mean" else f" ({step.reduction})")
    return f"{scores} / {step.allocate}, {request}, widths in multiples of {align}"


def _few(widths: list[int]) -> str:
    return (
        ", ".join(map(str, widths))
        if len(widths) <= 4
        else f"{widths[0]}, {widths[1]} ... {widths[-1]}"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
