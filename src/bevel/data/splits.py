"""What a data set plugin returns: sources of (image, label) for train, validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import UnidentifiedImageError
from torch import Tensor

from bevel.core.errors import DataError, one_line
from bevel.core.progress import track
from bevel.core.userfile import FAULTS

UNLABELLED = -1
"""The label of an image that has none."""

Indices = npt.NDArray[np.int64]


class Source(Protocol):
    """A map-style data set: `source[i]` is (image, label); PIL image or uint8 tensor (C, H, W).

    Optional attributes make it faster: `labels` or `targets` (all labels, known without decoding),
    `pixels` (all images as one uint8 tensor (N, C, H, W)), `thread_safe` (True if images may be
    read from several threads), and `describe(i)` (what messages call an image).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


@dataclass(frozen=True)
class Splits:
    """The sources of a data set; `validation` is None where the data has no such split."""

    train: Source
    validation: Source | None
    test: Source
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Arrays:
    """A source that is in memory: uint8 pixels (N, C, H, W) and int labels (N,)."""

    pixels: Tensor
    labels: Indices

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index], int(self.labels[index])


class Joined:
    """The images of one source, and after them those of another."""

    def __init__(self, first: Source, second: Source) -> None:
        self.first, self.second = first, second
        self.thread_safe = all(getattr(s, "thread_safe", False) for s in (first, second))

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        source, own = self._at(index)
        return source[own]

    def describe(self, index: int) -> str:
        """What its own source calls an image."""
        source, own = self._at(index)
        return describe(source, "train", own)

    def _at(self, index: int) -> tuple[Source, int]:
        count = len(self.first)
        return (self.first, index) if index < count else (self.second, index - count)


def describe(source: Source, split: str, index: int) -> str:
    """What messages call an image: its path where the source knows it."""
    named = getattr(source, "describe", None)
    return str(named(index)) if callable(named) else f"image {index} of {split}"


def fetch(source: Source, split: str, index: int) -> tuple[Any, int]:
    """Image and label of one index.

    Raises:
        DataError: the source fails; the message names the image.
    """
    try:
        image, label = source[index]
    except FAULTS as error:
        raise unreadable(source, split, index, error) from error
    return image, label


def unreadable(source: Source, split: str, index: int, error: BaseException) -> DataError:
    """What to raise for an image that cannot be read or decoded."""
    # Pillow's own words for a file it does not know name an object in memory, not the file.
    known = not isinstance(error, UnidentifiedImageError)
    reason = f"{type(error).__name__}: {one_line(error, 120)}" if known else "not an image file"
    return DataError(
        f"{describe(source, split, index)} cannot be read ({reason}): replace or remove it"
    )


def labels_of(source: Source, split: str, classes: Sequence[str]) -> Indices:
    """All labels of a source, int64 (N,); images are decoded only if it does not list them.

    Raises:
        DataError: the source is empty, or a label is no index into `classes`.
    """
    if len(source) == 0:
        raise DataError(f"the {split} split has no images")
    listed = getattr(source, "labels", getattr(source, "targets", None))
    if listed is None:
        numbers = range(len(source))
        listed = [
            fetch(source, split, i)[1] for i in track(numbers, f"read {split} labels", len(source))
        ]
    try:
        labels = np.asarray(listed).astype(np.int64, casting="same_kind").reshape(-1)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the labels of {split} are not whole numbers: expected 0..{len(classes) - 1}"
        ) from error
    if len(labels) != len(source):
        raise DataError(f"{split} has {len(source)} images and {len(labels)} labels")
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        where = describe(source, split, int(wrong[0]))
        raise DataError(
            f"{where} has label {labels[wrong[0]]}; expected 0..{len(classes) - 1}, as there are "
            f"{len(classes)} classes"
        )
    return labels


def stratified_cut(labels: Indices, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Split positions into (kept, held out), with `fraction` of every class held out.

    Each class gives at least one image and keeps at least one; a class of one image keeps it.
    Both results are in rising order, and depend on nothing but the arguments.
    """
    random = np.random.default_rng(seed)
    held: list[Indices] = []
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held.append(members[:count])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), out), out
