"""Sparse training: channels that are to go lose their weight before they are removed.

Both penalties add to the gradients of training. `growing` holds down what a plan removes, ever more
strongly: g += t s w on the removed slices, with t from 0 to 1 over the training; Wang et al.,
"Neural Pruning via Growing Regularization", ICLR 2021. `slimming` draws all scales of batch norms
to zero, so that training itself chooses: g += s sign(gamma); Liu et al., "Learning Efficient
Convolutional Networks through Network Slimming", ICCV 2017.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from bevel.pruning.apply import mask
from bevel.pruning.plan import PruningPlan


@torch.no_grad()
def growing(net: nn.Module, plan: PruningPlan, strength: float) -> Callable[..., None]:
    """A penalty on what a plan removes, for `finetune`.

    Args:
        net: the network that is to be trained; unchanged.
        plan: on this network.
        strength: of the pull towards zero at the end, relative to the weights.
    """
    ones = copy.deepcopy(net)
    for parameter in ones.parameters():
        parameter.fill_(1)
    goes = {name: 1 - kept for name, kept in mask(ones, plan).named_parameters() if not kept.all()}

    def penalty(net: nn.Module, *, over: float) -> None:
        for name, parameter in net.named_parameters():
            if name in goes and parameter.grad is not None:
                goes[name] = goes[name].to(parameter.device)
                parameter.grad.add_(goes[name] * parameter.detach(), alpha=over * strength)

    return penalty


def slimming(strength: float) -> Callable[..., None]:
    """A penalty on the scales of batch norms, for `finetune`.

    Args:
        strength: of the pull towards zero, the same all the time.
    """

    def penalty(net: nn.Module, *, over: float) -> None:  # noqa: ARG001  # always the same
        for module in net.modules():
            scale = module.weight if isinstance(module, _NormBase) else None
            if scale is not None and scale.grad is not None:
                scale.grad.add_(scale.detach().sign(), alpha=strength)

    return penalty
