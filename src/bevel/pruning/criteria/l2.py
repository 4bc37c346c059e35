"""Euclidean norm of a filter.

score_j = sqrt(sum_k w_jk^2), with k over the filter's weights.

He et al., "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks", IJCAI 2018.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bevel.pruning.criteria import Member, per_unit

COMPARABLE = False


def score(members: Sequence[Member], size: int, generator: torch.Generator) -> Tensor | None:  # noqa: ARG001
    """L2 norms of the filters, shape (size,)."""
    return per_unit(members, "filter", size, lambda rows: rows.norm(dim=1))
