"""Distillation of embeddings: what the last layer is given comes near what the original's is given.

An embedding says more of an image than the few outputs that are made of it, and is small enough to
be kept. Wang, Ge and Wu, "Distilling Knowledge by Mimicking Features", TPAMI 2021, compare them
with the teacher's through a layer of their own where their widths differ. A pruned network needs
none: its features are some of the original's, and the plan knows which.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bevel.core.errors import TrainingError

INSTEAD = "set embedding: 0, to learn from the teacher's outputs only"


@dataclass(frozen=True)
class Embedding:
    """Where embeddings are read.

    Attributes:
        module: the dotted name of the last linear layer, whose input they are.
        kept: indices (d,) of the teacher's features that are left; None where all are.
    """

    module: str
    kept: Tensor | None = None

    def of_teacher(self, features: Tensor) -> Tensor:
        """What the network's embeddings (N, d) are to be, of the teacher's (N, D)."""
        return features if self.kept is None else features[:, self.kept.to(features.device)]


def find_embedding(
    student: nn.Module,
    teacher: nn.Module,
    image: Tensor,
    kept: Mapping[str, np.ndarray] | None = None,
) -> Embedding:
    """The layer that gives the outputs, in both networks, and which of its inputs are left.

    Args:
        student: the network that learns; unchanged, as the teacher is.
        teacher: the network that it learns from.
        image: one real image, shape (1, C, H, W).
        kept: by a layer's name, which of the teacher's inputs are left, where not all are:
            `PruningPlan.inputs`.

    Raises:
        TrainingError: they do not end in the same linear layer, or it is not known which of the
            teacher's features the network's are.
    """
    name = _last_linear(teacher, image)
    if name is None or name != _last_linear(student, image):
        raise TrainingError(
            "distill.embedding: the network and its teacher do not end in a linear layer of the "
            f"same name; {INSTEAD}"
        )
    ours, theirs = (net.get_submodule(name).in_features for net in (student, teacher))
    left = (kept or {}).get(name)
    if left is None and ours == theirs:
        return Embedding(name)
    if left is None or len(left) != ours or left.max(initial=0) >= theirs:
        raise TrainingError(
            f"distill.embedding: {name} is given {ours} features and the teacher's {theirs}, and "
            f"which they are is not known; {INSTEAD}"
        )
    return Embedding(name, torch.tensor(left))


@contextmanager
def embeddings(net: nn.Module, where: Embedding | None) -> Iterator[list[Tensor]]:
    """What the layer was given, (N, D) in float32: one tensor once a forward has run in the block.

    The hook that reads it is gone after the block, whatever happens in it.
    """
    read: list[Tensor] = []
    if where is None:
        yield read
        return

    def see(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        read.append(inputs[0].float())

    handle = net.get_submodule(where.module).register_forward_pre_hook(see)
    try:
        yield read
    finally:
        handle.remove()


def _last_linear(net: nn.Module, image: Tensor) -> str | None:
    """The linear layer whose output the network gives: one of each image, and it runs once."""
    probe = copy.deepcopy(net).float().eval()  # a forward may change what a network holds
    runs: list[tuple[str, Tensor]] = []
    for name, module in probe.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _m, _i, y, name=name: runs.append((name, y)))
    device = next(probe.parameters(), image).device
    with torch.no_grad():
        output = probe(image.to(device))
    last = runs[-1] if runs else None
    if last is None or last[1].shape != output.shape or not torch.equal(last[1], output):
        return None
    return last[0] if [name for name, _ in runs].count(last[0]) == 1 else None
