"""Images of a folder without labels: as one tensor that fits a network's input, or as a source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from bevel.core.errors import DataError, one_line
from bevel.core.recipe import Normalize
from bevel.data.batches import to_float
from bevel.data.datasets.imagefolder import FORMATS
from bevel.data.images import DECODING_FAULTS, convert
from bevel.data.splits import UNLABELLED


def folder_images(
    folder: Path, shape: tuple[int, int, int], normalize: Normalize | None, count: int
) -> Tensor:
    """Up to `count` images below a folder, float32 (N, C, H, W).

    They are spread evenly over the sorted paths, so that a folder per class gives all classes.
    Each is scaled until it covers (H, W) and cut in its middle.

    Args:
        folder: searched with all folders below it.
        shape: (C, H, W) that the network takes, C being 1 or 3.
        normalize: mean and standard deviation; None scales to 0..1 only.
        count: how many at most.

    Raises:
        DataError: the folder holds no images, one is damaged, or the shape is not an image's.
    """
    if shape[0] not in (1, 3):
        raise DataError(f"the network takes {shape[0]} channels; images have 1 or 3")
    paths = _paths(folder)
    chosen = np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int)
    stacked = torch.stack([_image(paths[index], shape) for index in chosen])
    return to_float(stacked, normalize)


class Photographs:
    """A source of the images below a folder, in the order of their paths; none has a label.

    Args:
        folder: searched with all folders below it.

    Raises:
        DataError: it is no folder, or holds no images.
    """

    thread_safe = True

    def __init__(self, folder: Path) -> None:
        self.paths = _paths(folder)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.paths[index]) as opened:
            opened.load()
            return convert(opened, 3), UNLABELLED

    def describe(self, index: int) -> str:
        """The image's path."""
        return str(self.paths[index])


def _paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of images: check the path")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in FORMATS)
    if not paths:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(FORMATS))})")
    return paths


def _image(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """uint8 (C, H, W)."""
    channels, height, width = shape
    try:
        with Image.open(path) as opened:
            opened.load()
            image = convert(opened, channels)
    except DECODING_FAULTS as error:
        raise DataError(f"{path} cannot be read as an image: {one_line(error, 120)}") from error
    scale = max(height / image.height, width / image.width)
    size = [max(height, round(image.height * scale)), max(width, round(image.width * scale))]
    fitted = TF.center_crop(TF.resize(image, size, antialias=True), [height, width])
    return TF.pil_to_tensor(fitted)  # type: ignore[no-any-return]
