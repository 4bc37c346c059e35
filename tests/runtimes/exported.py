"""What the tests of exported files share: outputs of file and network, and networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bevel.core.records import Artifact
from bevel.runtimes.onnxruntime import open_session


def file_outputs(artifact: Artifact, *inputs: Tensor) -> list[np.ndarray]:
    return open_session(Path(artifact.path), 1).run([tensor.numpy() for tensor in inputs])


def net_outputs(net: nn.Module, *inputs: Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        return [leaf.numpy() for leaf in tree_leaves(net(*inputs))]


def assert_same(got: list[np.ndarray], expected: list[np.ndarray], tolerance: float = 1e-5) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= tolerance * max(1.0, np.abs(other).max())


class OneImage(nn.Module):
    """Its shapes hold for one image only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.reshape(1, 3, 8, 8)).mean((2, 3))


class TwoViews(nn.Module):
    """Two inputs, and three outputs in a dictionary with a list in it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor | list[Tensor]]:
        left, right = torch.relu(self.left(x)), torch.relu(self.right(y))
        return {"sum": left + right, "both": [left.mean((2, 3)), right.amax((2, 3))]}


class Branching(nn.Module):
    """Which way it goes depends on values: torch.export refuses it."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Bessel(nn.Module):
    """Its operator has no ONNX form."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)
