"""Mean absolute weight of a filter, comparable between layers.

score_j = (1 / K) sum_k |w_jk|, with K the number of weights in the filter. Within a layer this
ranks as L1; across layers the division by K removes the advantage of wide inputs.

The published formula of Mean Weight is not public beyond its abstract; this is bevel's reading.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bevel.pruning.criteria import Member, per_unit

COMPARABLE = True


def score(members: Sequence[Member], size: int, generator: torch.Generator) -> Tensor | None:  # noqa: ARG001
    """Mean absolute weights of the filters, shape (size,)."""
    return per_unit(members, "filter", size, lambda rows: rows.abs().mean(dim=1))
