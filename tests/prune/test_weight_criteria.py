"""Criteria of weights against loops over filters, and what they are known to do."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from bevel.core import plugins
from bevel.core.errors import PruningError
from bevel.graph.couplings import analyze
from bevel.pruning.scoring import score_groups

SHAPES = [((6, 4, 3, 3), (1, 2, 3)), ((4, 6, 3, 3), (0, 2, 3)), ((2, 5, 3, 4), (2, 3))]


def score(name: str, weight: torch.Tensor, over: tuple[int, ...]) -> np.ndarray:
    plugin = plugins.load("criteria", name)
    return plugin.score(weight, over, torch.Generator().manual_seed(0)).numpy()


def rows_of(weight: torch.Tensor, over: tuple[int, ...]) -> np.ndarray:
    """One list of weights per row."""
    kept = [dim for dim in range(weight.ndim) if dim not in over]
    moved = np.moveaxis(weight.double().numpy(), kept, range(len(kept)))
    return moved.reshape(math.prod(weight.shape[dim] for dim in kept), -1)


def lamp(rows: np.ndarray) -> list[float]:
    squares = [float((row**2).sum()) for row in rows]
    return [own / sum(other for other in squares if other >= own) for own in squares]


def fpgm(rows: np.ndarray) -> list[float]:
    return [sum(float(np.linalg.norm(row - other)) for other in rows) for row in rows]


def mean_weight_signed(rows: np.ndarray) -> list[float]:
    return [float(row.sum()) / len(row) for row in rows]


@pytest.mark.parametrize("reference", [lamp, fpgm, mean_weight_signed])
@pytest.mark.parametrize(("shape", "over"), SHAPES)
def test_against_a_loop(reference, shape, over):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = score(reference.__name__, weight, over)
    assert found.shape == tuple(size for dim, size in enumerate(shape) if dim not in over)
    assert found.reshape(-1) == pytest.approx(reference(rows_of(weight, over)), rel=1e-5)


def test_filters_of_one_norm_count_each_other():
    weight = torch.tensor([[3.0, 4], [5, 0], [0, 10], [0, 0]])
    assert score("lamp", weight, (1,)) == pytest.approx([25 / 150, 25 / 150, 1, 0])


def test_a_layer_of_zeros_has_a_lamp_score():
    assert score("lamp", torch.zeros(3, 2), (1,)).tolist() == [0, 0, 0]


def test_fpgm_finds_the_filter_in_the_middle():
    weight = torch.tensor([[0.0, 0], [4, 0], [2, 0], [9, 1]])
    assert score("fpgm", weight, (1,)).argmin() == 2


def test_fpgm_goes_through_wide_layers_in_pieces():
    weight = torch.randn(700, 3)  # more pairs than fit into one piece
    found = score("fpgm", weight, (1,))
    assert found == pytest.approx(torch.cdist(weight, weight).double().sum(1).numpy(), rel=1e-4)


def test_the_sign_of_a_mean_decides():
    net = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 4, 1))
    with torch.no_grad():
        net[0].weight[:, :, 0, 0] = torch.tensor([[-9.0, -1], [1, 1], [9, -8]])
    analysis = analyze(net, torch.ones(1, 2, 4, 4))
    assert score_groups(net, analysis, "mean_weight_signed")[0].tolist() == [-5, 1, 0.5]
    with pytest.raises(PruningError, match="'product' takes no scores below 0"):
        score_groups(net, analysis, "mean_weight_signed", reduction="product")
