"""Distillation of feature maps: the network comes near its teacher inside, not only at the end.

The squared distance of feature maps is that of Romero et al., "FitNets: Hints for Thin Deep Nets",
2015, equation 3, but without its regressor: only maps of equal shape are compared. There are
several of them here, and each distance is relative to the teacher's map, so that units do not
matter.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bevel.core.errors import TrainingError

MOST_SITES = 6
"""Sites that are compared at most."""

CONTAINERS = (nn.Sequential, nn.ModuleList)
"""Modules that only hold others: what is in them is as near to the whole network as they are."""

Shape = tuple[int, ...]


def feature_sites(student: nn.Module, teacher: nn.Module, image: Tensor) -> tuple[str, ...]:
    """Dotted names of the modules whose outputs are compared, in the order in which they finish.

    These are the ends of the stages. A module comes into question if it gives a feature map of
    the same shape in both networks: (N, C, H, W) or (N, L, C), with more than one position, once
    in a forward. Of all whose maps have one size, (H, W) or L, those are looked at that lie in the
    fewest modules but containers, because what is inside a block is no end of a stage; the last
    of them to finish is taken.

    Args:
        student: the network that learns; unchanged, as the teacher is.
        teacher: the network that it learns from.
        image: one real image, shape (1, C, H, W).

    Raises:
        TrainingError: there is no such module.
    """
    ours, theirs = _map_shapes(student, image), _map_shapes(teacher, image)
    depths = {n: _depth(teacher, n) for n, shape in ours.items() if theirs.get(n) == shape}
    if not depths:
        raise TrainingError(
            "distill.features: no module gives feature maps of equal shape in the network and in "
            "its teacher; set features: 0, to learn from the teacher's outputs only"
        )
    ends: dict[Shape, str] = {}
    for name, depth in depths.items():
        size = _size(ours[name])
        if size not in ends or depth <= depths[ends[size]]:
            ends[size] = name
    chosen = sorted(ends.values(), key=lambda name: depths[name])[:MOST_SITES]
    return tuple(name for name in depths if name in chosen)


def feature_loss(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
    """Mean over the sites of |student - teacher|^2 / |teacher|^2, a float32 scalar.

    Args:
        student: feature maps by the name of their site, as `feature_maps` gives them.
        teacher: the same sites, each map of the same shape.

    Raises:
        TrainingError: a site has no map of the student's.
    """
    missing = [name for name in teacher if name not in student]
    if missing:
        raise TrainingError(
            f"distill.features: {missing[0]} gave no feature map while training, though it does "
            "in evaluation mode; set features: 0, to learn from the teacher's outputs only"
        )
    distances = [_distance(student[name], taught) for name, taught in teacher.items()]
    return torch.stack(distances).mean()


@contextmanager
def feature_maps(net: nn.Module, sites: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of these modules by name, in float32, once a forward has run in the block.

    The hooks that read them are gone after the block, whatever happens in it.
    """
    maps: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        maps[name] = output.to(torch.float32, copy=True)  # what follows may write into it

    with _hooked(net, sites, keep):
        yield maps


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference relative to the teacher's mean square; as it is where that is 0."""
    power = teacher.square().mean()
    return F.mse_loss(student, teacher) / torch.where(power > 0, power, 1.0)


def _map_shapes(net: nn.Module, image: Tensor) -> dict[str, Shape]:
    """Shapes of the feature maps of an image by module, in the order in which they are finished."""
    probe = copy.deepcopy(net).float().eval()  # a forward may change what a network holds
    shapes: dict[str, Shape] = {}
    runs: Counter[str] = Counter()

    def see(name: str, output: Any) -> None:
        runs[name] += 1
        if isinstance(output, Tensor):
            shapes[name] = tuple(output.shape)

    names = [
        name
        for name, module in probe.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    device = next(probe.parameters(), image).device
    with torch.no_grad(), _hooked(probe, names, see):
        probe(image.to(device))
    return {
        name: shape for name, shape in shapes.items() if runs[name] == 1 and _is_map(shape, image)
    }


def _depth(net: nn.Module, name: str) -> int:
    """In how many modules this one lies, containers and the network itself not counted."""
    around = accumulate(name.split(".")[:-1], "{}.{}".format)
    return sum(not isinstance(net.get_submodule(outer), CONTAINERS) for outer in around)


def _is_map(shape: Shape, image: Tensor) -> bool:
    """Whether a tensor of this shape has features of each image at more than one position.

    Gates and pooled features have one position; the windows of an attention are no images.
    """
    return len(shape) in (3, 4) and shape[0] == len(image) and math.prod(_size(shape)) > 1


def _size(shape: Shape) -> Shape:
    """(H, W) of (N, C, H, W), (L,) of (N, L, C)."""
    return shape[2:] if len(shape) == 4 else shape[1:2]


@contextmanager
def _hooked(
    net: nn.Module, names: Iterable[str], see: Callable[[str, Any], None]
) -> Iterator[None]:
    """Inside the block, `see` is called with a module's name and output whenever one has run."""

    def call(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        see(name, output)

    handles = [net.get_submodule(name).register_forward_hook(partial(call, name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
