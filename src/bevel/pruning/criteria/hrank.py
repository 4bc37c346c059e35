"""Mean rank of a unit's feature map.

score_c = (1 / N) sum_n rank(A_nc), with A_nc the map of unit c for image n, (H, W), and the rank
that `torch.linalg.matrix_rank` counts with float32's tolerance: the singular values above
max(H, W) eps sigma_1, eps = 2^-23. They are found in float64.

Most maps have the full rank that their nonzero rows and columns allow. That is certified without
singular values: if G = A A^T, over nonzero rows, less 2 (max(H, W) eps)^2 ||A||_F^2 on its diagonal
has a Cholesky factor in float64, each singular value is above the tolerance, because
||A||_F >= sigma_1, and what float64 rounds off is at most a fortieth of the half of what was taken
away that is left for it (Higham, "Accuracy and Stability of Numerical Algorithms", section 10.1).
For the rest, singular values are counted.

Lin et al., "HRank: Filter Pruning using High-Rank Feature Map", CVPR 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bevel.pruning.criteria import Average

NEEDS = "images"
COMPARABLE = False


def start() -> Average:
    """The mean of ranks."""
    return Average(ranks)


def ranks(maps: Tensor) -> Tensor:
    """Rank of each map: (N, units, H, W) to int64 (N, units)."""
    tolerance = max(maps.shape[2:]) * torch.finfo(torch.float32).eps
    flat = maps.flatten(0, 1).double()
    rows, columns = flat.any(2), flat.any(1)
    flatter = rows.sum(1) <= columns.sum(1)
    found = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
    found[flatter] = _ranks(flat[flatter], rows[flatter], tolerance)
    found[~flatter] = _ranks(flat[~flatter].mT, columns[~flatter], tolerance)
    return found.reshape(maps.shape[:2])


def _ranks(matrices: Tensor, rows: Tensor, tolerance: float) -> Tensor:
    """Ranks of (n, H, W), of which these rows (n, H) are not zero."""
    gram = matrices @ matrices.mT
    trace = gram.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    taken = torch.where(rows, -2 * tolerance**2 * trace, 1.0)
    _, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(taken))
    ranks = rows.sum(1)
    rest = failed != 0
    if rest.any():
        ranks[rest] = torch.linalg.matrix_rank(matrices[rest], rtol=tolerance)
    return ranks
