"""Second-order change of the loss when a unit is removed, from the Fisher information of its gate.

score_c = (1 / 2N) sum_n (dL_n/dz_c)^2, with z_c = 1 a factor on unit c wherever it is read, L_n the
cross-entropy of image n, and dL_n/dz_c = sum over positions of a_c dL_n/da_c. The squares come
before the mean: for a trained network they estimate the diagonal of the loss's Hessian, as in
Optimal Brain Damage, here per channel. Units that are coupled share one gate, as in Group Fisher.

Theis et al., "Faster Gaze Prediction with Dense Networks and Fisher Pruning", 2018; Liu et al.,
"Group Fisher Pruning for Practical Network Compression", ICML 2021.
"""

from __future__ import annotations

from torch import Tensor

from bevel.pruning.criteria import Average

NEEDS = "labels"
COMPARABLE = True


def start() -> Average:
    """The mean of half the squared gate gradients."""
    return Average(_halved_squares)


def _halved_squares(gates: Tensor) -> Tensor:
    return gates.double().square() / 2
