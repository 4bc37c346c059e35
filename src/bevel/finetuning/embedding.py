"""Distillation of embeddings: what the last layer reads comes near what the teacher's reads.

A classifier of few classes says little about an image, and what its last layer reads says much.
Pruning changes how many features that are, so a linear map is learned along with the network, and
thrown away in the end: the regressor of Romero et al., "FitNets: Hints for Thin Deep Nets", 2015,
at the place of Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022.

In training, the network's last layer gives the mapped embedding before its own outputs, and the
teacher's gives its embedding before its outputs: both (N, features + classes). So a training step,
a compiler, an average of weights and the state on the disk see one network with one output, as
ever.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bevel.core.errors import TrainingError
from bevel.core.modes import evaluating
from bevel.core.progress import track

IMAGES = 1024
"""How many the map is fitted on, at most, before training."""

STIFFNESS = 0.01
"""How strongly the first map is held small, relative to the features' mean variance."""


class _Showing(nn.Linear):
    """A teacher's last layer: (N, inputs) -> (N, inputs + outputs), what it read before its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], dim=1)


class _Mapping(nn.Linear):
    """A last layer that gives its input's image before its outputs, while it is trained.

    Attributes:
        regressor: the learned map, from what this layer reads to what the teacher's reads.
    """

    regressor: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        return torch.cat([self.regressor(x), outputs], dim=1) if self.training else outputs


def with_embeddings(
    net: nn.Module, teacher: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[nn.Module, nn.Module]:
    """Copies that give, in training, their embeddings along with their outputs.

    The map between them starts as the least squares fit on the first images, the network in
    training mode: pruning may have left batch norms whose statistics are not those of batches.

    Args:
        net: gives (N, classes), the last layer being linear.
        teacher: likewise; it always gives its embedding.
        batches: images (N, C, H, W) and labels, as training sees them.

    Raises:
        TrainingError: one of them does not end in a linear layer.
    """
    first, _ = next(iter(batches))
    names = last_layer(net, first[:1], "the network"), last_layer(teacher, first[:1], "the teacher")
    shown = copy.deepcopy(teacher).float().eval()
    _swap(shown, names[1], _Showing)
    probe = copy.deepcopy(net).train()
    _swap(probe, names[0], _Showing)
    sizes = _features(net, names[0]), _features(teacher, names[1])
    regressor = _fitted(probe, shown, sizes, islice(batches, max(1, IMAGES // len(first))))
    mapped = copy.deepcopy(net)
    _swap(mapped, names[0], _Mapping).regressor = regressor
    return mapped, shown


def without_embeddings(net: nn.Module) -> None:
    """Undo `with_embeddings`, in place; a network that has none stays as it is."""
    for name, module in list(net.named_modules()):
        if isinstance(module, _Mapping):
            del module.regressor
            _swap(net, name, nn.Linear)


def width(net: nn.Module) -> int:
    """How many of the first outputs of a network in training are its mapped embedding; 0: none."""
    return sum(m.regressor.out_features for m in net.modules() if isinstance(m, _Mapping))


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """|student - teacher|^2 / |teacher|^2 around the teacher's mean over the batch, float32 scalar.

    Args:
        student: mapped embeddings (N, features).
        teacher: embeddings of the same shape.
    """
    wanted = teacher.float()
    spread = (wanted - wanted.mean(0)).square().mean()
    distance = F.mse_loss(student.float(), wanted)
    return distance / torch.where(spread > 0, spread, 1.0)


def last_layer(net: nn.Module, image: Tensor, who: str) -> str:
    """The dotted name of the linear layer whose output is the network's.

    Args:
        net: unchanged.
        image: one real image, (1, C, H, W).
        who: what an error calls the network.

    Raises:
        TrainingError: there is none.
    """
    probe = copy.deepcopy(net).float()
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: outputs.__setitem__(name, output)

    for name, module in probe.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(keep(name))
    with evaluating(probe), torch.no_grad():
        given = probe(image.to(next(probe.parameters(), image).device))
    found = next((name for name, output in outputs.items() if output is given), None)
    if found is None:
        raise TrainingError(
            f"distill.embedding: {who} does not end in a linear layer; set embedding: 0, to learn "
            "from the teacher's outputs only"
        )
    return found


def _features(net: nn.Module, name: str) -> int:
    layer = net.get_submodule(name)
    assert isinstance(layer, nn.Linear)  # noqa: S101  # `last_layer` found it
    return layer.in_features


def _swap(net: nn.Module, name: str, kind: type[nn.Linear]) -> Any:
    """Make a linear layer one of another class with the same parameters; returns it."""
    old = net.get_submodule(name)
    assert isinstance(old, nn.Linear)  # noqa: S101  # `last_layer` found it
    new = kind(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
    new.weight, new.bias = old.weight, old.bias
    net.set_submodule(name, new.train(old.training))
    return new


@torch.no_grad()
def _fitted(
    net: nn.Module,
    teacher: nn.Module,
    sizes: tuple[int, int],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> nn.Linear:
    """The map from one embedding to the other: ridge regression on the first images.

    Args:
        net: gives its embedding first, in the mode that it is in.
        teacher: likewise.
        sizes: features of both embeddings.
        batches: images and labels, all of which are taken.
    """
    inputs, outputs = sizes
    read, wanted = [], []
    for images, _ in track(batches, "fitting the map between embeddings"):
        read.append(_outputs(net, images)[:, :inputs])
        wanted.append(_outputs(teacher, images)[:, :outputs])
    x, y = torch.cat(read).double(), torch.cat(wanted).double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x
    held = STIFFNESS * gram.diagonal().mean() + 1e-9
    weight = torch.linalg.solve(gram + held * torch.eye(inputs), x.T @ y).T
    regressor = nn.Linear(inputs, outputs)
    regressor.weight.copy_(weight)
    regressor.bias.copy_(mean_y - weight @ mean_x)
    return regressor


def _outputs(net: nn.Module, images: Tensor) -> Tensor:
    """What a network gives, wherever it is, on the processor."""
    form = torch.channels_last  # twice as fast in float32 on processors
    device = next(net.parameters()).device
    outputs: Tensor = net.to(memory_format=form)(images.to(device, memory_format=form))
    return outputs.cpu()
