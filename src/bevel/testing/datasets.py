"""The contract of data sets: labelled images in three splits, always the same.

class TestMine(DatasetContract):
    name = "mine"

    def section(self, folder: Path) -> DataSection:
        write_some_images(folder)
        return DataSection(name=self.name, root=folder)
"""
# ruff: noqa: S101  a contract is stated in assertions

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bevel.core.recipe import DataSection
from bevel.data import Data, load
from bevel.testing.plugin import PluginContract


class DatasetContract(PluginContract):
    """Inherit, set `name`, and write `section`."""

    kind = "datasets"

    @classmethod
    def section(cls, folder: Path) -> DataSection:
        """The recipe's section for data of this kind.

        Args:
            folder: an empty folder that may be filled with images; call `pytest.skip` if there
                is no data to be had.
        """
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def sections(cls, tmp_path_factory: pytest.TempPathFactory) -> DataSection:
        """The section, made once."""
        return cls.section(tmp_path_factory.mktemp("data"))

    @pytest.fixture(scope="class")
    @classmethod
    def data(cls, plugin: object, sections: DataSection) -> Data:  # noqa: ARG003
        """The data, loaded once."""
        return load(sections, seed=0)

    def test_every_split_has_images(self, data: Data) -> None:
        """Train, validation and test, of two classes at least."""
        assert set(data.sizes) == {"train", "validation", "test"}
        assert all(size > 0 for size in data.sizes.values())
        assert len(set(data.classes)) == len(data.classes) >= 2

    @pytest.mark.parametrize("split", ["validation", "test"])
    def test_batches_have_the_stated_form(self, data: Data, split: str) -> None:
        """float32 images of the stated shape, int64 labels within the classes, none missing."""
        seen = 0
        for batch, labels in data.batches(split, limit=64):
            assert batch.dtype == torch.float32
            assert labels.dtype == torch.int64
            assert tuple(batch.shape) == (len(labels), *data.input_shape)
            assert bool(torch.isfinite(batch).all())
            assert 0 <= int(labels.min()) <= int(labels.max()) < len(data.classes)
            seen += len(labels)
        assert seen == min(64, data.sizes[split])

    def test_same_seed_gives_the_same_images(self, data: Data, sections: DataSection) -> None:
        """In a second load too: splits, order and augmentation."""
        again = load(sections, seed=0)
        assert (again.classes, again.sizes) == (data.classes, data.sizes)
        for split in ("validation", "test"):
            pairs = zip(data.batches(split, limit=32), again.batches(split, limit=32), strict=True)
            for (images, labels), (images2, labels2) in pairs:
                assert torch.equal(images, images2)
                assert torch.equal(labels, labels2)
        (images, labels), (images2, labels2) = (
            next(iter(loaded.train_batches(16, seed=3, epoch=1))) for loaded in (data, again)
        )
        assert torch.equal(images, images2)
        assert torch.equal(labels, labels2)

    def test_epochs_are_shuffled_differently(self, data: Data) -> None:
        """The order is a function of seed and epoch."""
        size = data.sizes["train"]
        first, second = (
            torch.cat([labels for _, labels in data.train_batches(size, seed=0, epoch=epoch)])
            for epoch in (0, 1)
        )
        assert not torch.equal(first, second)
