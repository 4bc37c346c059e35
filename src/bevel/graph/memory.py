"""Large tensors of zeros that take no memory until they are written to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LARGE = 1 << 18
"""Bytes from which on this is quicker than torch's own way."""


def zeros(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A contiguous tensor of zeros of the dtype and on the device of `like`.

    numpy has its zeros from `calloc`: the kernel hands out pages that it clears at the first
    write. torch writes them all at once, which for the activations of a large network takes as
    long as reading them.
    """
    size = math.prod(shape) * like.itemsize
    if like.device.type != "cpu" or size < LARGE:
        return like.new_zeros(shape)
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(like.dtype).view(tuple(shape))
