"""Which layers int8 hurts, and the fewest of them that must stay in float."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bevel.core.progress import note, track
from bevel.data.metrics import evaluate
from bevel.quantization.simulation import Simulation, within

IMAGES = 32
"""Images on which layers are ranked, and tensors."""


@dataclass(frozen=True)
class LayerSensitivity:
    """What it does to the network's output when one layer alone computes in int8.

    Attributes:
        layer: the module's name.
        sqnr_db: signal to quantization noise of the output, in decibels.
        agreement: share of the images whose highest output stays the same.
    """

    layer: str
    sqnr_db: float
    agreement: float


@dataclass(frozen=True)
class TensorNoise:
    """What it does to the network's output when one tensor alone is rounded to int8.

    Attributes:
        layers: the modules that write or read it in integers; it is left alone where all of them
            are in float.
        noise: squared error of the output, relative to its squares.
    """

    layers: list[str]
    noise: float


@dataclass(frozen=True)
class Fallback:
    """The layers that stay in float so that accuracy holds.

    Attributes:
        keep_float: names of modules, those that take most noise with them first.
        accuracy_float: validation accuracy in float32.
        accuracy_int8: with every layer in int8.
        accuracy: with `keep_float` in float.
        limit: the least that was asked for.
        tried: number of modules in float -> accuracy, in the order in which it was tried.
        tensors: the noise of each, the worst first; empty where it was not needed.
    """

    keep_float: list[str]
    accuracy_float: float
    accuracy_int8: float
    accuracy: float
    limit: float
    tried: dict[int, float] = field(default_factory=dict)
    tensors: list[TensorNoise] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.keep_float:
            return f"no layer in float: {self.accuracy_int8:.2%} of at least {self.limit:.2%}"
        names = ", ".join(self.keep_float[:4]) + (", ..." if len(self.keep_float) > 4 else "")
        holds = "" if self.accuracy >= self.limit else "still below "
        return (
            f"{len(self.keep_float)} layers in float ({names}): {self.accuracy_int8:.2%} in int8 "
            f"became {self.accuracy:.2%}, {holds or 'at least '}{self.limit:.2%}"
        )


@torch.no_grad()
def sensitivity(simulation: Simulation, images: Iterable[Any]) -> list[LayerSensitivity]:
    """Every layer of a calibrated network, the most sensitive first.

    Args:
        simulation: its switches are all on afterwards.
        images: batches (N, C, H, W), or tuples that start with one; the first 32 images count.
    """
    batches = _first(images, IMAGES)
    simulation.quantize_only(())
    exact = _outputs(simulation.net, batches)
    found = []
    for layer in track(simulation.layers, "sensitivity", len(simulation.layers)):
        simulation.quantize_only([layer])
        rounded = _outputs(simulation.net, batches)
        agreement = (rounded.argmax(1) == exact.argmax(1)).float().mean()
        found.append(LayerSensitivity(layer, sqnr_db(exact, rounded), float(agreement)))
    simulation.keep_float(())
    return sorted(found, key=lambda item: item.sqnr_db)


def sqnr_db(exact: Tensor, rounded: Tensor) -> float:
    """Signal to quantization noise ratio in decibels; infinite where nothing differs."""
    noise = _relative_noise(exact, rounded)
    return -10 * math.log10(noise) if noise else math.inf


def _relative_noise(exact: Tensor, rounded: Tensor) -> float:
    """Sum of squared differences over the sum of squares; infinite where nothing was to be seen."""
    noise = float((exact - rounded).double().square().sum())
    signal = float(exact.double().square().sum())
    return noise / signal if signal else (math.inf if noise else 0.0)


@torch.no_grad()
def tensor_noise(simulation: Simulation, images: Iterable[Any]) -> list[TensorNoise]:
    """Every rounded tensor of a calibrated network, the worst first; arguments as `sensitivity`."""
    batches = _first(images, IMAGES)
    simulation.quantize_only(())
    exact = _outputs(simulation.net, batches)
    found = []
    for tensor in track(simulation.tensors, "noise of tensors", len(simulation.tensors)):
        simulation.quantize_tensor(tensor)
        noise = _relative_noise(exact, _outputs(simulation.net, batches))
        found.append(TensorNoise(sorted(simulation.tensors[tensor]), noise))
    simulation.keep_float(())
    return sorted(found, key=lambda item: -item.noise)


def relief(tensors: Sequence[TensorNoise], layers: Sequence[str]) -> Iterator[list[str]]:
    """Modules to put in float, step by step, each step the most noise for the fewest layers.

    A layer in float between others in int8 still reads and writes rounded tensors, so layers are
    not chosen one by one: each step takes all modules around one tensor. Noise of independent
    roundings adds up.

    Args:
        tensors: noise of each.
        layers: every layer of the network, to count what a module holds.
    """
    names = {*layers, *(name for tensor in tensors for name in tensor.layers)}
    inside = {name: {other for other in names if within(other, [name])} for name in names}
    # What the network's own forward computes has no module that could be named.
    left = [tensor for tensor in tensors if tensor.layers and "" not in tensor.layers]
    counted, kept = frozenset(layers), set[str]()

    def worth(tensor: TensorNoise) -> float:
        after = kept.union(*(inside[name] for name in tensor.layers))
        gone = sum(other.noise for other in left if after.issuperset(other.layers))
        return gone / max(1, len(counted & after) - len(counted & kept))

    while left:
        best = max(left, key=worth)
        step = [name for name in best.layers if name not in kept]
        kept = kept.union(*(inside[name] for name in best.layers))
        left = [tensor for tensor in left if not kept.issuperset(tensor.layers)]
        yield step


def fewest_in_float(
    simulation: Simulation, images: Iterable[Any], validation: Any, drop: float
) -> Fallback:
    """The fewest steps of `relief` that keep accuracy within `drop` of float.

    Bisects over their number, so a network of n tensors is evaluated about log2(n) times. Where
    even all layers in float miss it, because operators outside of any module stay in int8, all
    are kept.

    Args:
        simulation: a calibrated network.
        images: batches that show each tensor's noise.
        validation: re-iterable labelled batches.
        drop: accuracy that may be lost, 0..1.
    """

    def accuracy(layers: Sequence[str]) -> float:
        simulation.keep_float(layers)
        return evaluate(simulation.net, validation, label="int8 validation").top1

    simulation.quantize_only(())
    exact = evaluate(simulation.net, validation, label="float32 validation").top1
    limit = exact - drop
    whole = accuracy(())
    if whole >= limit:
        return Fallback([], exact, whole, whole, limit)
    tensors = tensor_noise(simulation, images)
    heads: list[list[str]] = [[]]
    for step in relief(tensors, simulation.layers):
        heads.append(heads[-1] + step)
    tried = {0: whole}
    short, enough = 0, len(heads) - 1  # the head wanted is after the first, at most the second
    while enough - short > 1:
        middle = (short + enough) // 2
        reached = tried[len(heads[middle])] = accuracy(heads[middle])
        if reached >= limit:
            enough = middle
        else:
            short = middle
    keep = heads[enough]
    if len(keep) not in tried:
        tried[len(keep)] = accuracy(keep)
    simulation.keep_float(())
    result = Fallback(keep, exact, whole, tried[len(keep)], limit, tried, tensors)
    note(str(result))
    return result


def _first(batches: Iterable[Any], count: int) -> list[Tensor]:
    """The first images of some batches."""
    images: list[Tensor] = []
    for batch in batches:
        tensor = batch if isinstance(batch, Tensor) else batch[0]
        images.append(tensor[: count - sum(map(len, images))])
        if sum(map(len, images)) >= count:
            break
    return images


def _outputs(net: nn.Module, batches: list[Tensor]) -> Tensor:
    """Of all images, (N, outputs): the first output where there are several."""
    rows = []
    for images in batches:
        output = net(images)
        first = output if isinstance(output, Tensor) else next(iter(output))
        rows.append(first.flatten(1))
    return torch.cat(rows)
