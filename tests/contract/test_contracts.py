"""Every suite over every plugin that is found: a new file is tested without a new line here."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bevel.core import plugins
from bevel.core.recipe import DataSection
from bevel.data.cifar import CifarSource
from bevel.pruning.criteria import needed
from bevel.testing.allocators import AllocatorContract
from bevel.testing.criteria import CriterionContract, DataCriterionContract
from bevel.testing.datasets import DatasetContract
from bevel.testing.devices import DeviceContract
from bevel.testing.plugin import PluginContract
from bevel.testing.runtimes import RuntimeContract

SUITES = (
    RuntimeContract,
    DeviceContract,
    CriterionContract,
    DataCriterionContract,
    AllocatorContract,
)


def names(suite: type[PluginContract]) -> list[str]:
    """The plugins that a suite is for; there are two kinds of criteria."""
    found = list(plugins.discover(suite.kind))
    if suite.kind == "criteria":
        weights = suite is CriterionContract
        found = [name for name in found if (needed(name) == "weights") == weights]
    return found


ELSEWHERE = {
    "adb": "devices/test_adb.py",
    "qemu-aarch64": "devices/test_qemu_aarch64.py",
    "ssh": "devices/test_ssh_device.py",
    "tensorrt": "runtimes/test_tensorrt.py",
}
"""What needs an address or hardware that is not here, and the file whose suite stands in for it."""


PARTIAL = {"adb", "qemu-aarch64"}
"""They do a part of the tasks that their contract is about, so their own tests say what holds."""


SETTINGS = {"onnxruntime": {"macs_added": 0.05}}
"""What a suite says of one plugin: the fourth colour is 5 % of the small network's MACs."""


def test_class(suite: type[PluginContract], name: str) -> tuple[str, type[PluginContract]]:
    title = f"Test{suite.__name__.removesuffix('Contract')}_{name}"
    return title, type(
        title, (suite,), {"name": name, "__module__": __name__, **SETTINGS.get(name, {})}
    )


test_class.__test__ = False
globals().update(
    test_class(suite, name) for suite in SUITES for name in names(suite) if name not in ELSEWHERE
)


def image_folder(folder: Path) -> DataSection:
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (10, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{number}.png")
    return DataSection(name="imagefolder", root=folder, size=8)


class TestDatasetDigits(DatasetContract):
    name = "digits"

    @classmethod
    def section(cls, folder: Path) -> DataSection:  # noqa: ARG003
        return DataSection(name=cls.name)


class TestDatasetImagefolder(DatasetContract):
    name = "imagefolder"

    @classmethod
    def section(cls, folder: Path) -> DataSection:
        return image_folder(folder)


class CifarContract(DatasetContract):
    """Files in torchvision's format, with the checksums that it looks for."""

    names: tuple[str, ...]
    files: tuple[tuple[str, str, int], ...]
    labels: str
    meta: str

    @pytest.fixture(scope="class")
    @classmethod
    def sections(cls, tmp_path_factory):
        with pytest.MonkeyPatch.context() as patch:
            yield cls.written(tmp_path_factory.mktemp("cifar"), patch)

    @classmethod
    def written(cls, root: Path, patch: pytest.MonkeyPatch) -> DataSection:
        from torchvision import datasets

        patch.setattr(CifarSource, "__len__", lambda source: len(source.labels))
        loader = getattr(datasets, cls.name.upper())
        folder = root / loader.base_folder
        folder.mkdir()
        random = np.random.default_rng(0)
        for attribute, name, count in cls.files:
            labels = (np.arange(count) % len(cls.names)).tolist()
            pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
            content = pickle.dumps({"data": pixels, cls.labels: labels})
            (folder / name).write_bytes(content)
            patch.setattr(loader, attribute, [[name, hashlib.md5(content).hexdigest()]])  # noqa: S324
        meta = pickle.dumps({cls.meta: list(cls.names)})
        (folder / loader.meta["filename"]).write_bytes(meta)
        patch.setattr(loader, "meta", {**loader.meta, "md5": hashlib.md5(meta).hexdigest()})  # noqa: S324
        return DataSection(name=cls.name, root=root)


class TestDatasetCifar10(CifarContract):
    name = "cifar10"
    names = tuple(f"class{i}" for i in range(10))
    files = (("train_list", "data_batch_1", 200), ("test_list", "test_batch", 50))
    labels, meta = "labels", "label_names"


class TestDatasetCifar100(CifarContract):
    name = "cifar100"
    names = tuple(f"class{i}" for i in range(100))
    files = (("train_list", "train", 400), ("test_list", "test", 100))
    labels, meta = "fine_labels", "fine_label_names"


def test_every_data_set_has_a_suite():
    tested = {
        cls.name
        for cls in (DatasetContract, CifarContract)
        for cls in cls.__subclasses__()
        if hasattr(cls, "name")
    }
    assert tested >= set(plugins.discover("datasets"))


@pytest.mark.parametrize("suite", SUITES)
def test_every_other_plugin_has_a_suite(suite):
    assert names(suite)
    for name in names(suite):
        if name in ELSEWHERE:
            text = (Path(__file__).parents[1] / ELSEWHERE[name]).read_text()
            assert name.replace("-", "_") in text
            if name not in PARTIAL:
                assert f"({suite.__name__})" in text
                assert f'name = "{name}"' in text
            continue
        assert f"Test{suite.__name__.removesuffix('Contract')}_{name}" in globals()


def test_a_suite_tells_a_bad_plugin():
    """The mutant check: a criterion that scores with one number, and one that is not finite."""

    class Flat:
        COMPARABLE = True

        @staticmethod
        def score(weight, over, generator):  # noqa: ARG004
            return torch.ones(weight.shape[0])

    class Broken(Flat):
        @staticmethod
        def score(weight, over, generator):  # noqa: ARG004
            return torch.linspace(0, 1, weight.shape[0]) / 0

    suite = CriterionContract()
    for bad in (Flat, Broken):
        with pytest.raises(AssertionError):
            suite.test_one_finite_score_per_row(bad, (12, 27), (1,))


class Hoarder:
    def __init__(self):
        self.seen = []

    def update(self, observed):
        self.seen.append(observed)

    def scores(self):
        return torch.cat(self.seen).double().mean((0, 2, 3))


class Last(Hoarder):
    def update(self, observed):
        self.seen = [observed]


class Scaling(Hoarder):
    def update(self, observed):
        self.seen = [observed.mul_(2)]


def test_a_suite_tells_a_bad_data_criterion():
    """Mutants: one keeps every image, one depends on the batches, one changes what it is given."""

    suite = DataCriterionContract()
    checks = (
        suite.test_memory_does_not_grow_with_the_images,
        suite.test_batches_make_no_difference,
        suite.test_what_is_seen_stays_as_it_is,
    )
    for bad, check in zip((Hoarder, Last, Scaling), checks, strict=True):
        plugin = SimpleNamespace(NEEDS="images", COMPARABLE=False, start=bad)
        suite.test_one_finite_score_per_unit(plugin)
        with pytest.raises(AssertionError):
            check(plugin)
