"""Layers switch between float and int8; the fewest in float that keep accuracy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bevel.core.recipe import Quantization
from bevel.graph.program import export_program
from bevel.quantization.annotate import FusingQuantizer
from bevel.quantization.keeping import KeepingFloat
from bevel.quantization.pt2e import calibrated, quantize
from bevel.quantization.ranges import u8s8
from bevel.quantization.sensitivity import TensorNoise, fewest_in_float, relief, sensitivity
from bevel.quantization.simulation import Simulation


@pytest.fixture(scope="module")
def spoiled(digits):
    """The digits network with one convolution that per-tensor int8 cannot do."""
    net, train, test, labels = digits
    net = copy.deepcopy(net)
    with torch.no_grad():  # one channel that nothing reads is a thousand times the others
        net[4].weight[0] *= 0
        net[5].weight[0], net[5].bias[0] = 0, 4000.0
        net[9].weight[:, :4] = 0
    return net, train, test, labels


def simulated(net: nn.Module, train: torch.Tensor) -> Simulation:
    program = export_program(net, (train[:2],))
    return Simulation(calibrated(program, FusingQuantizer(u8s8()), [train[:256]]))


def test_simulation_computes_what_the_converted_network_does(digits):
    net, train, test, _ = digits
    simulation = simulated(net, train)
    program = export_program(net, (train[:2],))
    with torch.no_grad():
        for keep in ([], simulation.layers[:1], simulation.layers[1:], simulation.layers):
            options = Quantization(keep_float=keep)
            reference = quantize(program, FusingQuantizer(u8s8()), [train[:256]], options)
            simulation.keep_float(keep)
            difference = (simulation.net(test) - reference(test)).abs()
            assert difference.mean() < 1e-3 * reference(test).abs().max(), keep
        simulation.quantize_only(())
        assert torch.allclose(simulation.net(test), net(test), atol=1e-4)


def test_the_spoiled_layer_is_the_most_sensitive_and_alone_in_float(spoiled):
    net, train, test, labels = spoiled
    simulation = simulated(net, train)
    ranking = sensitivity(simulation, [train[:64]])
    assert {item.layer for item in ranking} == set(simulation.layers)
    assert ranking[0].sqnr_db < ranking[-1].sqnr_db
    found = fewest_in_float(simulation, [train[:64]], [(test, labels)], drop=0.02)
    assert found.accuracy_int8 < found.limit <= found.accuracy
    assert 0 < len(found.keep_float) < len(simulation.layers)
    assert len(found.tried) <= 4
    assert found.keep_float[0] in str(found)

    program = export_program(net, (train[:2],))
    options = Quantization(keep_float=found.keep_float)
    mended = quantize(program, FusingQuantizer(u8s8()), [train[:256]], options)
    with torch.no_grad():
        accuracy = (mended(test).argmax(1) == labels).float().mean()
    assert accuracy >= found.limit


def test_steps_take_all_layers_around_a_tensor_and_count_what_a_module_holds():
    tensors = [
        TensorNoise(["a", "b"], 0.9),  # between two layers: neither alone ends it
        TensorNoise(["block"], 1.0),  # a sum in a block of three layers
        TensorNoise(["c"], 0.4),
        TensorNoise(["block.x"], 0.1),  # goes with the block
        TensorNoise([""], 5.0),  # of the network's own forward: cannot be named
    ]
    layers = ["a", "b", "c", "block.x", "block.y", "block.z"]
    assert list(relief(tensors, layers)) == [["a", "b"], ["c"], ["block"]]


def test_layers_around_the_worst_tensors_help_more_than_the_worst_layers(spoiled):
    net, train, test, labels = spoiled
    simulation = simulated(net, train)
    found = fewest_in_float(simulation, [train[:64]], [(test, labels)], drop=0.02)
    alone = [item.layer for item in sensitivity(simulation, [train[:64]])]
    simulation.keep_float(alone[: len(found.keep_float)])
    with torch.no_grad():
        accuracy = (simulation.net(test).argmax(1) == labels).float().mean()
    assert found.accuracy >= accuracy


def test_nothing_stays_in_float_where_int8_is_good_enough(digits):
    net, train, test, labels = digits
    found = fewest_in_float(simulated(net, train), [train[:64]], [(test, labels)], drop=0.05)
    assert found.keep_float == []
    assert found.tensors == []
    assert "no layer in float" in str(found)


def test_kept_layers_have_no_integer_weights(digits):
    net, train, _, _ = digits
    program = export_program(net, (train[:2],))
    for quantizer in (
        FusingQuantizer(u8s8(), keep_float=["3", "9"]),
        KeepingFloat(FusingQuantizer(u8s8()), ["[39]"]),
        FusingQuantizer(u8s8(), keep_float=["[49]"]),
    ):
        integers = quantize(program, quantizer, [train[:64]])
        weights = [
            node for node in integers.graph.nodes if "dequantize_per_channel" in str(node.target)
        ]
        expected = 1 if "[49]" in getattr(quantizer, "keep_float", ()) else 2
        assert len(weights) == expected
