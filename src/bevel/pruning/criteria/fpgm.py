"""Distance of a filter to all others of its layer: what lies near their median is redundant.

score_j = sum_i ||w_j - w_i||_2, with i over the filters of the layer. The filter with the smallest
sum is the one nearest to the geometric median.

He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
Acceleration", CVPR 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bevel.pruning.criteria import PIECE

NEEDS = "weights"
COMPARABLE = False
ROLES = ({"filter"},)


def score(weight: Tensor, over: tuple[int, ...], generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """Sum of the Euclidean distances of each row to all rows."""
    kept = [dim for dim in range(weight.ndim) if dim not in over]
    rows = weight.permute(*kept, *over).flatten(len(kept)).flatten(0, len(kept) - 1)
    rows = rows if rows.element_size() >= 4 else rows.float()
    pieces = rows.split(max(PIECE // len(rows), 1))
    distances = torch.cat([torch.cdist(piece, rows).double().sum(1) for piece in pieces])
    return distances.reshape([weight.shape[dim] for dim in kept])
