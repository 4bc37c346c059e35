"""Squared norm of a filter relative to all filters of its layer that are no smaller.

score_j = ||w_j||^2 / sum_{i: ||w_i|| >= ||w_j||} ||w_i||^2. The largest filter of each layer has
score 1, so that no layer is emptied before another. The paper scores single weights; filters take
their place here, as in structured uses of it.

Lee et al., "Layer-Adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bevel.pruning.criteria import ANY_WEIGHT, sums

NEEDS = "weights"
COMPARABLE = True
ROLES = ANY_WEIGHT


def score(weight: Tensor, over: tuple[int, ...], generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """Share of each row in what is no smaller."""
    squares = sums(weight, over, torch.square)
    ordered, order = squares.reshape(-1).sort()
    tails = ordered.flip(0).cumsum(0).flip(0)
    tails = tails[torch.searchsorted(ordered, ordered)]  # rows of one norm count each other
    shares = torch.empty_like(ordered)
    shares[order] = ordered / tails.clamp(min=torch.finfo(torch.float64).tiny)
    return shares.reshape(squares.shape)
