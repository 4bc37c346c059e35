"""Accuracy and loss of torch networks, and whether a network fits the data."""

from __future__ import annotations

import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bevel.core.errors import DataError, ModelError
from bevel.core.recipe import DataSection, Normalize
from bevel.data import check_classes, load
from bevel.data.metrics import evaluate


class Lookup(nn.Module):
    """The images are the logits."""

    def forward(self, x):
        return x


def test_top1_and_loss_over_uneven_batches():
    torch.manual_seed(0)
    logits, labels = torch.randn(10, 4), torch.randint(0, 4, (10,))
    batches = [(logits[:7], labels[:7]), (logits[7:], labels[7:])]
    got = evaluate(Lookup(), batches)
    assert got.images == 10
    assert got.top1 == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert got.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


def test_every_module_gets_its_own_mode_back():
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4)).train()
    net[0].eval()
    before = net[0].running_mean.clone()
    evaluate(net, [(torch.ones(3, 4), torch.tensor([0, 1, 2]))])
    assert [m.training for m in net] == [False, True, True]
    assert torch.equal(net[0].running_mean, before)


def test_nothing_to_evaluate_and_labels_without_outputs():
    with pytest.raises(DataError, match="no images to score"):
        evaluate(Lookup(), [], label="score")
    with pytest.raises(DataError, match="label 9 has no output: the network has 4"):
        evaluate(Lookup(), [(torch.zeros(1, 4), torch.tensor([9]))])


def test_check_classes():
    data = load(DataSection(name="digits"), seed=0)
    good = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).train()
    check_classes(good, data)
    assert good.training
    with pytest.raises(DataError, match="100 outputs and the data has 10 classes"):
        check_classes(nn.Sequential(nn.Flatten(), nn.Linear(64, 100)), data)
    with pytest.raises(ModelError, match="does not take images of 1x8x8"):
        check_classes(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(10)), data)
    with pytest.raises(ModelError, match=r"gave shape \(2, 1, 8, 8\) for 2 images"):
        check_classes(nn.Identity(), data)


def test_public_resnet20_on_real_images(shared_data, tmp_path):
    """The first 60 test images of every class: the published 91.7 % within what 600 images tell."""
    from bevel.models import build

    checkpoint = shared_data / "weights" / "resnet20-12fca82f.th"
    archive = shared_data / "cifar10.zip"
    if not (checkpoint.exists() and archive.exists()):
        pytest.skip("no cifar10.zip or ResNet-20 checkpoint in the shared data")
    with zipfile.ZipFile(archive) as packed:
        taken: dict[str, int] = {}
        for name in sorted(packed.namelist()):
            folder = name.rpartition("/")[0]
            wanted = 60 if "/test/" in name else 2
            if name.endswith(".webp") and taken.get(folder, 0) < wanted:
                taken[folder] = taken.get(folder, 0) + 1
                packed.extract(name, tmp_path)
    norm = Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    section = DataSection(name="imagefolder", root=tmp_path / "cifar10", normalize=norm)
    data = load(section, seed=0)
    net = build("bevel:resnet20", checkpoint=checkpoint)
    check_classes(net, data)
    got = evaluate(net, data.batches("test"))
    assert got.images == 600
    assert got.top1 == pytest.approx(0.917, abs=0.035)
