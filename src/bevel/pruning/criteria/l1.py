"""Sum of absolute weights of a filter.

score_j = sum_k |w_jk|, with k over the filter's weights; what reads channel j counts alike.

Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bevel.pruning.criteria import ANY_WEIGHT, norms

NEEDS = "weights"
COMPARABLE = False
ROLES = ANY_WEIGHT


def score(weight: Tensor, over: tuple[int, ...], generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """L1 norm of each row."""
    return norms(weight, over, 1)
