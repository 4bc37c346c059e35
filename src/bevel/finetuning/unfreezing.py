"""Transfer learning in stages: the last layer learns first, the layers before it join later.

A new head gives random gradients at first, which would undo what the layers before it know. Howard
and Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL 2018, section 3.3
(gradual unfreezing).
"""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

STAGES = 4
"""The head, and the rest in thirds."""


def stages(net: nn.Module) -> list[list[nn.Module]]:
    """The modules with parameters of their own, last ones first: the head, then equal parts.

    The order is that in which modules are registered, which is nearly always that in which they
    run.
    """
    leaves = [m for m in net.modules() if next(m.parameters(recurse=False), None) is not None]
    *body, head = leaves
    parts = min(STAGES - 1, len(body))
    bounds = [len(body) * number // parts for number in range(parts + 1)] if parts else [0]
    thirds = [body[a:b] for a, b in pairwise(bounds)]
    return [[head], *reversed(thirds)]


class Unfreezing:
    """Lets only those stages of a network learn whose turn it is.

    What is held is not trained, and its batch norms keep their statistics.

    Args:
        net: the network that is trained.
        epochs: in which stages join; from then on everything learns.
    """

    def __init__(self, net: nn.Module, epochs: int) -> None:
        self.epochs, self.stages = epochs, stages(net)
        self.learning = {id(p) for p in net.parameters() if p.requires_grad}

    def hold(self, epoch: int) -> None:
        """What is right for an epoch, counted from 0, of a network in training mode."""
        later = len(self.stages) - 1
        joined = 1 + (epoch * later // self.epochs if epoch < self.epochs else later)
        for number, modules in enumerate(self.stages):
            for module in modules:
                self._set(module, learns=number < joined)

    def _set(self, module: nn.Module, *, learns: bool) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(learns and id(parameter) in self.learning)
        if isinstance(module, _BatchNorm) and not learns:
            module.eval()
