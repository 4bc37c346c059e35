"""The images of one split as uint8: decoded once into memory, or anew each time they are asked for.

Nothing is decoded before it is asked for, so the test split stays untouched until the end of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_all_start_methods
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bevel.core.errors import DataError
from bevel.core.hardware import usable_cores
from bevel.core.progress import track
from bevel.data.images import DECODING_FAULTS, Frame, Pixels8, Share, random_resized_crop
from bevel.data.splits import Indices, Source, describe, fetch, unreadable

MEMORY_LIMIT_BYTES = 2**30
"""Decoded images are kept if all splits together stay below this."""

CHUNK = 64
"""Images that a thread decodes in a row."""

Reader = Callable[[int], Pixels8]


class UnevenSizeError(DataError):
    """Images of different sizes where one size is needed."""


@dataclass
class ImageSet:
    """Part of a source, as uint8 images of one shape.

    Args:
        source: where the images come from.
        name: the split, for messages and progress.
        indices: which images of the source, in order.
        frame: the fixed transform.
        shape: (C, H, W) of each image after it.
        keep: whether decoded images stay in memory.
        workers: processes that decode where they do not stay.
    """

    source: Source
    name: str
    indices: Indices
    frame: Frame
    shape: tuple[int, int, int]
    keep: bool
    workers: int
    _stored: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def loaded(self) -> bool:
        """Whether the images are in memory already."""
        return self._stored is not None

    def stored(self) -> Tensor:
        """All images, uint8 (N, C, H, W), decoded on the first call.

        Raises:
            DataError: an image is damaged; the message names it.
            UnevenSizeError: the images differ in size.
        """
        if self._stored is None:
            ready = getattr(self.source, "pixels", None)
            if isinstance(ready, Tensor) and tuple(ready.shape[1:]) == self.shape:
                self._stored = ready[torch.from_numpy(self.indices)]
            else:
                self._stored = self.decode(np.arange(len(self)))
        return self._stored

    def decode(self, positions: Indices) -> Tensor:
        """Decode some images, uint8 (len(positions), C, H, W), with a progress bar."""
        out = np.empty((len(positions), *self.shape), dtype=np.uint8)

        def work(start: int) -> range:
            chunk = range(start, min(start + CHUNK, len(positions)))
            for i in chunk:
                out[i] = self.read(int(positions[i]))
            return chunk

        def done() -> Iterator[int]:
            for chunk in in_threads(work, range(0, len(positions), CHUNK), self._threads):
                yield from chunk

        for _ in track(done(), f"decode {self.name}", len(positions)):
            pass
        return torch.from_numpy(out)

    def read(self, position: int) -> Pixels8:
        """One image after the fixed transform, uint8 (C, H, W)."""
        return self._read(position, lambda image, name: self.frame.prepare(image, name))

    def read_crop(self, position: int, share: Share, seed: Sequence[int]) -> Pixels8:
        """A random resized crop of one image; which one depends on `seed` and position only."""
        target = self.shape[1], self.shape[2]

        random = np.random.default_rng([*seed, position])

        def crop(image: Any, name: str) -> Pixels8:
            return random_resized_crop(image, self.frame, name, target, share, random)

        if self.keep and self.frame.size is None:  # what is kept is the whole image
            return crop(self.stored()[position], self.name)
        return self._read(position, crop)

    def _read(self, position: int, transform: Callable[[Any, str], Pixels8]) -> Pixels8:
        index = int(self.indices[position])
        image, _ = fetch(self.source, self.name, index)
        try:
            array = transform(image, describe(self.source, self.name, index))
        except DECODING_FAULTS as error:  # Pillow may decode as late as here
            raise unreadable(self.source, self.name, index, error) from error
        if array.shape != self.shape:
            raise UnevenSizeError(
                f"images differ in size: {describe(self.source, self.name, index)} is "
                f"{array.shape[2]}x{array.shape[1]}, the first one {self.shape[2]}x{self.shape[1]} "
                "(width x height): set data.size"
            )
        return array

    @property
    def _threads(self) -> int:
        # Only sources that say so are read from several threads: a user's may share a file handle.
        return min(8, 2 * usable_cores()) if getattr(self.source, "thread_safe", False) else 1

    def stream(self, batches: Sequence[Indices], read: Reader | None = None) -> Iterator[Tensor]:
        """Yield uint8 (B, C, H, W) for each array of positions.

        Args:
            batches: the positions of each batch.
            read: how to get one image, if not with the fixed transform; never kept in memory.
        """
        if read is None and self.keep:
            stored = self.stored()
            for batch in batches:
                yield stored[torch.from_numpy(batch)]
        elif self.workers > 0:
            yield from self._in_processes(batches, read or self.read)
        else:
            for batch in batches:
                images = in_threads(read or self.read, [int(i) for i in batch], self._threads)
                yield torch.from_numpy(np.stack(list(images)))

    def _in_processes(self, batches: Sequence[Indices], read: Reader) -> Iterator[Tensor]:
        loader: DataLoader[Any] = DataLoader(
            _Jobs(read, len(self)),
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=min(self.workers, usable_cores()),
            collate_fn=_collate,
            generator=torch.Generator(),  # or it would draw from the global one
            # A class from a user's file exists in this process only, so workers must be its copies.
            multiprocessing_context="fork" if "fork" in get_all_start_methods() else None,
        )
        for batch in loader:
            if isinstance(batch, str):
                raise DataError(batch)
            yield batch


class _Jobs(Dataset[Any]):
    """What worker processes run. Errors travel as text, or they would arrive as tracebacks."""

    def __init__(self, read: Reader, count: int) -> None:
        self.read = read
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> Pixels8 | str:
        try:
            return self.read(position)
        except DataError as error:
            return str(error)


def _collate(images: list[Pixels8 | str]) -> Tensor | str:
    arrays: list[Pixels8] = []
    for image in images:
        if isinstance(image, str):
            return image
        arrays.append(image)
    return torch.from_numpy(np.stack(arrays))


def in_threads(work: Callable[[int], Any], items: Sequence[int], threads: int) -> Iterator[Any]:
    """Yield the results in order; after a failure nothing more is started."""
    if threads <= 1:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
