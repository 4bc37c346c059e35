"""Layers fitted again, one after the other, so that a changed network computes what the old did.

Replacing an activation leaves an error at its place, and twenty such errors, each fitted as if the
others were not there, leave nothing of the answers. Here each layer is given what the changed
network really feeds it, and its weights move so that it comes closest to what it gave before, in
the least squares sense. What a layer mends, the next does not have to.

Such fits layer by layer are known from channel pruning: He et al., "Channel Pruning for
Accelerating Very Deep Neural Networks", ICCV 2017, with the drift taken into account as in Luo et
al., "ThiNet", ICCV 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bevel.core.modes import evaluating
from bevel.core.progress import track
from bevel.graph.patches import patches, some_places
from bevel.graph.record import decomposed
from bevel.rewriting.modules import SeparableConv2d
from bevel.rewriting.seen import Seen

POSITIONS = 64
"""Most places of an image at which a layer is looked at."""

ELEMENTS = 1 << 25
"""Most numbers that a layer's inputs are laid out in."""

ACTIVATION = 1 << 29
"""Most bytes that the largest activation of all images may take: they run together."""

WIDEST = 6144
"""Most weights per output of a layer that is fitted: the equations grow with their cube."""

STIFFNESS = (10.0, 1.0, 0.1, 0.01, 0.001)
"""How strongly weights are held where they are, relative to the mean square of the inputs."""

SAME = 1e-9
"""A relative squared error below which a layer is left alone."""


@dataclass(frozen=True)
class Refit:
    """One layer.

    Attributes:
        module: its name.
        before: squared error of its output on what the changed network feeds it, relative to the
            variance of what it should give.
        after: the same with the new weights.
    """

    module: str
    before: float
    after: float


Run = Callable[[Tensor], Tensor]
"""Runs a layer on its input with the weights that it has then."""

Affine = tuple[Tensor, Tensor]
"""Scale and shift per channel: what a layer is to give now is s z + t of the z it gave."""


@torch.no_grad()
def reconstruct(
    net: nn.Module,
    original: nn.Module,
    images: Tensor | list[Tensor],
    wanted: Mapping[str, Affine] | None = None,
    kept: Mapping[str, np.ndarray] | None = None,
) -> list[Refit]:
    """Fit the weights of convolutions and linear layers again, in place, in the order they run.

    One pass: each layer is fitted before the next is run. How far its weights may move is chosen
    on the second half of the images, so that it gets better on images it was not fitted on, or
    stays as it is.

    Args:
        net: the changed network; its layers have the names that they have in the original.
        original: what it was made of.
        images: (N, C, H, W), or a list of (C, H, W) as detectors take them, N of at least 2; more
            of them than fit into memory are left out.
        wanted: by a layer's name, what it should give where that is not what it gave.
        kept: by a layer's name, which of its output channels are left (indices), where not all are:
            `PruningPlan.outputs`.

    Returns:
        The layers that drift reached, in order.
    """
    seen = Seen.of(net, (images[:1],))
    images = images[: _count(seen, images)]
    fixed = _fixed(net)
    layers = {
        node.module: node.number
        for node in seen.calls((torch.conv2d, F.linear))
        if (owner := seen.owner_of_weight(node)) is not None and id(owner.weight) not in fixed
    }
    sources = {name: _source(net, name) for name in layers}
    before = _Noting()
    _run(original, images, sources.values(), before)
    outputs = {
        name: before.outputs[source] for name, source in sources.items() if source in before.outputs
    }
    for name, left in (kept or {}).items():
        if name in outputs:
            outputs[name] = outputs[name][torch.tensor(left)]
    with closing(track(layers, "fitting layers", len(layers))) as progress:
        fitting = _Fitting(seen, outputs, wanted or {}, progress)
        _run(net, images, layers, fitting)
    return fitting.done


def _fixed(net: nn.Module) -> set[int]:
    """Weights that stay while others are trained, such as the bins of YOLOv8's head."""
    trained = any(parameter.requires_grad for parameter in net.parameters())
    return {id(p) for p in net.parameters() if trained and not p.requires_grad}


def _source(net: nn.Module, name: str) -> str:
    """The layer of the original that gave what this one is to give."""
    parent, _, own = name.rpartition(".")
    last = own == "pointwise" and isinstance(net.get_submodule(parent), SeparableConv2d)
    return parent if last else name


def _count(seen: Seen, images: Tensor | list[Tensor]) -> int:
    """As many images as can be in memory at once, two at least."""
    largest = max((math.prod(value.shape) for value in seen.made()), default=1)
    return max(min(len(images), ACTIVATION // (largest * images[0].itemsize)), 2)


def _run(
    net: nn.Module, images: Tensor | list[Tensor], layers: Iterable[str], watcher: _Watcher
) -> None:
    with evaluating(net), decomposed(), _Layers(net, layers, watcher):
        net(images)


@dataclass(frozen=True)
class _Layer:
    """A module that calls one convolution or linear layer.

    Attributes:
        name: of the module.
        weight: (outputs, inputs of a group, ...).
        bias: (outputs,) or None.
        conv: the module, if it is a convolution that knows how it pads.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    conv: nn.Conv2d | None

    @classmethod
    def of(cls, name: str, module: nn.Module) -> _Layer:
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)  # noqa: S101  # `owner_of_weight` found it
        conv = module if isinstance(module, nn.Conv2d) else None
        return cls(name, weight, bias if isinstance(bias, Tensor) else None, conv)

    @property
    def is_image(self) -> bool:
        """Whether channels come second: in convolutions, not in linear layers."""
        return self.weight.ndim == 4

    @property
    def inputs(self) -> int:
        """Weights per output."""
        return math.prod(self.weight.shape[1:])

    def places(self, y: Tensor, most: int) -> Tensor:
        """Some places of an image of its output; fewer of them are the first of more."""
        count = math.prod(y.shape[2:]) if self.is_image else math.prod(y.shape[1:-1])
        return some_places(count, most).to(y.device)

    def at(self, y: Tensor, places: Tensor) -> Tensor:
        """(images, channels, height, width) or (images, ..., channels) to (channels, samples)."""
        if self.is_image:
            return y.flatten(2)[:, :, places].transpose(0, 1).flatten(1)
        return y.reshape(len(y), -1, y.shape[-1])[:, places].flatten(0, 1).T

    def read(self, x: Tensor, y: Tensor, places: Tensor) -> Tensor | None:
        """What its output at these places is made of: (groups, weights of an output, samples)."""
        if self.inputs > WIDEST:
            return None
        conv = self.conv
        if not self.is_image:
            return self.at(x, places)[None]
        if conv is None or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return None
        how = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        return patches(x, self.weight, places, y.shape[3], **how)


class _Watcher(Protocol):
    """Is called instead of a layer, and gives what the layer gives."""

    def __call__(self, layer: _Layer, x: Tensor, run: Run) -> Tensor: ...


class _Layers(TorchFunctionMode):
    """Has a watcher called for the layers of some modules."""

    def __init__(self, net: nn.Module, layers: Iterable[str], watcher: _Watcher) -> None:
        super().__init__()
        self.watcher = watcher
        modules = dict(net.named_modules())
        found = [_Layer.of(name, modules[name]) for name in layers if name in modules]
        self.layers = {id(layer.weight): layer for layer in found}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        layer = self.layers.get(id(args[1])) if len(args) > 1 else None
        if layer is None or func not in (torch.conv2d, F.linear):
            return func(*args, **kwargs)
        return self.watcher(layer, args[0], lambda x: func(x, *args[1:], **kwargs))


class _Noting:
    """Keeps what layers give, at some places: (channels, samples)."""

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}

    def __call__(self, layer: _Layer, x: Tensor, run: Run) -> Tensor:
        y = run(x)
        if len(y):  # a detector may have proposed nothing
            self.outputs[layer.name] = layer.at(y, layer.places(y, POSITIONS))
        return y


class _Fitting:
    """Fits each layer as it is met; `done` says how that went.

    Args:
        seen: the changed network.
        outputs: what the layers gave, from `_Noting`.
        wanted: what they should give of that.
        progress: goes on by one with each layer.
    """

    def __init__(
        self,
        seen: Seen,
        outputs: Mapping[str, Tensor],
        wanted: Mapping[str, Affine],
        progress: Iterator[str],
    ) -> None:
        self.outputs, self.wanted, self.progress = outputs, wanted, progress
        self.done: list[Refit] = []
        behind = ((node.module, seen.norm_behind(node)) for node in seen.nodes)
        self.norms = {name: seen.modules[norm.module] for name, norm in behind if norm is not None}

    def __call__(self, layer: _Layer, x: Tensor, run: Run) -> Tensor:
        next(self.progress, None)
        y = run(x)
        if not len(y):
            return y
        most = max(min(POSITIONS, ELEMENTS // (layer.inputs * len(y))), 1)
        places = layer.places(y, most)
        found, target = layer.at(y, places), self._target(layer.name)
        if target is None or len(target) != len(found) or target.shape[1] % len(y):
            return y  # a detector's second stage may be given other places than in the original
        target = target.reshape(len(found), len(y), -1)[..., : len(places)].flatten(1)
        if target.shape != found.shape:
            return y
        missing, spread = target - found, max(_spread(target), 1e-30)
        if float(missing.square().sum()) < SAME * spread:
            return y
        inputs = layer.read(x, y, places)
        change = None if inputs is None else best_change(inputs, missing, len(y))
        before = _spread(missing) / spread
        if change is not None:
            layer.weight.add_(change.reshape(layer.weight.shape).to(layer.weight))
            y = run(x)
            missing = target - layer.at(y, places)
        self.done.append(Refit(layer.name, before, _spread(missing) / spread))
        return self._centred(layer, y, missing.mean(1))

    def _target(self, name: str) -> Tensor | None:
        target = self.outputs.get(name)
        if target is None or name not in self.wanted:
            return target
        scale, shift = (part.to(target)[:, None] for part in self.wanted[name])
        return scale * target + shift

    def _centred(self, layer: _Layer, y: Tensor, missing: Tensor) -> Tensor:
        """Have the means right too: by the batch norm behind the layer, or its bias."""
        norm = self.norms.get(layer.name)
        if norm is not None:
            mean = norm.running_mean
            assert isinstance(mean, Tensor)  # noqa: S101  # `norm_behind` found it
            mean.sub_(missing.to(mean))
            return y
        if layer.bias is None:
            return y
        layer.bias.add_(missing.to(layer.bias))
        return y + missing.to(y).reshape(-1, *[1] * (y.ndim - 2 if layer.is_image else 0))


def best_change(inputs: Tensor, missing: Tensor, images: int) -> Tensor | None:
    """The change of weights that makes the most of what is missing; None if nothing helps.

    Ridge regression towards the weights as they are, means aside. Its stiffness is the one that
    does best on the second half of the images when fitted on the first.

    Args:
        inputs: (groups, weights of an output, samples), samples image by image.
        missing: (outputs, samples).
        images: how many.

    Returns:
        (groups, outputs of a group, weights of an output).
    """
    wanted = missing.reshape(len(inputs), -1, missing.shape[1])
    inputs = inputs - inputs.mean(2, keepdim=True)
    wanted = wanted - wanted.mean(2, keepdim=True)
    half = images // 2 * (missing.shape[1] // images)
    inputs2, wanted2 = inputs[..., half:], wanted[..., half:]
    best = 0.0
    chosen: tuple[float, ...] = ()
    for stiffness, change in _ridges(inputs[..., :half], wanted[..., :half], STIFFNESS):
        left = wanted2 - change.to(inputs2) @ inputs2
        gain = float(wanted2.double().square().sum() - left.double().square().sum())
        if gain > best:
            best, chosen = gain, (stiffness,)
    return next((change for _, change in _ridges(inputs, wanted, chosen)), None)


def _ridges(
    inputs: Tensor, wanted: Tensor, stiffnesses: Iterable[float]
) -> Iterator[tuple[float, Tensor]]:
    """Ridge regressions of `wanted` on `inputs`: with each stiffness (groups, outputs, weights).

    In the space of weights or that of samples, whichever is smaller: the answer is the same.
    """
    few = inputs.shape[2] < inputs.shape[1]
    turned = inputs.transpose(1, 2)
    gram = (turned @ inputs if few else inputs @ turned).double()
    cross = None if few else (wanted @ turned).double()
    level = inputs.double().square().sum((1, 2)) / inputs.shape[1]
    for stiffness in stiffnesses:
        held = (stiffness * level + 1e-9)[:, None].expand(-1, gram.shape[1])
        factor, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(held))
        if failed.any():  # held too loosely for what rounding has left of the sums
            continue
        if cross is None:
            change = torch.cholesky_solve(wanted.double().transpose(1, 2), factor)
            yield stiffness, (inputs.double() @ change).transpose(1, 2)
        else:
            yield stiffness, torch.cholesky_solve(cross.transpose(1, 2), factor).transpose(1, 2)


def _spread(x: Tensor) -> float:
    """Sum of squares around the means of the rows."""
    return float((x - x.mean(1, keepdim=True)).square().sum())
