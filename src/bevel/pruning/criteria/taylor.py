"""Squared first-order change of the loss when a unit is removed, in the gate form.

score_c = ((1 / N) sum_n dL_n/dz_c)^2, with z_c = 1 a factor on unit c wherever it is read, L_n the
cross-entropy of image n, and dL_n/dz_c = sum over positions of a_c dL_n/da_c. The mean comes before
the square: the loss is that of all images, so gradients of images that disagree cancel.

Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019.
"""

from __future__ import annotations

import torch

from bevel.pruning.criteria import Average

NEEDS = "labels"
COMPARABLE = True


def start() -> Average:
    """The mean of gate gradients, squared at the end."""
    return Average(torch.Tensor.double, torch.square)
