"""Rounding that is learned: errors of a layer's weights take each other back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchao.quantization.pt2e.observer import PerChannelMinMaxObserver

from bevel.core.recipe import Quantization
from bevel.graph.program import export_program
from bevel.quantization.annotate import FusingQuantizer
from bevel.quantization.pt2e import quantize
from bevel.quantization.ranges import u8s8
from bevel.quantization.rounding import round_together
from bevel.quantization.sensitivity import sqnr_db
from bevel.quantization.simulation import FakeQuantize


def test_learned_rounding_comes_closer_than_the_nearest(digits):
    net, train, test, _ = digits
    program = export_program(net, (train[:2],))
    with torch.no_grad():
        exact = net(test)
    found = {}
    for option in (False, True):
        options = Quantization(learn_rounding=option)
        integers = quantize(program, FusingQuantizer(narrow()), [train[:256]], options)
        with torch.no_grad():
            found[option] = sqnr_db(exact, integers(test))
    assert found[True] > found[False] + 1


def narrow():
    """int8 activations, and weights of 4 bits, so that rounding is what matters."""
    types = u8s8()
    return replace(types, weights=replace(types.weights, quant_min=-7, quant_max=7))


@pytest.mark.parametrize("groups", [1, 2])
def test_rounding_together_gives_integers_and_never_a_larger_error(groups):
    torch.manual_seed(0)
    weight, inputs = torch.randn(8, 6 // groups * 9), torch.randn(groups, 6 // groups * 9, 400)
    inputs = inputs + 2 * inputs.roll(1, 1)  # neighbours are alike, as in images
    observer = PerChannelMinMaxObserver(
        dtype=torch.int8, quant_min=-7, quant_max=7, qscheme=torch.per_channel_symmetric
    )
    observer(weight)
    rounding, gram = FakeQuantize(observer), inputs @ inputs.transpose(1, 2)
    together = round_together(weight, rounding, gram)
    assert torch.allclose(rounding(together), together, atol=1e-6)
    errors = []
    for rounded in (rounding(weight), together):
        apart = (rounded - weight).reshape(groups, -1, weight.shape[1]) @ inputs
        errors.append(apart.square().sum(2).flatten())
    assert (errors[1] <= errors[0] * 1.0001).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()
