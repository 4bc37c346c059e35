"""Mean magnitude of a unit's feature map.

score_c = (1 / N P) sum_n sum_p |a_ncp|, over images n and positions p. Behind a ReLU, which is what
the paper has, that is the mean activation; elsewhere the sign is left out, so that what is strongly
negative counts.

Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference",
ICLR 2017.
"""

from __future__ import annotations

from torch import Tensor

from bevel.pruning.criteria import Average

NEEDS = "images"
COMPARABLE = False


def start() -> Average:
    """The mean of magnitudes."""
    return Average(_mean_magnitude)


def _mean_magnitude(maps: Tensor) -> Tensor:
    return maps.abs().mean((2, 3))
