"""Euclidean norm of a filter.

score_j = sqrt(sum_k w_jk^2), with k over the filter's weights; what reads channel j counts alike.

He et al., "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks", IJCAI 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bevel.pruning.criteria import ANY_WEIGHT, norms

NEEDS = "weights"
COMPARABLE = False
ROLES = ANY_WEIGHT


def score(weight: Tensor, over: tuple[int, ...], generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """L2 norm of each row."""
    return norms(weight, over, 2)
