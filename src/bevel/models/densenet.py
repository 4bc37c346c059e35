"""DenseNet-40 for CIFAR, growth rate 12 (Huang et al. 2017, arXiv:1608.06993; as pruned by HRank).

Three dense blocks of twelve 3x3 convolutions, no bottlenecks and no compression; the stem has twice
the growth rate. The literature's 1.04 M parameters count convolutions and classifier only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bevel.models.blocks import initialise


class DenseLayer(nn.Module):
    """Batch norm -> ReLU -> 3x3 convolution, appended to its input: C -> C + growth channels."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=False)  # the input is used again
        self.conv = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.conv(self.relu(self.norm(x)))), 1)


class Transition(nn.Sequential):
    """Batch norm -> ReLU -> 1x1 convolution -> 2x2 average pooling; the channels stay."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.AvgPool2d(2),
        )


class DenseNet(nn.Module):
    """(N, C, H, W) -> (N, num_classes)."""

    def __init__(
        self, layers: int, growth: int, num_classes: int = 10, in_channels: int = 3
    ) -> None:
        super().__init__()
        channels = 2 * growth
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        parts: list[nn.Module] = []
        for block in range(3):
            if block > 0:
                parts.append(Transition(channels))
            for _ in range(layers):
                parts.append(DenseLayer(channels, growth))
                channels += growth
        self.features = nn.Sequential(*parts)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.features(self.stem(x))))
        return self.linear(self.flatten(self.pool(x)))  # type: ignore[no-any-return]


def densenet40(num_classes: int = 10, in_channels: int = 3) -> DenseNet:
    """1.06 M parameters (1.04 M without batch norms), 283 M MACs at 32x32."""
    return DenseNet(12, 12, num_classes, in_channels)
