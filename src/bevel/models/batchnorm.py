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


@torch.no_grad()
def unfold(net: nn.Module, batches: Iterable[Any], label: str = "folded batch norms") -> int:
    """Give folded batch norms statistics again, in place; in eval mode nothing changes.

    A converted checkpoint often has its batch norms folded into the convolutions: what is left of
    them adds a bias. Trained on, they would divide by the deviation of each batch, which nothing
    makes up for, and the first step would destroy the network. With the mean and the variance of
    what they really read, and weights that undo them, training starts from the same function.

    Args:
        net: a network with or without folded batch norms.
        batches: tensors (N, C, H, W), or tuples that start with one; of equal size.
        label: what the progress is called.

    Returns:
        The number of batch norms that were unfolded; with none, no batch is read.
    """
    norms = folded(net)
    if not norms:
        return 0
    read = {norm: _Moments() for norm in norms}
    hooks = [norm.register_forward_pre_hook(read[norm].add) for norm in norms]
    try:
        with evaluating(net):
            for batch in track(batches, label, _length(batches)):
                images = batch if isinstance(batch, torch.Tensor) else batch[0]
                net(images.to(norms[0].bias.device))
    finally:
        for hook in hooks:
            hook.remove()
    for norm, moments in read.items():
        if moments.count:
            _unfold(norm, *moments.mean_and_variance())
    return sum(moments.count > 0 for moments in read.values())


def folded(net: nn.Module) -> list[_BatchNorm]:
    """The batch norms that have weights that were trained, and statistics that were not."""
    return [m for m in net.modules() if isinstance(m, _BatchNorm) and _is_folded(m)]


class _Moments:
    """Sums over what a batch norm reads, (N, C, ...), per channel."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = self.squares = torch.zeros(())

    def add(self, _norm: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        """Another batch."""
        x = given[0].double().transpose(0, 1).flatten(1)
        self.count += x.shape[1]
        self.sum, self.squares = self.sum + x.sum(1), self.squares + x.square().sum(1)

    def mean_and_variance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(C,) each."""
        mean = self.sum / self.count
        return mean, (self.squares / self.count - mean.square()).clamp(min=0)


def _unfold(norm: _BatchNorm, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Take these statistics, and weights with which it computes what it did."""
    scale, shift = affine(norm)
    assert norm.running_mean is not None  # noqa: S101  # it is folded
    assert norm.running_var is not None  # noqa: S101
    norm.weight.copy_(scale * (variance + norm.eps).sqrt())
    norm.bias.copy_(scale * mean + shift)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


@torch.no_grad()
def affine(norm: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift that a batch norm with running statistics is in eval mode: (C,) float64."""
    assert norm.running_mean is not None  # noqa: S101  # it has them
    assert norm.running_var is not None  # noqa: S101
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _is_folded(norm: _BatchNorm) -> bool:
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None or norm.weight is None:
        return False
    return bool((variance == 1).all() and ((norm.bias != 0).any() or (mean != 0).any()))


def _estimated(norm: _BatchNorm) -> bool:
    """Whether it keeps statistics, and its variances are more than where they start."""
    return norm.running_var is not None and bool((norm.running_var != 1).any())


def _length(batches: Iterable[Any]) -> int | None:
    """How many batches there are, where they can tell."""
    return len(batches) if isinstance(batches, Sized) else None
