"""Names of modules and tensors are those that torch gives."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

from bevel.graph.naming import named_modules, named_tensors


class Shared(nn.Module):
    """A module in two places, a tensor in three, an empty place, and a parametrised weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.again = self.first[0]
        self.other = nn.Linear(4, 4)
        self.other.weight = self.again.weight
        self.register_module("nothing", None)
        self.register_parameter("none", None)
        self.register_buffer("mean", self.first[1].running_mean)
        self.last = parametrizations.weight_norm(nn.Linear(4, 2))


@pytest.mark.parametrize(
    "net",
    [
        Shared,
        lambda: nn.Linear(2, 2),
        torchvision.models.googlenet,
        lambda: torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights_backbone=None),
        lambda: timm.create_model("swin_tiny_patch4_window7_224"),
    ],
    ids=["shared", "linear", "googlenet", "ssdlite", "swin"],
)
def test_names_and_their_order(net):
    with torch.random.fork_rng():
        net = net()
    modules = named_modules(net)
    assert list(modules.items()) == list(net.named_modules())
    every = named_modules(net, repeated=True)
    assert list(every.items()) == list(net.named_modules(remove_duplicate=False))
    tensors = named_tensors(modules)
    expected = dict(net.named_parameters()) | dict(net.named_buffers())
    assert list(tensors) == list(expected)
    assert all(tensors[name] is tensor for name, tensor in expected.items())
