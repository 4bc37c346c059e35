"""Quantization-aware training: the same weights under the same names, better in int8."""

from __future__ import annotations

import pytest
import torch
from quantize_networks import uneven
from torch import nn

from bevel.core import plugins
from bevel.core.errors import ExportError, MissingDependencyError
from bevel.core.recipe import Quantization
from bevel.core.steps import QatStep
from bevel.finetuning.train import finetune
from bevel.graph.program import export_program
from bevel.pipeline.int8 import quantizer_of
from bevel.quantization.annotate import FusingQuantizer
from bevel.quantization.aware import freeze, quantization_aware, trained_weights
from bevel.quantization.pt2e import quantize
from bevel.quantization.ranges import u8s8
from bevel.quantization.simulation import FakeQuantize
from networks import EXAMPLE, Concat, Grouped, Plain, Projection, randomise


class Digits:
    """Training data of the digits fixture."""

    classes = tuple("0123456789")

    def __init__(self, train, labels, test, test_labels) -> None:
        self.train, self.labels, self.test = train, labels, (test, test_labels)

    def train_batches(self, *, seed: int, epoch: int):
        order = torch.randperm(
            len(self.train), generator=torch.Generator().manual_seed(seed * 1000 + epoch)
        )
        return [(self.train[i], self.labels[i]) for i in order.split(64)]

    def batches(self, split: str):
        return {"validation": [self.test]}[split]


def rounded(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(x)


def int8_runtimes() -> list[str]:
    """The installed runtimes that have int8."""
    found = []
    for name in plugins.discover("runtimes"):
        try:
            module = plugins.load("runtimes", name)
        except MissingDependencyError:
            continue
        found += [name] if "int8" in module.PRECISIONS else []
    return found


@pytest.mark.parametrize("runtime", int8_runtimes())
@pytest.mark.parametrize("network", [Plain, Projection, Grouped, Concat])
def test_it_starts_as_what_the_runtimes_int8_computes_and_learns(network, runtime):
    net = randomise(network())
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    program = export_program(net, (EXAMPLE,))
    aware = quantization_aware(program, quantizer_of(runtime, Quantization()), [x])
    expected = rounded(quantize(program, quantizer_of(runtime, Quantization()), [x]), x)
    got = rounded(aware, x)
    spread = expected.max() - expected.min()
    assert (got - expected).abs().mean() < 0.004 * spread
    assert (got - rounded(net, x)).abs().mean() > 0
    own = {name for name, _ in net.named_parameters()}
    assert {name for name, _ in aware.named_parameters()} == own
    assert set(net.state_dict()) <= set(aware.state_dict())
    aware.train()
    aware(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in aware.parameters())


def test_all_weights_learn_and_come_back():
    net = randomise(Grouped())
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    aware = quantization_aware(export_program(net, (EXAMPLE,)), FusingQuantizer(u8s8()), [x])
    aware.train()
    aware(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in aware.parameters())
    with torch.no_grad():
        for parameter in aware.parameters():
            parameter += 0.01
    back = trained_weights(net, aware)
    for name, value in back.named_parameters():
        assert torch.allclose(value, net.get_parameter(name) + 0.01)
    norms = [n for n, _ in net.named_buffers() if n.endswith("running_mean")]
    assert norms
    assert not any(torch.equal(back.get_buffer(n), net.get_buffer(n)) for n in norms)


def test_frozen_statistics_and_ranges_stay():
    net = randomise(Plain())
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    aware = quantization_aware(export_program(net, (EXAMPLE,)), FusingQuantizer(u8s8()), [x])

    def state():
        ranges = [m for m in aware.modules() if isinstance(m, FakeQuantize) and not m.of_weight]
        norms = [b.clone() for n, b in aware.named_buffers() if n.endswith("running_var")]
        return [m.scale.clone() for m in ranges] + norms

    aware.train()
    before = state()
    aware(3 * x)
    moved = state()
    assert all(not torch.equal(a, b) for a, b in zip(before, moved, strict=True))
    freeze(aware)
    aware(9 * x)
    assert all(torch.equal(a, b) for a, b in zip(moved, state(), strict=True))


def test_training_makes_int8_better(digits):
    net, train, test, labels = digits
    net = uneven(net, 2.2)
    with torch.no_grad():
        targets = digits[0](train).argmax(1)
    program = export_program(net, (train[:2],))
    plain = quantize(program, FusingQuantizer(u8s8()), [train[:256]])
    before = (rounded(plain, test).argmax(1) == labels).float().mean()
    aware = quantization_aware(program, FusingQuantizer(u8s8()), [train[:256]])
    settings = QatStep(
        epochs=3, lr=0.01, precision="float32", compile="never", distill={"weight": 0.5}
    )
    trained = finetune(
        aware, Digits(train, targets, test, labels), settings, teacher=net, freeze=freeze
    )
    back = trained_weights(net, trained.net)
    assert type(back) is type(net)
    again = quantize(export_program(back, (train[:2],)), FusingQuantizer(u8s8()), [train[:256]])
    after = (rounded(again, test).argmax(1) == labels).float().mean()
    assert before < 0.9
    assert after > before + 0.03
    assert trained.history[-1]["validation_top1"] == pytest.approx(float(after), abs=0.02)


def test_a_network_of_one_batch_size_is_refused():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(192, 4)

        def forward(self, x):
            return self.layer(x.reshape(1, 192))

    program = export_program(Fixed(), (EXAMPLE[:1],))
    with pytest.raises(ExportError, match="any batch size"):
        quantization_aware(program, FusingQuantizer(u8s8()), [EXAMPLE[:1]])
