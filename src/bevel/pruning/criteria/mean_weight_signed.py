"""Mean weight of a filter with its sign, comparable between layers.

score_j = (1 / K) sum_k w_jk, with K the number of weights in the filter. What a filter reads is
mostly behind a ReLU, so one with a negative mean mostly gives what the next ReLU sets to zero: it
goes first.

The published formula of Mean Weight is not public beyond its abstract; this is bevel's reading.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bevel.pruning.criteria import means

NEEDS = "weights"
COMPARABLE = True
ROLES = ({"filter"},)


def score(weight: Tensor, over: tuple[int, ...], generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """Mean weight of each row."""
    return means(weight, over, torch.clone)
