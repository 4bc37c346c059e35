"""Uniform random scores: the baseline every criterion must beat.

score_j ~ U(0, 1), from the run's seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bevel.pruning.criteria import Member

COMPARABLE = True


def score(members: Sequence[Member], size: int, generator: torch.Generator) -> Tensor | None:  # noqa: ARG001
    """Random scores, shape (size,)."""
    return torch.rand(size, generator=generator, dtype=torch.float64)
