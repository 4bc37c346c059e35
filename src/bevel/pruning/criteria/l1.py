"""Sum of absolute weights of a filter.

score_j = sum_k |w_jk|, with k over the filter's weights.

Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bevel.pruning.criteria import Member, per_unit

COMPARABLE = False


def score(members: Sequence[Member], size: int, generator: torch.Generator) -> Tensor | None:  # noqa: ARG001
    """L1 norms of the filters, shape (size,)."""
    return per_unit(members, "filter", size, lambda rows: rows.abs().sum(dim=1))
