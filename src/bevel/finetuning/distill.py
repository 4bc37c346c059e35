"""Knowledge distillation: learn from the outputs of the original network (Hinton et al. 2015)."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bevel.core.steps import TrainStep
from bevel.data.splits import UNLABELLED

Size = tuple[int, int]


def teacher_of(
    original: nn.Module, settings: TrainStep, *, known: Size, shown: Size
) -> nn.Module | None:
    """Whom a network learns from: the original, on images of the size that it knows.

    Where their feature maps are compared, it sees those that the network sees, so that they match.

    Args:
        original: the network before it was compressed.
        settings: whether the network learns from it at all, and what.
        known: (H, W) of the images that the original was trained with.
        shown: (H, W) of those that the network is trained with now.
    """
    if settings.distill is None:
        return None
    if known == shown or settings.distill.features > 0:
        return original
    return seeing(original, known)


def seeing(teacher: nn.Module, size: Size) -> nn.Module:
    """A copy of the teacher that resizes what it is shown to the size (H, W) that it knows.

    A network that was trained on 224 pixels gives worse answers for 112: on photographs of no more
    pixels than that it is asked as well as before with the same images made larger.
    """
    taught = copy.deepcopy(teacher)
    taught.register_forward_pre_hook(partial(_resized, size))
    return taught


def _resized(size: Size, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    images, *others = inputs
    if images.shape[-2:] == size:
        return inputs
    return F.interpolate(images, size, mode="bilinear", antialias=True), *others


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the softened student from the softened teacher.

    Both are logits of shape (N, classes). The mean over images is multiplied by the squared
    temperature, so that its gradients keep the size of those of the label loss (Hinton, Vinyals
    and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2).
    """
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def combined_loss(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
    *,
    weight: float,
    temperature: float,
    label_smoothing: float,
) -> Tensor:
    """`weight` of the distillation loss and the rest of the cross entropy with the labels.

    Args:
        logits: shape (N, classes), any floating type; the loss is computed in float32.
        labels: shape (N,), class indices; -1 for an image that has none, of which only the
            teacher's answer is learned.
        teacher: logits of the same shape, or None for the labels alone.
        weight: share of the distillation loss, 0..1.
        temperature: softens both distributions, > 0.
        label_smoothing: share of the label's probability that is spread over all classes.
    """
    total = F.cross_entropy(
        logits.float(),
        labels,
        label_smoothing=label_smoothing,
        ignore_index=UNLABELLED,
        reduction="sum",
    )
    loss: Tensor = total / (labels != UNLABELLED).sum().clamp(min=1)
    if teacher is None:
        return loss
    soft = distillation_loss(logits, teacher, temperature)
    return torch.lerp(loss, soft, weight)
