"""Images without labels, beside those that have one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from bevel.core.errors import DataError
from bevel.core.recipe import Augment, DataSection
from bevel.data import load
from bevel.data.splits import UNLABELLED


@pytest.fixture
def photographs(tmp_path):
    """Seven images of other sizes and kinds, in a folder and one below it; all are grey."""
    folder = tmp_path / "photographs"
    (folder / "more").mkdir(parents=True)
    for number in range(7):
        place = folder / "more" if number % 2 else folder
        mode, colour = ("L", 200) if number == 3 else ("RGB", (200, 200, 200))
        Image.new(mode, (20 + number, 30), colour).save(place / f"{number}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def section_of(root, photographs, **options):
    return DataSection(
        name="imagefolder", root=root, unlabelled=photographs, size=16, batch_size=8, **options
    )


def epoch(data, number=0):
    batches = list(data.train_batches(seed=0, epoch=number))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


@pytest.mark.parametrize("crop", ["none", "resized"])
def test_they_are_among_the_training_images_and_have_no_label(crop, tiny_image_folder, photographs):
    root = tiny_image_folder({"train": 11, "val": 2, "test": 3})
    data = load(section_of(root, photographs, augment=Augment(crop=crop)), seed=0)
    more = data.with_unlabelled()
    assert (data.sizes["train"], more.sizes["train"]) == (33, 40)
    images, labels = epoch(more)
    assert (labels == UNLABELLED).sum() == 7
    assert labels[labels != UNLABELLED].bincount().tolist() == [11, 11, 11]
    grey = torch.tensor(200 / 255).expand(3, 16, 16)
    assert all(torch.allclose(image, grey) for image in images[labels == UNLABELLED])
    assert not any(torch.allclose(image, grey) for image in images[labels != UNLABELLED])
    assert UNLABELLED not in epoch(data)[1]
    for split in ("validation", "test"):
        pairs = zip(data.batches(split), more.batches(split), strict=True)
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def test_a_validation_split_that_is_cut_stays_out(tiny_image_folder, photographs):
    root = tiny_image_folder({"train": 10, "test": 3})
    data = load(section_of(root, photographs, validation=0.2), seed=0)
    more = data.with_unlabelled()
    assert more.sizes == {"train": 24 + 7, "validation": 6, "test": 9}
    held = torch.cat([x for x, _ in data.batches("validation")])
    shown = torch.cat([x for x, _ in more.batches("train")])
    assert not any(torch.equal(one, other) for one in held for other in shown)


def test_mistakes(tiny_image_folder, photographs, tmp_path):
    root = tiny_image_folder({"train": 4, "val": 2, "test": 2})
    with pytest.raises(DataError, match="absent is not a folder of images"):
        load(section_of(root, tmp_path / "absent"), seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no images"):
        load(section_of(root, tmp_path / "empty"), seed=0)
    with pytest.raises(DataError, match=r"needs data\.unlabelled"):
        load(section_of(root, None), seed=0).with_unlabelled()
    damaged = photographs / "more" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    more = load(section_of(root, photographs), seed=0).with_unlabelled()
    with pytest.raises(DataError, match=r"1\.png"):
        epoch(more)


def test_digits_take_them_in_grey(photographs):
    section = DataSection(name="digits", unlabelled=photographs, size=8, batch_size=8)
    more = load(section, seed=0).with_unlabelled()
    images, labels = epoch(more)
    assert images.shape[1:] == (1, 8, 8)
    assert np.allclose(images[labels == UNLABELLED], 200 / 255)
