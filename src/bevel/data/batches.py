"""Batches of normalised float images and labels, re-iterable and always the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from bevel.core.recipe import Augment, Normalize
from bevel.data.pixels import ImageSet
from bevel.data.splits import Indices

Batch = tuple[Tensor, Tensor]


def to_float(images: Tensor, normalize: Normalize | None) -> Tensor:
    """uint8 (N, C, H, W) -> float32: scaled to 0..1, then minus mean, divided by std."""
    scaled: Tensor = TF.to_dtype(images, torch.float32, scale=True)
    if normalize is not None:
        scaled = TF.normalize(scaled, normalize.mean, normalize.std, inplace=True)
    return scaled


def shift_and_flip(images: Tensor, shifts: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Pad with black, crop each image back at its own place, mirror some: uint8 (N, C, H, W).

    One gather for the whole batch: much faster than a transform per image.

    Args:
        images: uint8 (N, C, H, W).
        shifts: int64 (N, 2), top and left of the crop in the padded image, 0..2 * padding.
        flips: bool (N,), which to mirror left to right.
        padding: pixels on each side.
    """
    count, channels, height, width = images.shape
    padded = F.pad(images, (padding, padding, padding, padding)) if padding else images
    columns = torch.arange(width).expand(count, width)
    columns = torch.where(flips[:, None], width - 1 - columns, columns) + shifts[:, 1:]
    rows = torch.arange(height) + shifts[:, :1]
    index = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    flat = index.reshape(count, 1, height * width).expand(count, channels, height * width)
    return padded.reshape(count, channels, -1).gather(2, flat).reshape(images.shape)


@dataclass
class FixedBatches:
    """Images of a split in a fixed order, without augmentation.

    Iterating yields float32 (B, C, H, W) and int64 (B,); the last batch may be smaller.
    """

    images: ImageSet
    labels: Tensor
    order: Indices
    batch_size: int
    normalize: Normalize | None
    _held: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        groups = [
            self.order[start : start + self.batch_size]
            for start in range(0, len(self.order), self.batch_size)
        ]
        for group, pixels in zip(groups, self._pixels(groups), strict=True):
            yield to_float(pixels, self.normalize), self.labels[torch.from_numpy(group)]

    def _pixels(self, groups: Sequence[Indices]) -> Iterator[Tensor]:
        few = 2 * len(self.order) < len(self.images)
        if not (self.images.keep and few and not self.images.loaded):
            yield from self.images.stream(groups)
            return
        if self._held is None:  # no need to decode a whole split for a few of its images
            self._held = self.images.decode(self.order)
        yield from torch.split(self._held, self.batch_size)


@dataclass(frozen=True)
class TrainBatches:
    """One epoch of shuffled, augmented images: a pure function of (seed, epoch).

    All batches are full (a compiled network sees one shape, batch norms see no tiny batch); the
    images left over differ from epoch to epoch. Fewer images than one batch make one batch.
    """

    images: ImageSet
    labels: Tensor
    batch_size: int
    normalize: Normalize | None
    augment: Augment
    seed: int
    epoch: int

    def __len__(self) -> int:
        return max(1, len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        key = (self.seed % 2**64, self.epoch)
        random = np.random.default_rng(key)
        count = len(self.images)
        order = random.permutation(count)
        padding = self.augment.padding if self.augment.crop == "pad" else 0
        shifts = torch.from_numpy(random.integers(0, 2 * padding + 1, (count, 2)))
        flips = torch.from_numpy(random.random(count) < 0.5)
        moves = padding > 0 or self.augment.flip
        if not self.augment.flip:
            flips.zero_()
        size = min(self.batch_size, count)
        groups = [order[i * size : (i + 1) * size] for i in range(len(self))]
        for group, pixels in zip(groups, self._pixels(groups, key), strict=True):
            which = torch.from_numpy(group)
            if moves:
                pixels = shift_and_flip(pixels, shifts[which], flips[which], padding)
            yield to_float(pixels, self.normalize), self.labels[which]

    def _pixels(self, groups: Sequence[Indices], key: Sequence[int]) -> Iterator[Tensor]:
        if self.augment.crop != "resized":
            return self.images.stream(groups)
        crop = partial(self.images.read_crop, share=self.augment.scale, seed=key)
        return self.images.stream(groups, crop)
