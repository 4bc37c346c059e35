"""CIFAR-10 and CIFAR-100 through torchvision, each split read when it is asked for."""

from __future__ import annotations

import contextlib
import io
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bevel.core.errors import DataError, one_line
from bevel.core.progress import note
from bevel.core.recipe import DataSection
from bevel.data.splits import Indices, Splits


class CifarSource:
    """One official split; nothing is read before an image or label is asked for."""

    def __init__(self, kind: Any, root: str, train: bool) -> None:
        self._kind = kind
        self._root = root
        self._train = train

    @cached_property
    def _dataset(self) -> Any:
        # torchvision unpickles these files, but only after their MD5 has matched the official ones.
        return self._kind(self._root, train=self._train)

    @cached_property
    def pixels(self) -> Tensor:
        """uint8 (N, 3, 32, 32)."""
        return torch.from_numpy(np.ascontiguousarray(self._dataset.data.transpose(0, 3, 1, 2)))

    @cached_property
    def labels(self) -> Indices:
        """int64 (N,)."""
        return np.asarray(self._dataset.targets, dtype=np.int64)

    def __len__(self) -> int:
        return 50_000 if self._train else 10_000

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index], int(self.labels[index])


def load_cifar(section: DataSection, kind: Any, name: str) -> Splits:
    """The two official splits of `kind`, a torchvision class.

    Raises:
        DataError: the data is absent and not to be downloaded, or the download fails.
    """
    if section.root is None:
        raise DataError(f"{name} needs data.root: the folder that holds it, or where to put it")
    root = section.root.expanduser()
    if section.download:
        note(f"{name}: checking {root}, downloading what is absent")
    try:
        # torchvision draws its own progress bar on stderr
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            checked = kind(str(root), train=True, download=section.download)
    except (RuntimeError, OSError) as error:
        if section.download:
            raise DataError(
                f"{name} could not be downloaded to {root}: {one_line(error)}. Check the "
                "connection, or put torchvision's files there yourself"
            ) from error
        raise DataError(
            f"no complete {name} in torchvision's format under {root}: set data.download: true to "
            "fetch it, or use data.name: imagefolder for a folder of image files"
        ) from error
    train = CifarSource(kind, str(root), train=True)
    train.__dict__["_dataset"] = checked
    return Splits(train, None, CifarSource(kind, str(root), train=False), tuple(checked.classes))
