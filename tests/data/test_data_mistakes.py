"""Image folders that cannot be used: each gets one line that names what is wrong."""

from __future__ import annotations

import shutil

import pytest

from bevel.core.errors import DataError
from bevel.core.recipe import DataSection, Normalize
from bevel.data import load


def refused(match, root, **options):
    with pytest.raises(DataError, match=match) as caught:
        data = load(DataSection(name="imagefolder", root=root, **options), seed=0)
        for split in data.sizes:
            list(data.batches(split))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_root(tmp_path):
    refused("needs data.root", None)
    refused("none is not a folder", tmp_path / "none")
    refused("no folder 'train' in .*found: no folders", tmp_path)


def test_missing_train_names_what_is_there(tiny_image_folder):
    refused(
        "no folder 'train' in .*found: test, training",
        tiny_image_folder({"training": 2, "test": 2}),
    )


def test_missing_test(tiny_image_folder):
    root = tiny_image_folder({"train": 2, "val": 2})
    refused("no folder 'test'", root)


def test_empty_class_folder(tiny_image_folder):
    root = tiny_image_folder()
    (root / "train" / "empty").mkdir()
    (root / "test" / "empty").mkdir()
    refused("train/empty has no images", root)
    (root / "train" / "empty" / "notes.txt").write_text("x")
    refused("1 files of other kinds", root)


def test_one_class(tiny_image_folder):
    refused("at least two class folders, found only 'digit4'", tiny_image_folder(classes=(4,)))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"", b"no image at all", "half"])
def test_corrupt_image_is_named(tiny_image_folder, monkeypatch, content, workers):
    root = tiny_image_folder()
    victim = root / "test" / "digit1" / "002.png"
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    if workers:
        monkeypatch.setattr("bevel.data.collection.MEMORY_LIMIT_BYTES", 0)
    message = refused("cannot be read", root, workers=workers)
    assert str(victim) in message


def test_corrupt_first_image_is_named_at_once(tiny_image_folder):
    root = tiny_image_folder()
    victim = root / "train" / "digit0" / "000.png"
    victim.write_bytes(b"x")
    assert str(victim) in refused("cannot be read", root)


def test_a_wrong_suffix_is_no_damage(tiny_image_folder):
    root = tiny_image_folder()
    png = root / "test" / "digit1" / "002.png"
    png.rename(png.with_suffix(".jpg"))
    data = load(DataSection(name="imagefolder", root=root), seed=0)
    assert sum(len(y) for _, y in data.batches("test")) == 12


def test_classes_that_differ(tiny_image_folder):
    root = tiny_image_folder({"train": 3, "val": 2, "test": 2})
    shutil.move(root / "val" / "digit1", root / "val" / "digit9")
    refused("val differ from train's: it lacks digit1; it has beside them digit9", root)


def test_normalize_of_other_length(tiny_image_folder):
    norm = Normalize(mean=[0.5], std=[0.5])
    refused("normalize has 1 channels and the images have 3", tiny_image_folder(), normalize=norm)


def test_resize_below_size(tiny_image_folder):
    refused("resize is 8 and data.size is 16", tiny_image_folder(), size=16, resize=8)


def test_unknown_split(tiny_image_folder):
    data = load(DataSection(name="imagefolder", root=tiny_image_folder()), seed=0)
    with pytest.raises(DataError, match="no split 'val'; expected one of train, validation, test"):
        data.batches("val")
