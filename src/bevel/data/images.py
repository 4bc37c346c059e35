"""One image, from what a source gives to uint8 of the size the network sees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from bevel.core.errors import DataError

Pixels8 = npt.NDArray[np.uint8]

DECODING_FAULTS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for a damaged image, depending on its format."""

Share = tuple[float, float]
"""The least and the largest part of an image's area."""

ASPECT = (3 / 4, 4 / 3)
"""Aspect ratios of resized crops (Szegedy et al. 2015)."""


def channels_of(image: Any, name: str) -> int:
    """1 for grayscale, 3 otherwise.

    Raises:
        DataError: it is neither a PIL image nor a uint8 tensor of (1 or 3, H, W).
    """
    if isinstance(image, Image.Image):
        return 1 if image.mode in {"L", "1"} or image.mode.startswith("I;16") else 3
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
        if image.shape[0] in (1, 3):
            return int(image.shape[0])
        raise DataError(f"{name} has shape {tuple(image.shape)}; expected (1 or 3, H, W)")
    got = f"{image.dtype} tensor" if isinstance(image, Tensor) else type(image).__name__
    raise DataError(
        f"{name} is a {got}; expected a PIL image or a uint8 tensor (C, H, W): leave transforms "
        "out of the data set, the recipe's data section says them"
    )


def convert(image: Image.Image, channels: int) -> Image.Image:
    """The image in mode L or RGB; 16-bit grayscale is scaled, not clipped."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    mode = "L" if channels == 1 else "RGB"
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


@dataclass(frozen=True)
class Frame:
    """The fixed part of every transform: channels, then resize the shorter side and crop centrally.

    With `size` None images keep their own size.
    """

    channels: int
    size: int | None
    resize: int | None

    def prepare(self, image: Any, name: str) -> Pixels8:
        """The image as uint8 (channels, H, W).

        Raises:
            DataError: it is no image, or a tensor with another number of channels.
        """
        if isinstance(image, Image.Image):
            image = convert(image, self.channels)
            image = self._fit(image, image.height, image.width)
            array = np.asarray(image)
            return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        if channels_of(image, name) != self.channels:
            raise DataError(f"{name} has {image.shape[0]} channels; expected {self.channels}")
        return self._fit(image, *image.shape[1:]).numpy()  # type: ignore[no-any-return]

    def _fit(self, image: Any, height: int, width: int) -> Any:
        if self.size is None:
            return image
        shorter = self.resize or self.size
        if min(height, width) != shorter:
            image = TF.resize(image, [shorter], antialias=True)
        if (height, width) != (self.size, self.size):
            image = TF.center_crop(image, [self.size, self.size])
        return image


def crop_box(
    height: int, width: int, share: Share, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random area and aspect ratio (Szegedy et al. 2015).

    After ten draws that do not fit, the largest central box of an allowed aspect ratio.
    """
    for _ in range(10):
        area = height * width * random.uniform(*share)
        aspect = math.exp(random.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(random.integers(0, height - h + 1))
            return top, int(random.integers(0, width - w + 1)), h, w
    w = min(width, round(height * ASPECT[1]))
    h = min(height, round(width / ASPECT[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def random_resized_crop(
    image: Any,
    frame: Frame,
    name: str,
    target: tuple[int, int],
    share: Share,
    random: np.random.Generator,
) -> Pixels8:
    """A random part of the image, resized to `target` (H, W): uint8 (C, H, W)."""
    if isinstance(image, Image.Image):
        image = convert(image, frame.channels)
        box = crop_box(image.height, image.width, share, random)
    else:
        box = crop_box(image.shape[1], image.shape[2], share, random)
    part = TF.resized_crop(image, *box, list(target), antialias=True)
    return Frame(frame.channels, None, None).prepare(part, name)
