"""Equalization is exact in float and mends int8; biases take back their mean error."""

from __future__ import annotations

import pytest
import torch
from quantize_networks import uneven
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, mobilenet_v3_small

from bevel.core.recipe import Quantization
from bevel.graph.program import export_program
from bevel.quantization.annotate import FusingQuantizer
from bevel.quantization.pt2e import calibrated, quantize
from bevel.quantization.ranges import u8s8
from bevel.quantization.sensitivity import sqnr_db
from bevel.quantization.weights import (
    clip_hard_sigmoids,
    correct_biases,
    equalize,
    fold_batch_norms,
)
from networks import EXAMPLE, Grouped, Padded, Plain, Projection, randomise


def images(count: int = 64, seed: int = 5) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("network, pairs", [(Plain, 2), (Projection, 1), (Grouped, 3), (Padded, 0)])
def test_equalization_changes_nothing_in_float(network, pairs):
    net = randomise(network())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    program = export_program(net, (EXAMPLE,))
    module = program.module()
    fold_batch_norms(module)
    assert equalize(module) == pairs
    x = images()
    with torch.no_grad():
        expected, got = net(x), module(x)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_relu6_is_not_equalized_over():
    net = mobilenet_v2(
        width_mult=0.5, num_classes=10, inverted_residual_setting=((1, 16, 1, 1), (6, 24, 1, 2))
    ).eval()
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    module = export_program(net, (x,)).module()
    fold_batch_norms(module)
    assert equalize(module) == 2  # from each block's projection to the convolution after it
    with torch.no_grad():
        assert torch.allclose(module(x), net(x), atol=1e-5)


class Gates(nn.Module):
    """Squeeze-and-excite; what makes the gate, or what it makes, may have two readers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.gate = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        scale = self.gate(x.mean((2, 3), keepdim=True))
        gate = nn.functional.hardsigmoid(scale)
        product = gate * gate if self.kind == "its own square" else x * gate
        last: Tensor = self.last(product)
        if self.kind == "product read twice":
            return last + product.mean(1, keepdim=True)
        return last + scale.mean(1, keepdim=True) if self.kind == "layer read twice" else last


@pytest.mark.parametrize(
    ("net", "gates"),
    [
        (mobilenet_v3_small(num_classes=10), 9),
        (Gates("read once"), 1),
        (Gates("product read twice"), 0),
        (Gates("layer read twice"), 0),
        (Gates("its own square"), 0),
    ],
)
def test_hard_sigmoids_become_relu6_and_nothing_else_changes(net, gates):
    net = randomise(net).eval()
    x = 3 * torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    module = export_program(net, (x,)).module()
    assert clip_hard_sigmoids(module) == gates
    targets = [str(node.target) for node in module.graph.nodes]
    assert sum("hardsigmoid" in target for target in targets) == (gates == 0)
    with torch.no_grad():
        expected, got = net(x), module(x)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_equalization_mends_uneven_channels(digits):
    net, train, test, _ = digits
    net = uneven(net)
    program = export_program(net, (train[:2],))
    with torch.no_grad():
        exact = net(test)
        found = {
            option: quantize(
                program, FusingQuantizer(u8s8()), [train[:256]], Quantization(equalize=option)
            )(test)
            for option in (False, True)
        }
    assert sqnr_db(exact, found[True]) > sqnr_db(exact, found[False]) + 3
    assert (found[True].argmax(1) == exact.argmax(1)).float().mean() > 0.98


def test_corrected_biases_leave_less_mean_error(digits):
    net, train, _, _ = digits
    program = export_program(uneven(net), (train[:2],))
    errors = {}
    for option in (False, True):
        options = Quantization(correct_bias=option)
        integers = quantize(program, FusingQuantizer(u8s8()), [train[:256]], options)
        with torch.no_grad():
            errors[option] = (integers(train[:256]) - uneven(net)(train[:256])).mean(0).abs().mean()
    assert errors[True] < 0.5 * errors[False]


def test_biases_are_corrected_layer_by_layer():
    net = randomise(Plain())
    prepared = calibrated(export_program(net, (EXAMPLE,)), FusingQuantizer(u8s8()), [images()])
    assert correct_biases(prepared, [(images(),)]) == 4


def test_a_batch_norm_behind_a_linear_layer_is_folded():
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 16))
    net = randomise(nn.Sequential(flat, nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)))
    x = images()
    integers = quantize(export_program(net, (EXAMPLE,)), FusingQuantizer(u8s8()), [x])
    with torch.no_grad():
        assert sqnr_db(net(x), integers(x)) > 25
    assert not [n for n in integers.graph.nodes if "batch_norm" in str(n.target)]
