"""The distillation loss against its formula."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bevel.finetuning.distill import combined_loss, distillation_loss, seeing


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
