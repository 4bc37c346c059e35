"""How often a unit fires: one minus the average percentage of zeros (APoZ).

score_c = 1 - (1 / N P) sum_n sum_p [a_ncp = 0], over images n and positions p. It tells units apart
behind a ReLU only: what no activation sets to zero scores 1.

Hu et al., "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep
Architectures", 2016.
"""

from __future__ import annotations

from torch import Tensor

from bevel.pruning.criteria import Average

NEEDS = "images"
COMPARABLE = False


def start() -> Average:
    """The mean share of what is not zero."""
    return Average(_share_of_nonzero)


def _share_of_nonzero(maps: Tensor) -> Tensor:
    return (maps != 0).double().mean((2, 3))
