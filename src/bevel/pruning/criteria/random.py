"""Uniform random scores: the baseline every criterion must beat.

score_j ~ U(0, 1), from the run's seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEEDS = "weights"
COMPARABLE = True
ROLES = ({"unit"},)


def score(weight: Tensor, over: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random numbers, one per row."""
    rows = [size for dim, size in enumerate(weight.shape) if dim not in over]
    return torch.rand(rows, generator=generator, dtype=torch.float64)
