"""Every way to name data gives the same kind of thing: three splits of normalised batches."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from bevel.core.errors import DataError, UnknownNameError
from bevel.core.progress import reporting
from bevel.core.recipe import Augment, DataSection, Normalize
from bevel.data import Splits, load
from bevel.data.splits import stratified_cut


def all_of(data, split, **options):
    batches = list(data.batches(split, **options))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_digits():
    data = load(DataSection(name="digits"), seed=0)
    assert data.input_shape == (1, 8, 8)
    assert data.classes == tuple("0123456789")
    assert sum(data.sizes.values()) == 1797
    assert data.sizes["test"] == pytest.approx(360, abs=5)
    images, labels = all_of(data, "test")
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert labels.bincount().min() >= 33


def test_digits_test_split_never_depends_on_the_seed_but_validation_does():
    first, second = (load(DataSection(name="digits"), seed=seed) for seed in (0, 1))
    assert torch.equal(all_of(first, "test")[0], all_of(second, "test")[0])
    assert not torch.equal(all_of(first, "validation")[0], all_of(second, "validation")[0])
    again = load(DataSection(name="digits"), seed=1)
    assert torch.equal(all_of(again, "validation")[0], all_of(second, "validation")[0])


def test_stratified_cut_is_exact_per_class():
    labels = np.repeat([0, 1, 2], [100, 10, 1])
    kept, held = stratified_cut(labels, 0.2, seed=3)
    assert np.bincount(labels[held], minlength=3).tolist() == [20, 2, 0]
    assert sorted([*kept, *held]) == list(range(111))


def test_image_folder_with_cut_validation(tiny_image_folder):
    root = tiny_image_folder({"train": 10, "test": 3})
    data = load(DataSection(name="imagefolder", root=root, validation=0.2), seed=0)
    assert data.sizes == {"train": 24, "validation": 6, "test": 9}
    assert data.input_shape == (3, 16, 16)
    assert data.classes == ("digit0", "digit1", "digit2")
    labels = all_of(data, "validation")[1]
    assert labels.bincount().tolist() == [2, 2, 2]
    assert all_of(data, "test")[1].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    with Image.open(root / "test" / "digit0" / "000.png") as file:
        expected = torch.from_numpy(np.array(file)).permute(2, 0, 1) / 255
    torch.testing.assert_close(all_of(data, "test")[0][0], expected)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_image_folder_with_its_own_validation(tiny_image_folder, name):
    root = tiny_image_folder({"train": 4, name: 2, "test": 3})
    data = load(DataSection(name="imagefolder", root=root), seed=0)
    assert data.sizes == {"train": 12, "validation": 6, "test": 9}


def test_normalisation_is_the_stated_one(tiny_image_folder):
    root = tiny_image_folder()
    plain = load(DataSection(name="imagefolder", root=root), seed=0)
    norm = Normalize(mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 2.0])
    data = load(DataSection(name="imagefolder", root=root, normalize=norm), seed=0)
    mean, std = torch.tensor(norm.mean)[:, None, None], torch.tensor(norm.std)[:, None, None]
    torch.testing.assert_close(
        all_of(data, "test")[0], (all_of(plain, "test")[0] - mean) / std, rtol=1e-5, atol=1e-6
    )


def test_images_of_different_sizes_need_a_size(tiny_image_folder):
    root = tiny_image_folder()
    Image.new("RGB", (20, 30), (255, 0, 0)).save(root / "test" / "digit1" / "odd.png")
    data = load(DataSection(name="imagefolder", root=root), seed=0)
    with pytest.raises(DataError, match=r"odd\.png is 20x30, the first one 16x16.*data.size"):
        all_of(data, "test")
    sized = load(DataSection(name="imagefolder", root=root, size=8, resize=10), seed=0)
    assert all_of(sized, "test")[0].shape == (13, 3, 8, 8)


def test_decoding_is_lazy_per_split_and_shows_progress(tiny_image_folder):
    root = tiny_image_folder()
    seen = []

    class Reporter:
        def start(self, label, total):
            seen.append((label, total))
            return str

        def finish(self, label):
            pass

        def note(self, message):
            pass

    with reporting(Reporter()):
        data = load(DataSection(name="imagefolder", root=root), seed=0)
        assert seen == []
        list(data.train_batches(4, seed=0, epoch=0))
        list(data.train_batches(4, seed=0, epoch=1))
    assert seen == [("decode train", data.sizes["train"])]


def test_limit_is_a_fixed_mix_of_classes(tiny_image_folder):
    root = tiny_image_folder({"train": 30, "test": 2})
    data = load(DataSection(name="imagefolder", root=root), seed=0)
    batches = data.batches("train", batch_size=5, limit=12)
    assert len(batches) == 3
    first, again = list(batches), list(batches)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    labels = torch.cat([y for _, y in first])
    assert len(labels) == 12
    assert len(labels.unique()) == 3
    all_of(data, "train")  # now in memory: the same images must come from there
    same = list(data.batches("train", batch_size=5, limit=12))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, same, strict=True))
    assert all_of(data, "train", limit=10_000)[0].shape[0] == data.sizes["train"]


def test_too_large_for_memory_gives_the_same_batches(tiny_image_folder, monkeypatch):
    root = tiny_image_folder()
    augment = Augment(flip=True, crop="pad", padding=2)
    section = DataSection(name="imagefolder", root=root, augment=augment)
    kept = load(section, seed=0)
    monkeypatch.setattr("bevel.data.collection.MEMORY_LIMIT_BYTES", 0)
    for workers in (0, 2):
        streamed = load(section.model_copy(update={"workers": workers}), seed=0)
        assert torch.equal(all_of(streamed, "test")[0], all_of(kept, "test")[0])
        state = torch.get_rng_state()
        epochs = [list(d.train_batches(4, seed=1, epoch=2)) for d in (kept, streamed)]
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(*epochs, strict=True))
        assert not streamed._images["test"].loaded


USER_FILE = """
import torch
from PIL import Image

class Set:
    def __init__(self, count, kind="pil"):
        self.count, self.kind = count, kind
    def __len__(self):
        return self.count
    def __getitem__(self, i):
        if self.kind == "float":
            return torch.zeros(3, 6, 6), 0
        if self.kind == "tensor":
            return torch.full((1, 6, 6), i, dtype=torch.uint8), i % 2
        return Image.new("L", (6, 6), i), i % 2

def good(kind="pil"):
    return {"train": Set(20, kind), "test": Set(6, kind), "classes": ["even", "odd"]}

def no_test():
    return {"train": Set(20), "classes": ["even", "odd"]}

def one_class():
    return {**good(), "classes": ["even"]}

def few_classes():
    return {**good(), "classes": ["a", "b"], "test": [(Image.new("L", (6, 6)), 2)]}

def iterator():
    return {**good(), "train": iter([])}

class Failing(Set):
    def __getitem__(self, i):
        return {}["absent"]

def failing():
    return {**good(), "train": Failing(4)}

def no_pairs():
    return {**good(), "train": [1, 2, 3]}

def empty():
    return {**good(), "test": []}
"""


@pytest.mark.parametrize("kind", ["pil", "tensor"])
def test_user_file(tmp_path, kind):
    (tmp_path / "mine.py").write_text(USER_FILE)
    section = DataSection(name=f"{tmp_path}/mine.py:good", arguments={"kind": kind})
    data = load(section, seed=0)
    assert data.input_shape == (1, 6, 6)
    assert data.sizes == {"train": 18, "validation": 2, "test": 6}
    images, labels = all_of(data, "test")
    assert labels.tolist() == [0, 1] * 3
    assert (images[:, 0, 0, 0] * 255).round().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("good", {"kind": "float"}, "float32 tensor; expected a PIL image or a uint8 tensor"),
        ("good", {"sort": 1}, "does not take the arguments given"),
        ("no_test", {}, "returned a dict without 'test'"),
        ("one_class", {}, "has 1 class"),
        ("few_classes", {}, "image 0 of test has label 2; expected 0..1"),
        ("iterator", {}, "'train' of .* expected a map-style"),
        ("failing", {}, "image 0 of train cannot be read .KeyError: 'absent'"),
        ("no_pairs", {}, "image 0 of train cannot be read .TypeError: cannot unpack"),
        ("empty", {}, "the test split of .* has no images"),
    ],
)
def test_user_file_mistakes(tmp_path, function, arguments, message):
    (tmp_path / "mine.py").write_text(USER_FILE)
    section = DataSection(name=f"{tmp_path}/mine.py:{function}", arguments=arguments)
    with pytest.raises(DataError, match=message) as caught:
        all_of(load(section, seed=0), "test")
    assert "\n" not in str(caught.value)


def test_a_data_set_may_be_splits(tmp_path):
    text = "from bevel.data import Splits\nfrom PIL import Image\n"
    text += "images = [(Image.new('RGB', (4, 4)), i % 2) for i in range(8)]\n"
    text += "def make(): return Splits(images, images, images, ('a', 'b'))\n"
    (tmp_path / "mine.py").write_text(text)
    data = load(DataSection(name=f"{tmp_path}/mine.py:make"), seed=0)
    assert data.sizes == {"train": 8, "validation": 8, "test": 8}
    assert Splits.__name__ == "Splits"


def test_cifar10_from_torchvision_files(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)]
    sums = {}
    for name in [*names, "test_batch"]:
        count = 10_000
        pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        content = pickle.dumps({"data": pixels, "labels": (np.arange(count) % 10).tolist()})
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()  # noqa: S324
    meta = pickle.dumps({"label_names": list("abcdefghij")})
    (folder / "batches.meta").write_bytes(meta)
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "train_list", [[n, sums[n]] for n in names])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    described = {**CIFAR10.meta, "md5": hashlib.md5(meta).hexdigest()}  # noqa: S324
    monkeypatch.setattr(CIFAR10, "meta", described)
    data = load(DataSection(name="cifar10", root=tmp_path), seed=0)
    assert data.sizes == {"train": 45_000, "validation": 5_000, "test": 10_000}
    assert data.input_shape == (3, 32, 32)
    images, labels = next(iter(data.batches("test")))
    assert labels[:12].tolist() == [*range(10), 0, 1]
    assert images.shape == (128, 3, 32, 32)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_absent_cifar(tmp_path, name):
    with pytest.raises(DataError, match=r"data\.download: true"):
        load(DataSection(name=name, root=tmp_path), seed=0)
    with pytest.raises(DataError, match=r"needs data.root"):
        load(DataSection(name=name), seed=0)


def test_unknown_data_set():
    with pytest.raises(
        UnknownNameError, match=r"no data set called 'digit'\. Did you mean 'digits'"
    ):
        load(DataSection(name="digit"), seed=0)
