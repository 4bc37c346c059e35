"""Which layers int8 hurts, and the fewest of them that must stay in float."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bevel.core.progress import note, track
from bevel.data.metrics import evaluate
from bevel.quantization.simulation import Simulation

IMAGES = 64
"""Images on which layers are ranked."""


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
class Fallback:
    """The layers that stay in float so that accuracy holds.

    Attributes:
        keep_float: names of modules, the most sensitive first.
        accuracy_float: validation accuracy in float32.
        accuracy_int8: with every layer in int8.
        accuracy: with `keep_float` in float.
        limit: the least that was asked for.
        tried: number of layers in float -> accuracy, in the order in which it was tried.
        sensitivity: of every layer, the most sensitive first; empty where it was not needed.
    """

    keep_float: list[str]
    accuracy_float: float
    accuracy_int8: float
    accuracy: float
    limit: float
    tried: dict[int, float] = field(default_factory=dict)
    sensitivity: list[LayerSensitivity] = field(default_factory=list)

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
        images: batches (N, C, H, W), or tuples that start with one; the first 64 images count.
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
    noise = float((exact - rounded).double().square().sum())
    signal = float(exact.double().square().sum())
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def fewest_in_float(
    simulation: Simulation, images: Iterable[Any], validation: Any, drop: float
) -> Fallback:
    """The shortest head of the sensitivity ranking that keeps accuracy within `drop` of float.

    Bisects over the length, so a network of n layers is evaluated about log2(n) times. Where
    even all layers in float miss it, because operators outside of any layer stay in int8, all
    are kept.

    Args:
        simulation: a calibrated network.
        images: batches to rank layers on.
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
    ranking = sensitivity(simulation, images)
    names = [item.layer for item in ranking]
    tried = {0: whole}
    short, enough = 0, len(names)  # the count wanted is above the first, at most the second
    while enough - short > 1:
        middle = (short + enough) // 2
        tried[middle] = accuracy(names[:middle])
        if tried[middle] >= limit:
            enough = middle
        else:
            short = middle
    if enough not in tried:
        tried[enough] = accuracy(names[:enough])
    simulation.keep_float(())
    result = Fallback(names[:enough], exact, whole, tried[enough], limit, tried, ranking)
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
