"""Absolute scale of the batch norm behind a filter.

score_j = |gamma_j|. A group without a batch norm has nothing to score and keeps its channels.

Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bevel.pruning.criteria import Member, per_unit

COMPARABLE = True


def score(members: Sequence[Member], size: int, generator: torch.Generator) -> Tensor | None:  # noqa: ARG001
    """Absolute batch-norm scales, shape (size,); None without a batch norm."""
    return per_unit(members, "norm", size, lambda rows: rows.abs().mean(dim=1))
