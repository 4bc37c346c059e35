"""A network that has learned real digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn


@pytest.fixture(scope="session")
def digits():
    """Real images, train and test, and a network that has learned them."""
    values, targets = load_digits(return_X_y=True)
    images = torch.from_numpy((values / 8 - 1).reshape(-1, 1, 8, 8).astype(np.float32))
    labels = torch.from_numpy(targets.astype(np.int64))
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        nn.MaxPool2d(2),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(60):
        batch = torch.arange(step * 64, step * 64 + 64) % 1400
        loss = nn.functional.cross_entropy(net(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval(), images[:1400], images[1400:], labels[1400:]
