"""Training batches: the right augmentation, and the same for the same (seed, epoch)."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from bevel.core.recipe import Augment, DataSection
from bevel.data import load
from bevel.data.batches import shift_and_flip
from bevel.data.images import crop_box


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(0, 3), st.integers(1, 6), st.integers(1, 6), st.integers())
def test_shift_and_flip_is_pad_crop_mirror(count, padding, height, width, seed):
    random = np.random.default_rng(seed % 2**32)
    images = torch.from_numpy(random.integers(0, 256, (count, 3, height, width), dtype=np.uint8))
    shifts = torch.from_numpy(random.integers(0, 2 * padding + 1, (count, 2)))
    flips = torch.from_numpy(random.random(count) < 0.5)
    got = shift_and_flip(images, shifts, flips, padding)
    for image, (top, left), flip, result in zip(images, shifts, flips, got, strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (padding, padding), (padding, padding)))
        crop = padded[:, top : top + height, left : left + width]
        expected = crop[:, :, ::-1] if flip else crop
        assert np.array_equal(result.numpy(), expected)


shares = st.floats(0.01, 1).flatmap(lambda low: st.tuples(st.just(low), st.floats(low, 1)))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), shares, st.integers(0, 2**32))
def test_crop_box_lies_inside(height, width, share, seed):
    top, left, h, w = crop_box(height, width, share, np.random.default_rng(seed))
    assert 0 < h <= height - top
    assert 0 < w <= width - left
    assert top >= 0
    assert left >= 0


def epoch_of(section, *, seed, epoch, size=32):
    return list(load(section, seed=0).train_batches(size, seed=seed, epoch=epoch))


@pytest.mark.parametrize("crop", ["none", "pad", "resized"])
def test_a_pure_function_of_seed_and_epoch(crop):
    section = DataSection(name="digits", augment=Augment(flip=True, crop=crop, padding=1))
    first = epoch_of(section, seed=1, epoch=2)
    torch.rand(3)
    again = epoch_of(section, seed=1, epoch=2)
    assert all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(first, again, strict=True)
    )
    assert not torch.equal(first[0][0], epoch_of(section, seed=1, epoch=3)[0][0])
    assert not torch.equal(first[0][0], epoch_of(section, seed=2, epoch=2)[0][0])


def test_without_augmentation_an_epoch_is_a_permutation():
    data = load(DataSection(name="digits"), seed=0)
    count = data.sizes["train"]
    (images, labels), *rest = data.train_batches(10_000, seed=0, epoch=0)
    assert rest == []
    fixed = next(iter(data.batches("train", batch_size=count)))
    assert not torch.equal(labels, fixed[1])
    assert torch.equal(images.flatten(1).sum(1).sort()[0], fixed[0].flatten(1).sum(1).sort()[0])


def test_batches_are_full_and_counted():
    batches = load(DataSection(name="digits"), seed=0).train_batches(100, seed=0, epoch=0)
    sizes = [len(labels) for _, labels in batches]
    assert sizes == [100] * len(batches)
    assert len(batches) == load(DataSection(name="digits"), seed=0).sizes["train"] // 100


def test_resized_crop_from_disk(tiny_image_folder):
    section = DataSection(
        name="imagefolder",
        root=tiny_image_folder(side=40),
        size=24,
        augment=Augment(crop="resized", flip=True),
    )
    images, _ = epoch_of(section, seed=0, epoch=0, size=8)[0]
    assert images.shape == (8, 3, 24, 24)
    assert images.max() > 0.5
    parallel = epoch_of(section.model_copy(update={"workers": 2}), seed=0, epoch=0, size=8)
    assert torch.equal(parallel[0][0], images)


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.6), (1.0, 1.0)])
def test_crops_have_the_share_of_the_area_that_is_asked_for(scale):
    random = np.random.default_rng(0)
    boxes = [crop_box(300, 400, scale, random) for _ in range(200)]
    shares = [h * w / (300 * 400) for _, _, h, w in boxes]
    assert all(top + h <= 300 and left + w <= 400 for top, left, h, w in boxes)
    assert scale[0] - 0.01 <= min(shares) and max(shares) <= scale[1] + 0.01
    assert np.ptp(shares) > 0.8 * (scale[1] - scale[0]) or scale[0] == scale[1]


def test_the_whole_image_is_a_crop_of_all_of_it(tiny_image_folder):
    section = DataSection(name="imagefolder", root=tiny_image_folder(side=24), size=24)
    augment = Augment(crop="resized", scale=(1.0, 1.0))
    cropped = epoch_of(section.model_copy(update={"augment": augment}), seed=0, epoch=0, size=8)
    assert torch.equal(cropped[0][0], epoch_of(section, seed=0, epoch=0, size=8)[0][0])


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.6, 0.5), (0.5, 1.2), 0.5, (0.5,)])
def test_a_share_of_the_area_that_cannot_be_is_refused(scale):
    with pytest.raises(ValueError, match="with 0 < least <= largest <= 1"):
        Augment(crop="resized", scale=scale)


def test_a_batch_is_augmented_faster_than_its_images_one_by_one():
    images = torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8)
    shifts, flips = torch.randint(0, 9, (128, 2)), torch.rand(128) < 0.5
    each = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    whole = cpu_seconds(lambda: shift_and_flip(images, shifts, flips, 4))
    one_by_one = cpu_seconds(lambda: [each(image) for image in images])
    assert whole * 2 < one_by_one


def cpu_seconds(work) -> float:
    """The least CPU time of five runs on one thread, after one that warms up."""
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # more of them spin while they wait, and that counts as their time
    for _ in range(6):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    torch.set_num_threads(threads)
    return min(times[1:])
