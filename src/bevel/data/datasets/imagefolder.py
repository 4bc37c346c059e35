"""Image files in folders: ROOT/{train,val,test}/CLASS/*.jpg, where val may be absent.

`valid` and `validation` are other names for `val`.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from bevel.core.errors import DataError
from bevel.core.recipe import DataSection
from bevel.data.images import convert
from bevel.data.splits import Splits

FORMATS = {
    ".bmp": "BMP",
    ".gif": "GIF",
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".pgm": "PPM",
    ".png": "PNG",
    ".ppm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
"""File suffixes of images, and what Pillow calls the format."""

VALIDATION_NAMES = ("validation", "valid", "val")


class FolderSource:
    """The images of one split, ordered by class and path; decoded to RGB when asked for."""

    thread_safe = True

    def __init__(self, folder: Path, classes: tuple[str, ...]) -> None:
        self.paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            found = _images(folder / name)
            self.paths += found
            labels += [label] * len(found)
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        # Read whole, so that no file stays open if decoding fails.
        content = io.BytesIO(Path(self.paths[index]).read_bytes())
        image = _open(content, FORMATS[os.path.splitext(self.paths[index])[1].lower()])  # noqa: PTH122
        image.load()
        return convert(image, 3), int(self.labels[index])

    def describe(self, index: int) -> str:
        """The image's path."""
        return self.paths[index]


def load(section: DataSection) -> Splits:
    """Find the splits and classes below `root`; opens no image.

    Raises:
        DataError: root or a split is absent, a class folder is empty, there is one class only, or
            the splits have different classes.
    """
    if section.root is None:
        raise DataError("imagefolder needs data.root: the folder that holds train and test")
    root = section.root.expanduser()
    if not root.is_dir():
        raise DataError(f"data.root {root} is not a folder: check the path")
    held = next((name for name in VALIDATION_NAMES if (root / name).is_dir()), None)
    for name in ("train", "test"):
        if not (root / name).is_dir():
            there = ", ".join(_folders(root)[:6]) or "no folders"
            raise DataError(
                f"no folder '{name}' in {root} (found: {there}); expected train and test, perhaps "
                "val, each with one folder of images per class"
            )
    classes = tuple(_folders(root / "train"))
    if len(classes) < 2:
        got = f"only '{classes[0]}'" if classes else "none"
        raise DataError(
            f"{root / 'train'} needs at least two class folders, found {got}: one folder of "
            "images per class"
        )
    for other in (held, "test"):
        if other is not None:
            _same_classes(classes, root / other)
    return Splits(
        FolderSource(root / "train", classes),
        FolderSource(root / held, classes) if held else None,
        FolderSource(root / "test", classes),
        classes,
    )


def _open(content: io.BytesIO, likely: str) -> Image.Image:
    """Open an image, its suffix's format first: trying them all takes as long as decoding."""
    try:
        return Image.open(content, formats=(likely,))
    except UnidentifiedImageError:
        content.seek(0)
        return Image.open(content)


def _same_classes(classes: tuple[str, ...], folder: Path) -> None:
    """Raise DataError unless the folder has the classes of train."""
    own = set(_folders(folder))
    absent, extra = sorted(set(classes) - own), sorted(own - set(classes))
    if absent or extra:
        parts = [
            f"{kind} {', '.join(names[:4])}"
            for kind, names in (("lacks", absent), ("has beside them", extra))
            if names
        ]
        raise DataError(f"the classes of {folder} differ from train's: it {'; it '.join(parts)}")


def _folders(folder: Path) -> list[str]:
    """Names of the visible folders inside, sorted."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _images(folder: Path) -> list[str]:
    """Paths of the image files below a class folder, sorted.

    Raises:
        DataError: there are none.
    """
    found: list[str] = []
    others = 0
    for where, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if name.startswith("."):
                continue
            if os.path.splitext(name)[1].lower() in FORMATS:  # noqa: PTH122  60,000 times
                found.append(f"{where}{os.sep}{name}")
            else:
                others += 1
    if not found:
        beside = f" ({others} files of other kinds)" if others else ""
        raise DataError(
            f"class folder {folder} has no images{beside}: add some "
            f"({', '.join(sorted(FORMATS))}), or remove the folder"
        )
    return sorted(found)
