"""What a convolution reads, laid out: its weights times that are what it gives."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bevel.graph.patches import patches, some_places

CASES = [
    {},
    {"stride": [2, 1], "padding": [1, 2]},
    {"padding": [2], "dilation": [2]},
    {"stride": [3], "padding": [0, 1], "dilation": [1, 2], "groups": 2},
    {"groups": 4, "padding": [1, 1]},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_times_patches_are_the_outputs(case):
    torch.manual_seed(0)
    how = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], **case}
    groups = how.pop("groups", 1)
    x, weight = torch.randn(3, 4, 11, 13), torch.randn(8, 4 // groups, 3, 2)
    y = F.conv2d(x, weight, groups=groups, **how)
    places = some_places(y[0, 0].numel(), 20)
    read = patches(x, weight, places, y.shape[3], **how)
    found = (weight.reshape(groups, 8 // groups, -1) @ read).reshape(8, 3, len(places))
    assert torch.allclose(found.transpose(0, 1), y.flatten(2)[:, :, places], atol=1e-5)


def test_fewer_places_are_the_first_of_more():
    more = some_places(50, 64)
    assert sorted(more.tolist()) == list(range(50))
    assert torch.equal(some_places(50, 7), more[:7])
