"""Networks that show one structure each, small enough to prune in milliseconds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and batch-norm statistics from a seed: fresh statistics are 0 and 1, which hide
    faults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / _fan_in(parameter) ** 0.5)
        for module in net.modules():
            if isinstance(module, _NormBase) and module.track_running_stats:
                for tensor in (module.weight, module.running_var):
                    if tensor is not None:
                        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                for tensor in (module.bias, module.running_mean):
                    if tensor is not None:
                        tensor.copy_(torch.randn(tensor.shape, generator=generator) / 2)
    return net.eval()


def _fan_in(parameter: Tensor) -> int:
    return max(1, parameter[0].numel()) if parameter.ndim else 1


def conv(inputs: int, outputs: int, **options: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **options),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Plain(nn.Module):
    """Convolutions, then a flattened feature map into a classifier (as VGG on CIFAR)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 16), nn.MaxPool2d(2), conv(16, 24), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Linear(24 * 4, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.features(x), 1))


class HardWired(Plain):
    """As Plain, but forward states the flattened size in numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).view(-1, 96))


class Projection(nn.Module):
    """A residual block with a projection shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.a, self.b = conv(16, 24), nn.Conv2d(24, 32, 3, padding=1)
        self.shortcut = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.b(self.a(x)) + self.shortcut(x))
        return self.head(x.mean((2, 3)))


class Grouped(nn.Module):
    """Grouped and depthwise convolutions, with a depth multiplier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.grouped = conv(16, 32, groups=4)
        self.depthwise = conv(32, 64, groups=32)
        self.point = nn.Conv2d(64, 24, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.depthwise(self.grouped(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(F.hardswish(x), 1).flatten(1))


class Concat(nn.Module):
    """Branches joined along channels, with the input among them, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 16), conv(3, 8)
        self.mix = conv(16 + 8 + 3, 24)
        self.gate = nn.Sequential(nn.Conv2d(24, 8, 1), nn.SiLU(), nn.Conv2d(8, 24, 1), nn.Sigmoid())
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(torch.cat([self.a(x), self.b(x), x], dim=1))
        x = x * self.gate(F.adaptive_avg_pool2d(x, 1))
        return self.head(x.mean((2, 3)))


class Shared(nn.Module):
    """One convolution used twice, and a tied pair of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = conv(3, 16), conv(16, 16)
        self.up = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.one, self.two = nn.Conv2d(12, 4, 1), nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.up(self.twice(self.twice(self.stem(x))))
        return {"one": self.one(x), "two": self.two(x)}


class Padded(nn.Module):
    """A padded shortcut whose amounts are numbers in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = conv(3, 16), conv(16, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.a(x) + F.pad(x, (0, 0, 0, 0, 8, 8))
        return self.head(x.mean((2, 3)))


ALL = (Plain, HardWired, Projection, Grouped, Concat, Shared, Padded)
EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
