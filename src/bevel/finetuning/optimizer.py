"""What moves the weights: SGD or AdamW, the schedule of their steps, and averaged weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bevel.core.errors import TrainingError
from bevel.core.steps import TrainStep

Tensors = list[Tensor] | tuple[Tensor, ...]


SECOND_BETA = 0.999
"""Decay of AdamW's mean of the squared gradients (Loshchilov and Hutter, 2019)."""


def optimizer(net: nn.Module, settings: TrainStep) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW, over the parameters that require gradients.

    Weight decay applies to weights with two or more axes (convolutions and linear layers) and not
    to biases and normalisation parameters: decaying those changes the function without
    regularising it (He et al., "Bag of Tricks", 2019, section 3.1).

    Raises:
        TrainingError: no parameter requires gradients.
    """
    trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if not trainable:
        raise TrainingError(
            "the network has no parameter that requires gradients, so there is nothing to train; "
            "call requires_grad_(True) on what should learn"
        )
    groups = [
        {
            "params": [parameter for parameter in trainable if parameter.ndim >= 2],
            "weight_decay": settings.weight_decay,
        },
        {
            "params": [parameter for parameter in trainable if parameter.ndim < 2],
            "weight_decay": 0.0,
        },
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        betas = (settings.momentum, SECOND_BETA)
        return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, foreach=True)
    return torch.optim.SGD(
        groups,
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        foreach=True,
    )


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Learning rate of a step: linear from peak / warmup to peak, then half a cosine to zero.

    Args:
        step: counted from 0.
        total: steps of the whole training.
        warmup: steps of the linear part; at most half of all steps are used for it.
        peak: the highest value (Loshchilov and Hutter, "SGDR", 2017, for the cosine).
    """
    warmup = min(warmup, total // 2)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def averaged(net: nn.Module, decay: float) -> AveragedModel:
    """A copy of the network that follows its weights and buffers as an exponential average.

    Early on the decay is (1 + n) / (10 + n) after n updates, so that a short training is not held
    at its starting point. Whole-number buffers are copied.
    """

    def follow(averages: Tensors, currents: Tensors, updates: Tensor | int) -> None:
        count = float(updates)
        weight = 1 - min(decay, (1 + count) / (10 + count))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, currents, weight)
        else:
            torch._foreach_copy_(averages, currents)

    return AveragedModel(net, multi_avg_fn=torch.no_grad()(follow), use_buffers=True)
