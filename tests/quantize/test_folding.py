"""Batch norms whose layer others read, or share the weights of: int8 computes the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bevel.core.recipe import Quantization
from bevel.graph.program import export_program
from bevel.models.densenet import DenseNet
from bevel.quantization.annotate import FusingQuantizer
from bevel.quantization.aware import quantization_aware
from bevel.quantization.folding import APART, BATCH_NORM, keep_apart, rejoin
from bevel.quantization.pt2e import calibrated, quantize
from bevel.quantization.ranges import u8s8
from bevel.quantization.sensitivity import sqnr_db
from bevel.quantization.simulation import Simulation
from networks import EXAMPLE, Plain, randomise


class PreActivation(nn.Module):
    """The stem is read by a batch norm and by an addition, as in pre-activation ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv(F.relu(self.norm(x)))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class Twice(nn.Module):
    """One convolution at two places, with a batch norm of its own at each, or the same."""

    def __init__(self, norms: int) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(norms))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.conv(self.stem(x))))
        x = F.relu(self.norms[-1](self.conv(x)))
        return self.head(x.mean((2, 3)))


class Vectors(nn.Module):
    """A linear layer that a batch norm and an addition read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        return self.head(F.relu(self.norm(x)) + x)


NETWORKS = {
    "preactivation": (PreActivation, 1),
    "two_norms": (lambda: Twice(2), 2),
    "one_norm_twice": (lambda: Twice(1), 0),
    "linear": (Vectors, 1),
    "plain": (Plain, 0),
    "densenet": (lambda: DenseNet(2, 4, num_classes=5), 1),
}


def images() -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("equalize", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_that_is_quantized_computes_the_same(name, equalize):
    net, x = randomise(NETWORKS[name][0]()), images()
    program = export_program(net, (EXAMPLE,))
    options = Quantization(equalize=equalize)
    prepared = calibrated(program, FusingQuantizer(u8s8()), [x], options)
    with torch.no_grad():
        expected, got = net(x), prepared(x)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not [node for node in prepared.graph.nodes if node.target is APART]


@pytest.mark.parametrize("name", NETWORKS)
def test_only_those_are_kept_apart(name):
    make, apart = NETWORKS[name]
    module = export_program(randomise(make()), (EXAMPLE,)).module()
    before = [node.name for node in module.graph.nodes]
    assert keep_apart(module) == apart
    rejoin(module)
    assert [node.name for node in module.graph.nodes] == before


def test_int8_is_near_to_float():
    net, x = randomise(PreActivation()), images()
    program = export_program(net, (EXAMPLE,))
    simulation = Simulation(calibrated(program, FusingQuantizer(u8s8()), [x]))
    with torch.no_grad():
        assert 25 < sqnr_db(net(x), simulation.net(x)) < 60  # it is rounded, and no more


def test_training_for_int8_starts_from_the_same_network():
    net, x = randomise(PreActivation()), images()
    aware = quantization_aware(export_program(net, (EXAMPLE,)), FusingQuantizer(u8s8()), [x])
    with torch.no_grad():
        assert sqnr_db(net(x), aware(x)) > 25
    assert sum(isinstance(module, _BatchNorm) for module in aware.modules()) == 2


def test_a_batch_norm_that_nothing_else_reads_is_folded():
    program = export_program(randomise(Plain()), (EXAMPLE,))
    prepared = calibrated(program, FusingQuantizer(u8s8()), [images()])
    assert BATCH_NORM not in [node.target for node in prepared.graph.nodes]


def test_nothing_is_looked_for_that_only_training_for_int8_leaves(monkeypatch):
    import torchao.quantization.pt2e.qat_utils as trained

    # Tracing a pattern of quantization-aware training fails: it takes seconds, and there are many.
    monkeypatch.setattr(trained, "_get_aten_graph_module_for_pattern", None)
    net, x = randomise(PreActivation()), images()
    int8 = quantize(export_program(net, (EXAMPLE,)), FusingQuantizer(u8s8()), [x])
    assert [node.target for node in int8.graph.nodes].count(BATCH_NORM) == 2
    with torch.no_grad():
        assert sqnr_db(net(x), int8(x)) > 25
