"""Large tensors of zeros that all lie in the same memory, which nobody may leave written to."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

SMALL = 1 << 14
"""Bytes up to which torch's own way is as quick."""


class _Zeros:
    """Pages that the kernel has cleared, as many as the largest tensor so far needed.

    While nobody writes to them they all are one page of memory: making a tensor costs the same
    whatever its size, and reading one does not wait for memory. A fresh tensor for every activation
    of a large network takes longer than anything else in recording it.
    """

    def __init__(self) -> None:
        self._pages = mmap.mmap(-1, mmap.PAGESIZE)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        size = count * dtype.itemsize
        if size > len(self._pages):  # tensors in the pages until now keep them
            self._pages = mmap.mmap(-1, 2 * size)
        return torch.frombuffer(self._pages, dtype=dtype, count=count).view(tuple(shape))


_ZEROS = _Zeros()


def zeros(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor of zeros on the device of `like`, and of its dtype unless one is given.

    It may share its memory with others: whoever writes to it has to make it zero again.
    """
    dtype = dtype or like.dtype
    if like.device.type != "cpu" or math.prod(shape) * dtype.itemsize <= SMALL:
        return like.new_zeros(shape, dtype=dtype)
    return _ZEROS.tensor(shape, dtype)
