"""The numbers that surgery folds into layers, against what they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bevel.rewriting.fitting import fit_relu
from bevel.rewriting.log import SurgeryLog
from bevel.rewriting.seen import Seen
from bevel.rewriting.surgeon import Surgeon


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("offset", [True, False])
def test_a_bent_line_is_found_again(offset):
    x = drawn(3, 4000)
    scale, bend, level = (
        torch.tensor([2.0, 0.5, 1.0]),
        torch.tensor([0.5, -1.0, 0.0]),
        0.25 * offset,
    )
    found = fit_relu(x, scale[:, None] * torch.relu(x - bend[:, None]) + level, offset=offset)
    assert torch.allclose(found.scale, scale, atol=1e-4)
    assert torch.allclose(found.shift, -scale * bend, atol=1e-4)
    assert torch.allclose(found.offset, torch.full((3,), level), atol=1e-4)


def test_the_fit_is_never_worse_than_a_plain_relu():
    for function in (nn.functional.silu, nn.functional.gelu, nn.functional.elu, torch.sigmoid):
        for spread in (0.1, 1.0, 10.0):
            x = spread * drawn(4, 2000, seed=1) + torch.tensor([[-2.0], [-0.5], [0.5], [2.0]])
            y = function(x)
            plain = (torch.relu(x) - y).square().sum(1)
            for offset in (False, True):
                fitted = (fit_relu(x, y, offset=offset)(x) - y).square().sum(1)
                assert (fitted <= plain * (1 + 1e-5) + 1e-6).all()


class Reader(nn.Module):
    """An activation and the layers that read it."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.before, self.layers = nn.Conv2d(3, 8, 1), layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(torch.relu(self.before(x)))


@pytest.mark.parametrize(
    "layers",
    [
        nn.Conv2d(8, 6, 3),
        nn.Conv2d(8, 6, 3, bias=False),
        nn.Conv2d(8, 16, 3, groups=8, bias=False),
        nn.Conv2d(8, 12, 1, groups=4),
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    ],
)
def test_offset_and_scale_go_into_the_readers_exactly(layers):
    net = Reader(layers).eval()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
    x = drawn(2, 3, 6, 6)
    seen = Seen.of(net, x)
    (relu,) = seen.calls([torch.relu])
    surgeon = Surgeon(net, seen, {}, SurgeryLog(), {})
    readers = surgeon.readers(relu.outputs[0])
    if isinstance(layers, nn.Sequential) and isinstance(layers[0], nn.AdaptiveAvgPool2d):
        assert readers is None  # a pool reads it
        return
    assert readers is not None
    scale, offset = drawn(8, seed=1).abs() + 0.1, drawn(8, seed=2)
    with torch.no_grad():
        made = torch.relu(net.before(x))
        wanted = layers(scale.reshape(-1, 1, 1) * (made + offset.reshape(-1, 1, 1)))
        surgeon.scale_input(readers, scale)
        surgeon.shift_input(readers, offset)
        assert torch.allclose(net(x), wanted, atol=1e-5)
