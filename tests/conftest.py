"""Fixtures for all tests: real data where it is present, and small folders of real images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openssh import Server, serving

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of checkpoints and data sets; tests that need it are skipped without it."""
    named = os.environ.get("BEVEL_SHARED_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}: set BEVEL_SHARED_DATA to its folder")
    return folder


ImageFolderFactory = Callable[..., Path]


@pytest.fixture
def tiny_image_folder(tmp_path: Path) -> ImageFolderFactory:
    """A function that writes real digits as RGB PNG files and returns the root of the folder.

    Arguments: `splits` (name -> images per class), `classes` (digits to take), `side` (pixels),
    `name` (of the folder).
    """
    from sklearn.datasets import load_digits

    values, targets = load_digits(return_X_y=True)

    def make(
        splits: dict[str, int] | None = None,
        classes: tuple[int, ...] = (0, 1, 2),
        side: int = 16,
        name: str = "images",
    ) -> Path:
        root = tmp_path / name
        for digit in classes:
            members = iter(np.flatnonzero(targets == digit))
            for split, count in (splits or {"train": 8, "test": 4}).items():
                folder = root / split / f"digit{digit}"
                folder.mkdir(parents=True, exist_ok=True)
                for number in range(count):
                    pixels = (values[next(members)].reshape(8, 8) * (255 / 16)).astype(np.uint8)
                    image = Image.fromarray(pixels).resize((side, side)).convert("RGB")
                    image.save(folder / f"{number:03}.png")
        return root

    return make


@pytest.fixture(scope="session")
def armv8() -> None:
    """The emulator's files are here, or may be fetched."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    if not (cache / "bevel/qemu-aarch64").exists() and not os.environ.get("BEVEL_EMULATE"):
        pytest.skip("no emulated Armv8 here: BEVEL_EMULATE=1 fetches some 200 MB for it, once")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real OpenSSH server on loopback."""
    with serving(tmp_path_factory.mktemp("ssh")) as started:
        yield started
