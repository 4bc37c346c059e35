"""Absolute scale of the batch norm behind a filter.

score_j = |gamma_j|. A group without a normalisation has nothing to score and keeps its channels.

Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bevel.pruning.criteria import means

NEEDS = "weights"
COMPARABLE = True
ROLES = ({"norm"},)


def score(weight: Tensor, over: tuple[int, ...], generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """Absolute scale of each channel."""
    return means(weight, over, torch.abs)
