"""A network of what makes int8 slow or wrong: hard swish, SiLU, squeeze-excite and a join."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Hardswish())
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6())
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.beside = nn.Sequential(nn.Conv2d(16, 16, 1), nn.SiLU())
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        y = self.deep(x)
        gate = torch.relu(self.squeeze(nn.functional.adaptive_avg_pool2d(y, 1)))
        y = y * nn.functional.hardsigmoid(self.excite(gate))
        both = torch.cat([y, self.beside(x)], 1)
        scores: Tensor = self.head(both.mean((2, 3)))
        return scores


def gated() -> nn.Module:
    torch.manual_seed(3)
    return Gated().eval()


def batches(count: int = 2, size: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, 3, 16, 16, generator=generator) for _ in range(count)]


MACS = 27_648 + 9_216 + 128 + 128 + 16_384 + 320
"""Multiply-accumulates for one image: stem, deep, squeeze, excite, beside, head."""
