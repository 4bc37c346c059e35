"""A network that learns digits in seconds, for tests of what a flow does, not of how well."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Three convolutions, of which a shortcut goes round two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32),
        )  # fmt: skip
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, H, W)."""
        features = self.stem(images)
        logits: Tensor = self.head(torch.relu(features + self.block(features)))
        return logits


FACTORY = f"{__file__}:Residual"
"""As a recipe names it."""
