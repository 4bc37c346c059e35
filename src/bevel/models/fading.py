"""Activation functions on their way to ReLU: exact at first, replaced little by little in training.

y = (1 - s) f(x) + s relu(x), with one share s for the whole network, 0 at first. While s grows the
weights follow; at 1 every such module is a ReLU and becomes one (`settle`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "silu": F.silu,
}
"""What can fade, by name, each with the settings it has by itself."""


class Fading(nn.Module):
    """A function of `FUNCTIONS` that turns into ReLU: any shape in, the same out.

    `share` says how far it has come, from 0 to 1; it is part of the state dict, so that a training
    that was stopped goes on where it was.
    """

    share: Tensor

    def __init__(self, function: str) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("share", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Something between the function and ReLU."""
        y = FUNCTIONS[self.function](x)
        return y + self.share.to(y) * (torch.relu(x) - y)

    def extra_repr(self) -> str:
        """Which function."""
        return self.function


def fades(net: nn.Module) -> bool:
    """Whether anything in a network is on its way to ReLU."""
    return any(isinstance(module, Fading) for module in net.modules())


def fade(net: nn.Module, share: float) -> None:
    """Set how far a network's activation functions have come: 0, as they were, to 1, ReLU."""
    for module in net.modules():
        if isinstance(module, Fading):
            module.share.fill_(share)


def settle(net: nn.Module) -> None:
    """Put a ReLU in the place of everything that fades, in place, however far it has come."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Fading):
                setattr(module, name, nn.ReLU().train(child.training))
