"""`load`: from a recipe's data section to `Data`, which gives batches of every split."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bevel.core import plugins, userfile
from bevel.core.errors import DataError
from bevel.core.recipe import DataSection
from bevel.data.batches import FixedBatches, TrainBatches
from bevel.data.images import DECODING_FAULTS, Frame, channels_of
from bevel.data.pixels import MEMORY_LIMIT_BYTES, ImageSet
from bevel.data.splits import (
    UNLABELLED,
    Indices,
    Joined,
    Source,
    Splits,
    describe,
    fetch,
    labels_of,
    stratified_cut,
    unreadable,
)
from bevel.data.unlabelled import Photographs
from bevel.data.userdata import from_function

SPLITS = ("train", "validation", "test")
SUBSET_SEED = 20
"""Seed of the images that `limit` takes: the same in every run, whatever the recipe's seed."""


@dataclass
class _Part:
    """One split: part of a source; its labels are looked at on first use."""

    source: Source
    name: str
    indices: Indices
    classes: tuple[str, ...]
    _labels: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        if self._labels is None:
            every = labels_of(self.source, self.name, self.classes)
            self._labels = torch.from_numpy(every[self.indices])
        return self._labels


class Data:
    """Labelled images in three splits.

    Attributes:
        classes: names, in the order of the labels.
        input_shape: (C, H, W) of one image as the network sees it.
        sizes: number of images per split.
    """

    def __init__(
        self,
        parts: Mapping[str, _Part],
        images: Mapping[str, ImageSet],
        section: DataSection,
        unlabelled: Source | None = None,
    ) -> None:
        self._parts = parts
        self._images = images
        self._section = section
        self._unlabelled = unlabelled
        self.classes = parts["train"].classes
        self.input_shape = images["train"].shape
        self.sizes = {split: len(images[split]) for split in SPLITS}

    def train_batches(
        self, batch_size: int | None = None, *, seed: int, epoch: int
    ) -> TrainBatches:
        """One epoch of training: shuffled, augmented, the same for the same (seed, epoch).

        Args:
            batch_size: images per batch; default: the recipe's.
            seed: of the run.
            epoch: counted from 0.

        Returns:
            Sized iterable of (float32 (B, C, H, W) normalised, int64 (B,)).
        """
        return TrainBatches(
            self._images["train"],
            self._parts["train"].labels,
            batch_size or self._section.batch_size,
            self._section.normalize,
            self._section.augment,
            seed,
            epoch,
        )

    def with_unlabelled(self) -> Data:
        """The same data, with the images without labels among those of training, label -1.

        Raises:
            DataError: the section names no such images.
        """
        if self._unlabelled is None:
            raise DataError("distill.unlabelled needs data.unlabelled: a folder of images")
        images, part = self._images["train"], self._parts["train"]
        joined = Joined(images.source, self._unlabelled)
        added = np.arange(len(images.source), len(joined))
        indices = np.concatenate([images.indices, added])
        labels = torch.cat([part.labels, torch.full((len(added),), UNLABELLED)])
        keep = images.keep and len(indices) * math.prod(images.shape) <= MEMORY_LIMIT_BYTES
        more = replace(images, source=joined, indices=indices, keep=keep, _stored=None)
        both = _Part(joined, "train", indices, part.classes, labels)
        return Data({**self._parts, "train": both}, {**self._images, "train": more}, self._section)

    def batches(
        self, split: str, batch_size: int | None = None, limit: int | None = None
    ) -> FixedBatches:
        """A split without augmentation, in a fixed order; may be iterated again and again.

        Args:
            split: train, validation or test.
            batch_size: images per batch; default: the recipe's.
            limit: take this many images, drawn from all classes with a fixed seed.

        Raises:
            DataError: there is no such split.
        """
        if split not in SPLITS:
            raise DataError(f"no split '{split}'; expected one of {', '.join(SPLITS)}")
        order = np.arange(self.sizes[split])
        if limit is not None:
            order = np.random.default_rng(SUBSET_SEED).permutation(order)[: max(1, limit)]
        return FixedBatches(
            self._images[split],
            self._parts[split].labels,
            order,
            batch_size or self._section.batch_size,
            self._section.normalize,
        )


def load(section: DataSection, *, seed: int) -> Data:
    """Find the data a section names; decodes one image, and the others when they are asked for.

    Args:
        section: the recipe's data section.
        seed: decides which training images become validation, where the data has no such split.

    Raises:
        UnknownNameError: there is no such data set.
        DataError: the data is missing, empty, damaged or does not fit the section.
    """
    if userfile.is_user_function(section.name):
        splits = from_function(section)
    else:
        splits = plugins.load("datasets", section.name).load(section)
    if len(splits.classes) < 2:
        raise DataError(
            f"data '{section.name}' has {len(splits.classes)} class(es); a classifier needs 2"
        )
    parts = _parts(splits, section, seed)
    frame, shape, memory = _frame(splits, section)
    keep = memory <= MEMORY_LIMIT_BYTES
    images = {
        name: ImageSet(part.source, name, part.indices, frame, shape, keep, section.workers)
        for name, part in parts.items()
    }
    unlabelled = section.unlabelled
    return Data(
        parts, images, section, None if unlabelled is None else Photographs(unlabelled.expanduser())
    )


def _parts(splits: Splits, section: DataSection, seed: int) -> dict[str, _Part]:
    """The three splits; validation is cut from train where there is none."""

    def part(source: Source, name: str, indices: Any = None) -> _Part:
        if len(source) == 0:
            raise DataError(f"the {name} split of '{section.name}' has no images")
        chosen = np.arange(len(source)) if indices is None else indices
        return _Part(source, name, chosen, splits.classes)

    test = part(splits.test, "test")
    if splits.validation is not None:
        train, validation = part(splits.train, "train"), part(splits.validation, "validation")
    else:
        labels = labels_of(splits.train, "train", splits.classes)
        kept, held = stratified_cut(labels, section.validation, seed % 2**64)
        if len(held) == 0:
            raise DataError(
                f"no validation images can be cut from '{section.name}': every class has one image"
            )
        train, validation = part(splits.train, "train", kept), part(splits.train, "train", held)
    return {"train": train, "validation": validation, "test": test}


def _frame(splits: Splits, section: DataSection) -> tuple[Frame, tuple[int, int, int], int]:
    """The fixed transform, the shape it gives, and the bytes all images take after it.

    Raises:
        DataError: the first image is damaged, or the section does not fit it.
    """
    if section.resize is not None and (section.size is None or section.resize < section.size):
        raise DataError(
            f"data.resize is {section.resize} and data.size is {section.size}: "
            "resize needs a size, and may not be smaller"
        )
    name = describe(splits.train, "train", 0)
    first, _ = fetch(splits.train, "train", 0)
    try:
        channels = channels_of(first, name)
        frame = Frame(channels, section.size, section.resize)
        _, height, width = frame.prepare(first, name).shape
    except DECODING_FAULTS as error:
        raise unreadable(splits.train, "train", 0, error) from error
    normalize = section.normalize
    if normalize is not None and len(normalize.mean) != channels:
        raise DataError(
            f"data.normalize has {len(normalize.mean)} channels and the images have {channels}"
        )
    total = sum(len(s) for s in (splits.train, splits.validation, splits.test) if s is not None)
    return frame, (channels, height, width), total * channels * height * width
