"""The distillation loss against its formula, and when the teacher is asked."""

import copy

import pytest
import torch
from pydantic import ValidationError
from tiny_training import Interrupted, TinyData, tiny_net
from torch import nn
from torch.nn import functional as F

from bevel.core.errors import DataError
from bevel.core.steps import TrainStep
from bevel.finetuning import finetune
from bevel.finetuning.distill import combined_loss, distillation_loss, seeing
from bevel.finetuning.state import digest


def test_it_is_zero_for_equal_outputs_and_matches_the_formula():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, generator=generator)
    assert distillation_loss(teacher, teacher, 3.0) == pytest.approx(0.0, abs=1e-6)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum() / 5
    assert distillation_loss(student, teacher, 3.0) == pytest.approx(float(expected), rel=1e-5)


def test_high_temperature_gradients_keep_their_size():
    # For T -> infinity the gradient tends to (student - teacher) / (N * classes), centred.
    student = torch.tensor([[0.5, -0.5, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1.0, 0.0, 1.0]])
    distillation_loss(student, teacher, 1000.0).backward()
    assert torch.allclose(student.grad, (student.detach() - teacher) / 3, atol=2e-2)


def test_the_weight_mixes_both_losses():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, generator=generator)
    labels = torch.tensor([0, 1, 2, 3, 0])
    label_loss = F.cross_entropy(student, labels, label_smoothing=0.1)

    def mixed(weight: float) -> torch.Tensor:
        return combined_loss(
            student, labels, teacher, weight=weight, temperature=2.0, label_smoothing=0.1
        )

    assert mixed(0.0) == pytest.approx(float(label_loss))
    assert mixed(1.0) == pytest.approx(float(distillation_loss(student, teacher, 2.0)))
    assert mixed(0.25) == pytest.approx(float(0.75 * mixed(0.0) + 0.25 * mixed(1.0)))


def test_an_image_without_a_label_counts_for_what_the_teacher_says():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, generator=generator)
    some, none = torch.tensor([0, -1, 2, -1, 0]), torch.full((5,), -1)
    known = some >= 0
    label_loss = F.cross_entropy(student[known], some[known], label_smoothing=0.1)
    soft = distillation_loss(student, teacher, 2.0)

    def mixed(labels: torch.Tensor, weight: float) -> torch.Tensor:
        return combined_loss(
            student, labels, teacher, weight=weight, temperature=2.0, label_smoothing=0.1
        )

    assert mixed(some, 0.25) == pytest.approx(float(0.75 * label_loss + 0.25 * soft))
    assert mixed(none, 0.25) == pytest.approx(float(0.25 * soft))
    assert mixed(none, 0.0) == 0


class Photographed(TinyData):
    """Has images without labels too: every fourth of those that it is then trained with."""

    def with_unlabelled(self) -> TinyData:
        more = TinyData(96)
        more.labels[::4] = -1
        more.batches = self.batches
        return more


def test_training_learns_from_images_without_labels_if_it_is_to():
    def trained(unlabelled: bool):
        distill = {"weight": 1.0, "unlabelled": unlabelled}
        settings = TrainStep(epochs=2, precision="float32", compile="never", distill=distill)
        Counting.asked = 0
        return finetune(tiny_net(), Photographed(), settings, teacher=Counting())

    few = trained(False)
    assert Counting.asked == 2 * 64 / 16
    many = trained(True)
    assert Counting.asked == 2 * 96 / 16
    assert digest(few.net) != digest(many.net)
    assert many.history[-1]["loss"] < many.history[0]["loss"]


def test_data_that_has_no_images_without_labels_says_so():
    settings = TrainStep(epochs=1, distill={"unlabelled": True})
    with pytest.raises(DataError, match=r"TinyData has no with_unlabelled\(\)"):
        finetune(tiny_net(), TinyData(), settings, teacher=Counting())


def test_a_teacher_is_shown_the_size_that_it_knows():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    small, large = torch.rand(2, 3, 12, 12), torch.rand(2, 3, 24, 24)
    taught = seeing(net, (24, 24))
    enlarged = F.interpolate(small, (24, 24), mode="bilinear", antialias=True)
    for teacher in (taught, copy.deepcopy(taught)):  # training takes a copy
        assert torch.equal(teacher(small), net(enlarged))
        assert not torch.allclose(teacher(small), net(small), atol=1e-3)
        assert torch.equal(teacher(large), net(large))


class Counting(nn.Module):
    """A teacher that counts the batches it is asked about; its copies share the count."""

    asked = 0

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_net(seed=9)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        Counting.asked += 1
        return self.net(images)


def taught(views: int | None, epochs: int = 4, **others):
    settings = TrainStep(
        epochs=epochs, precision="float32", compile="never", distill={"views": views}
    )
    Counting.asked = 0
    return finetune(
        tiny_net(), others.pop("data", TinyData()), settings, teacher=Counting(), **others
    )


def test_a_view_is_asked_about_once():
    steps = len(TinyData().train_batches(seed=0, epoch=0))
    always = taught(None)
    assert Counting.asked == 4 * steps
    once = taught(4)
    assert Counting.asked == 4 * steps
    assert digest(once.net) == digest(always.net)  # all views are new ones
    again = taught(2)
    assert Counting.asked == 2 * steps
    assert digest(again.net) != digest(always.net)


def test_a_training_with_views_resumes_exactly(tmp_path):
    whole = taught(3)
    with pytest.raises(KeyboardInterrupt):
        taught(3, data=Interrupted(2), folder=tmp_path)
    assert digest(taught(3, folder=tmp_path).net) == digest(whole.net)


def test_feature_maps_are_not_kept():
    with pytest.raises(ValidationError, match="not its feature maps"):
        TrainStep(epochs=1, distill={"views": 2, "features": 1.0})
