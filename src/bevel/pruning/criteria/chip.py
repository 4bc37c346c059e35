"""Channel independence: how much the nuclear norm of all feature maps loses with a unit's.

score_c = (1 / N) sum_n (||A_n||_* - ||A_n with row c zero||_*), with A_n the maps of image n as a
matrix (units, positions).

No singular values of the changed matrices are needed. With A A^T = V diag(lambda) V^T, and r_c(t)
the c-th diagonal element of (A A^T + t)^-1, Cramer's rule gives the characteristic polynomial of
A A^T without row and column c as r_c(-t) times that of A A^T; with
sqrt(lambda) = (1/pi) int_0^inf lambda / (lambda + t) dt / sqrt(t) it follows that

    ||A||_* - ||A without c||_* = (1/pi) int_0^inf
        [sum_i v_ci^2 lambda_i / (lambda_i + t)^2] / [sum_i v_ci^2 / (lambda_i + t)] dt / sqrt(t)

which holds exactly. In u = log t the integrand is analytic for |Im u| < pi, since its poles are
eigenvalues of both matrices, so the trapezoidal rule converges as exp(-2 pi^2 / step): to 1e-14
with the step taken here. All units of an image share one decomposition and two matrix products.

Sui et al., "CHIP: CHannel Independence-based Pruning for Compact Neural Networks", NeurIPS 2021.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bevel.pruning.criteria import MAPS, Average

NEEDS = "images"
COMPARABLE = False

REACH = 37
"""The trapezoidal rule goes from exp(-REACH) to exp(REACH) times the largest eigenvalue."""

NODES = 125
"""Its points, 0.6 apart in log t."""

NONE_LEFT = 1e-14
"""Eigenvalues below this share of the largest are rounding."""


def start() -> Average:
    """The mean of what the nuclear norm loses."""
    return Average(independence)


def independence(maps: Tensor) -> Tensor:
    """What ||.||_* of each image's maps loses with each unit: (N, units, H, W) to (N, units)."""
    matrices = maps.flatten(2).double()
    largest = matrices.shape[1] * max(matrices.shape[2], NODES)
    return torch.cat([_lost(piece) for piece in matrices.split(max(MAPS // largest, 1))])


def _lost(matrix: Tensor) -> Tensor:
    values, weights = _spectrum(matrix)
    top = values[:, -1:].clamp(min=0)
    values = (values / top.clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0)
    null = (1 - weights.sum(2, keepdim=True)).clamp(min=0)
    logs = torch.linspace(-REACH, REACH, NODES, dtype=torch.float64, device=matrix.device)
    nodes = logs.exp()
    resolvent = 1 / (values[:, :, None] + nodes)  # (N, eigenvalues, nodes)
    lost = weights @ (values[:, :, None] * resolvent.square())
    left = weights @ resolvent + null / nodes
    total = (lost / left * nodes.sqrt()).sum(2) * (logs[1] - logs[0])
    beyond = 2 * (weights @ values[:, :, None])[:, :, 0] / nodes[-1].sqrt()  # of the upper tail
    return (total + beyond) / math.pi * top.sqrt()


def _spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of A A^T, ascending, and each unit's squared parts of the vectors.

    Of the Gram matrix of positions where there are fewer of them than units; then what the squares
    lack to 1 lies where the eigenvalue is 0.
    """
    if matrix.shape[1] <= matrix.shape[2]:
        values, vectors = torch.linalg.eigh(matrix @ matrix.mT)
        return values, vectors.square()
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    held = values > NONE_LEFT * values[:, -1:]
    weights = (matrix @ vectors).square() / torch.where(held, values, 1.0)[:, None]
    return values, weights * held[:, None]
