"""Batch-norm statistics that fit the weights again after the weights were changed."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bevel.core.errors import TrainingError
from bevel.core.modes import evaluating
from bevel.core.progress import track


@torch.no_grad()
def recalibrate(
    net: nn.Module, batches: Iterable[Any], label: str = "batch-norm statistics"
) -> int:
    """Re-estimate the running mean and variance of every batch norm, in place.

    The statistics become the plain average over the batches (Li et al., "EagleEye", 2020, use
    this to judge a pruned network without training it). All else runs as in evaluation, dropout
    included, and every module's mode and momentum are as before afterwards. A batch norm with
    variance 1 everywhere was folded into its convolution: its statistics are not those of its
    input, and it is left alone.

    Args:
        net: a network with or without batch norms.
        batches: tensors (N, C, H, W), or tuples that start with one. Batches of equal size give
            every image the same weight.
        label: what the progress is called.

    Returns:
        The number of batch norms that were re-estimated; with none, no batch is read.

    Raises:
        TrainingError: there is no batch.
    """
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and _estimated(m)]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    device = next(norm.running_mean.device for norm in norms if norm.running_mean is not None)
    seen = 0
    try:
        with evaluating(net):
            for batch in track(batches, label, _length(batches)):
                if not seen:
                    for norm in norms:
                        norm.reset_running_stats()
                        norm.momentum = None  # torch's cumulative average
                        norm.train()
                images = batch if isinstance(batch, torch.Tensor) else batch[0]
                net(images.to(device))
                seen += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if not seen:
        raise TrainingError(
            f"{label}: got no batch, so the statistics are as they were; give at least one"
        )
    return len(norms)


def _estimated(norm: _BatchNorm) -> bool:
    """Whether it keeps statistics, and its variances are more than where they start."""
    return norm.running_var is not None and bool((norm.running_var != 1).any())


def _length(batches: Iterable[Any]) -> int | None:
    """How many batches there are, where they can tell."""
    return len(batches) if isinstance(batches, Sized) else None
