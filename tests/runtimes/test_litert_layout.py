"""Zero padding of LiteRT files goes into the convolutions, or at least into their layout."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import net_outputs
from torch import nn

import bevel
from bevel.measurement.parity import run_batch
from networks import randomise

pytest.importorskip("litert_torch", reason="needs the extra 'litert'")
from bevel.runtimes import litert

SIZE = 17


def padded(first: tuple[int, ...], second: tuple[int, ...]) -> nn.Module:
    """Two strided convolutions behind zero paddings: of the image, and of what lies within."""
    return nn.Sequential(
        nn.ZeroPad2d(first),
        nn.Conv2d(3, 16, 3, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ZeroPad2d(second),
        nn.Conv2d(16, 16, 3, stride=2, groups=16, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


SAME = ((1, 1, 1, 1), (1, 1, 1, 1))
"""What SAME adds to 17 rows, of which a stride of 2 makes 9, and to 9, of which it makes 5."""

OTHER = ((0, 2, 0, 2), (2, 0, 1, 1))
"""As much, at other sides."""


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize(("paddings", "pads"), [(SAME, 0), (OTHER, 2)])
def test_paddings_need_no_transpose_of_their_own(tmp_path, precision, paddings, pads):
    net = randomise(padded(*paddings)).eval()
    images = torch.randn(32, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    artifact = bevel.export(
        net,
        images[:1],
        runtime="litert",
        precision=precision,
        calibration=[images] if precision == "int8" else None,
        path=tmp_path / "net.tflite",
    )
    found = litert.operators(Path(artifact.path))
    assert all(operator.delegated for operator in found), found
    counts = Counter(operator.kind for operator in found)
    assert counts["PAD"] == pads
    assert counts["TRANSPOSE"] == 1  # of the image
    (expected,) = net_outputs(net, images)
    got = run_batch(litert.open_session(Path(artifact.path), 1), images.numpy())
    allowed = 1e-5 if precision == "float32" else 0.05
    assert np.abs(got - expected).max() < allowed * np.abs(expected).max()
