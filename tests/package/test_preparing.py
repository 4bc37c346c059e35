"""What run.py feeds to a network is what bevel's own data pipeline does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from bevel.core.recipe import DataSection, Normalize
from bevel.data import load
from bevel.packaging.kit import _original, _png
from bevel.packaging.meta import Input, Preprocessing
from bevel.packaging.on_device import run

SIZES = ((427, 640), (427, 300), (101, 350), (64, 64), (33, 50), (224, 257))
"""Height and width of the windows that are cut out of two photographs."""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    for split in ("train", "test"):
        for label, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number, (height, width) in enumerate(SIZES):
                window = Image.fromarray(pixels[-height:, :width])
                window.save(folder / f"{number}.jpg", quality=90)
            small = Image.fromarray(pixels[:90, :120])
            small.convert("L").save(folder / "gray.png")
            small.convert("P").save(folder / "palette.png")
            small.convert("RGBA").save(folder / "alpha.png")
            deep = np.asarray(small.convert("L")).astype(np.uint16) * 256 + 17
            Image.fromarray(deep).save(folder / "deep.png")
            clear = small.convert("P")
            clear.info["transparency"] = 3
            clear.save(folder / "clear.png")
    return root


def meta_of(section: DataSection, data) -> dict:
    channels = data.input_shape[0]
    how = section.normalize or Normalize(mean=[0.0] * channels, std=[1.0] * channels)
    preprocessing = Preprocessing(
        resize=section.resize or section.size, crop=section.size, mean=how.mean, std=how.std
    )
    wanted = Input(
        name="x",
        shape=[1, *data.input_shape],
        dtype="float32",
        colour="L" if channels == 1 else "RGB",
    )
    return {"input": wanted.model_dump(), "preprocessing": preprocessing.model_dump()}


@pytest.mark.parametrize(
    ("size", "resize", "normalize"),
    [
        (224, 256, Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])),
        (224, None, Normalize(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])),
        (32, None, None),
        (31, 50, None),
    ],
)
def test_photographs_are_prepared_exactly_alike(photographs, size, resize, normalize):
    section = DataSection(
        name="imagefolder", root=photographs, size=size, resize=resize, normalize=normalize
    )
    data = load(section, seed=0)
    meta = meta_of(section, data)
    batches = data.batches("test", batch_size=1)
    source = batches.images.source
    assert len(batches) == 2 * (len(SIZES) + 5)
    for position, (expected, _) in enumerate(batches):
        with Image.open(source.describe(position)) as image:
            got = run.prepare(image, meta)
        assert got.dtype == np.float32
        assert np.array_equal(got, expected.numpy()), source.describe(position)


def test_pixels_without_files_are_prepared_alike_up_to_rounding(tmp_path):
    section = DataSection(name="digits", size=16)
    data = load(section, seed=0)
    meta = meta_of(section, data)
    batches = data.batches("test", batch_size=1, limit=40)
    for position, (expected, _) in enumerate(batches):
        path = tmp_path / f"{position}.png"
        image, _ = _original(batches, position)
        path.write_bytes(_png(image, 1))
        with Image.open(path) as opened:
            got = run.prepare(opened, meta)
        # torchvision resizes tensors with weights of its own
        assert np.abs(got - expected.numpy()).max() <= 1.001 / 255


def test_images_of_another_size_are_refused_where_nothing_resizes_them():
    meta = {
        "input": {"shape": [1, 3, 8, 8], "colour": "RGB"},
        "preprocessing": {"resize": None, "crop": None, "scale": 1 / 255, "mean": [0, 0, 0]}
        | {"std": [1, 1, 1]},
    }
    with pytest.raises(run.Mistake, match="9x8 pixels; the network takes 8x8"):
        run.prepare(Image.new("RGB", (9, 8)), meta)
    assert run.prepare(Image.new("RGB", (8, 8), "white"), meta).min() == 1.0
