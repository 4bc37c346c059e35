"""Mean absolute weight of a filter, comparable between layers.

score_j = (1 / K) sum_k |w_jk|, with K the number of weights in the filter. Within a layer this
ranks as L1; across layers the division by K removes the advantage of wide inputs.

The published formula of Mean Weight is not public beyond its abstract; this is bevel's reading.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bevel.pruning.criteria import ANY_WEIGHT, means

NEEDS = "weights"
COMPARABLE = True
ROLES = ANY_WEIGHT


def score(weight: Tensor, over: tuple[int, ...], generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """Mean absolute weight of each row."""
    return means(weight, over, torch.abs)
