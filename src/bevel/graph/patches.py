"""What convolutions read, at some places of what they make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def some_places(count: int, most: int) -> Tensor:
    """Some of `count` places, the same whenever they are asked for; fewer are the first of more."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most]


def patches(
    x: Tensor,
    weight: Tensor,
    places: Tensor,
    width: int,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """What the outputs of a 2-d convolution at these places are made of.

    Args:
        x: its input, (N, C, H, W).
        weight: (outputs, inputs of a group, height, width).
        places: numbers of places of its output, row by row.
        width: of its output.
        stride: of height and width, one number for both or two, as padding and dilation.
        padding: with zeros.
        dilation: of the kernel.

    Returns:
        (groups, weights of an output, N x places), image by image.
    """
    (step_down, step_right), (down, right), (far_down, far_right) = map(
        pair, (stride, padding, dilation)
    )
    x = F.pad(x, (right, right, down, down))
    rows, columns = places // width * step_down, places % width * step_right
    taps = [
        x[:, :, rows + i * far_down, columns + j * far_right]
        for i in range(weight.shape[2])
        for j in range(weight.shape[3])
    ]
    laid = torch.stack(taps, 2)  # (images, channels, taps, places)
    groups = x.shape[1] // weight.shape[1]
    grouped = laid.reshape(len(x), groups, math.prod(weight.shape[1:]), len(places))
    return grouped.permute(1, 2, 0, 3).flatten(2)


def pair(value: Any) -> tuple[int, int]:
    """Height and width, of a number that stands for both, alone or in a list, or of two."""
    if isinstance(value, int):
        return value, value
    return int(value[0]), int(value[-1])
