"""How much worse a network gets when one channel group is cut."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bevel.core.modes import evaluating
from bevel.graph.couplings import Analysis
from bevel.models.batchnorm import recalibrate
from bevel.pruning.allocate import RankedGroup
from bevel.pruning.apply import prune
from bevel.pruning.plan import make_plan


class Sensitivity:
    """Rise of the cross-entropy on held-out images with one group cut.

    Batch-norm statistics are re-estimated on the same images first, for the original too, so that
    the rise measures what was lost and not the shift of statistics that any cut causes.
    """

    def __init__(
        self, net: nn.Module, analysis: Analysis, batches: Iterable[tuple[Tensor, Tensor]]
    ) -> None:
        self.net, self.analysis = net, analysis
        self.batches = list(batches)
        self.baseline = self._loss(prune(net, make_plan(analysis, {})))

    def __call__(self, group: RankedGroup, kept: int) -> float:
        """Loss with the group's best `kept` rows, minus the original's loss."""
        plan = make_plan(self.analysis, {group.index: group.keep_mask(kept)})
        return self._loss(prune(self.net, plan)) - self.baseline

    def _loss(self, net: nn.Module) -> float:
        recalibrate(net, [images for images, _ in self.batches])
        total, count = 0.0, 0
        with evaluating(net), torch.no_grad():
            for images, labels in self.batches:
                total += float(F.cross_entropy(net(images), labels, reduction="sum"))
                count += len(labels)
        return total / count
