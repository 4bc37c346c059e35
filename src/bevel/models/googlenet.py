"""GoogLeNet in its CIFAR form (Szegedy et al. 2015, arXiv:1409.4842; as pruned by HRank, CHIP).

The stem is one 3x3 convolution, every convolution has a batch norm, and the 5x5 branch is two 3x3
convolutions; no auxiliary classifiers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bevel.models.blocks import ConvNormReLU, initialise

Widths = tuple[int, int, int, int, int, int]

STAGES: tuple[tuple[Widths, ...], ...] = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
"""Widths of the blocks of table 1: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection."""


class Inception(nn.Module):
    """Four branches side by side, concatenated: (N, in, H, W) -> (N, sum of widths, H, W)."""

    def __init__(self, in_channels: int, widths: Widths) -> None:
        super().__init__()
        n1, reduce3, n3, reduce5, n5, pool = widths
        self.branch1 = _conv(in_channels, n1, 1)
        self.branch2 = nn.Sequential(_conv(in_channels, reduce3, 1), _conv(reduce3, n3, 3))
        self.branch3 = nn.Sequential(
            _conv(in_channels, reduce5, 1), _conv(reduce5, n5, 3), _conv(n5, n5, 3)
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), _conv(in_channels, pool, 1)
        )
        self.out_channels = n1 + n3 + n5 + pool

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)), 1)


class GoogLeNet(nn.Module):
    """(N, C, H, W) -> (N, num_classes)."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = _conv(in_channels, 192, 3)
        channels = 192
        layers: list[nn.Module] = []
        for number, stage in enumerate(STAGES):
            if number > 0:
                layers.append(nn.MaxPool2d(3, stride=2, padding=1))
            for widths in stage:
                block = Inception(channels, widths)
                layers.append(block)
                channels = block.out_channels
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.flatten(self.pool(self.features(self.stem(x)))))  # type: ignore[no-any-return]


def _conv(in_channels: int, out_channels: int, kernel: int) -> ConvNormReLU:
    return ConvNormReLU(in_channels, out_channels, kernel, bias=True)


def googlenet(num_classes: int = 10, in_channels: int = 3) -> GoogLeNet:
    """6.17 M parameters, 1.53 G MACs at 32x32."""
    return GoogLeNet(num_classes, in_channels)
