"""Weights rounded so that errors take each other back, instead of each to the nearest.

What a layer adds up in int8 differs from what it adds up in float by the rounding of every weight.
Weights are rounded one after the other, and what rounding one adds to the output is taken back by
those that are still to come, as far as the inputs that the layer really sees are correlated
(Frantar and Alistarh, "Optimal Brain Compression", NeurIPS 2022; Frantar et al., "GPTQ", ICLR
2023). It is the closed form of what AdaRound learns by gradient descent (Nagel et al., "Up or
Down?", ICML 2020): which weights go up, and which go down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from bevel.core.progress import note, track
from bevel.graph.patches import patches, some_places
from bevel.quantization.annotate import aten
from bevel.quantization.simulation import FakeQuantize, Simulation, fake_quantize
from bevel.quantization.weights import put, taken

POSITIONS = 64
"""Places of an image that a layer is looked at."""

DAMPING = 0.01
"""Share of the mean square of the inputs that keeps the equations well posed."""

WIDEST = 4608
"""Most weights per output of a layer that is rounded so; wider ones go to the nearest."""


@torch.no_grad()
def learn_rounding(prepared: GraphModule, batches: Iterable[tuple[Tensor, ...]]) -> int:
    """Move the weights of convolutions and linear layers to integers, in place.

    Each output of a layer keeps the nearest integers where the others do no better. The scales
    stay: the largest weight of each is an integer already.

    Args:
        prepared: a calibrated network.
        batches: inputs that the layers are looked at with.

    Returns:
        The number of layers.
    """
    layers = {
        node.name: found for node in prepared.graph.nodes if (found := _observed_weight(node))
    }
    simulation = Simulation(prepared)
    simulation.quantize_only(())
    grams = _Grams(simulation.net, layers)
    for inputs in batches:
        grams.run(*inputs)
    for name, gram in track(grams.found.items(), "rounding", len(grams.found)):
        source, observer = layers[name]
        rounding = fake_quantize(prepared.get_submodule(str(observer.target)))
        if isinstance(rounding, FakeQuantize):
            put(prepared, source, round_together(taken(prepared, source), rounding, gram))
    note(f"learned the rounding of {len(grams.found)} layers")
    return len(grams.found)


def round_together(weight: Tensor, rounding: FakeQuantize, gram: Tensor) -> Tensor:
    """A weight of which each number is one that its integers can say.

    Args:
        weight: (outputs, ...).
        rounding: to the nearest.
        gram: sums of products of the inputs, (groups, weights of an output, the same).
    """
    groups, inputs = gram.shape[:2]
    nearest = rounding(weight).reshape(groups, -1, inputs).double()
    wanted = weight.reshape(groups, -1, inputs).double()
    step, low, high = (
        part.double().expand(weight.shape[0]).reshape(groups, -1)
        for part in (rounding.scale, rounding.low, rounding.high)
    )
    together = _in_turn(wanted.clone(), _inverse_root(gram.double()), step, low, high)
    better = _cost(together - wanted, gram) < _cost(nearest - wanted, gram)
    found = torch.where(better[..., None], together, nearest)
    return found.reshape(weight.shape).to(weight)


def _in_turn(weight: Tensor, root: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Round each input's weights of all outputs at once; those behind take the error back."""
    for index in range(weight.shape[2]):
        own = weight[..., index]
        rounded = ((own / step).round() * step).clamp(low, high)
        error = (own - rounded) / root[:, index, index, None]
        behind = root[:, index, index + 1 :]
        weight[..., index + 1 :] -= error[..., None] * behind[:, None]
        weight[..., index] = rounded
    return weight


def _inverse_root(gram: Tensor) -> Tensor:
    """Upper triangular R with R^T R the inverse of the damped gram matrix."""
    level = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    damped = gram + torch.diag_embed((DAMPING * level)[:, None].expand(-1, gram.shape[1]))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    root: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return root


def _cost(error: Tensor, gram: Tensor) -> Tensor:
    """Squared error of each output that an error of the weights makes: (groups, outputs)."""
    return ((error @ gram.double()) * error).sum(2)


class _Grams(Interpreter):
    """Runs a network in float and sums up products of what some layers read."""

    def __init__(self, net: nn.Module, layers: Iterable[str]) -> None:
        assert isinstance(net, GraphModule)  # noqa: S101  # a simulation's network is
        super().__init__(net)
        self.layers = frozenset(layers)
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """The node's value."""
        value = super().run_node(n)
        if n.name in self.layers:
            arguments, _ = self.fetch_args_kwargs_from_env(n)
            read = _read(arguments, value)
            if read is not None:
                self.found[n.name] = self.found.get(n.name, 0) + read @ read.transpose(1, 2)
        return value


def _read(arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """What outputs at some places are made of: (groups, weights of an output, samples)."""
    x, weight = arguments[:2]
    assert isinstance(x, Tensor)  # noqa: S101  # of a layer
    assert isinstance(weight, Tensor)  # noqa: S101
    if math.prod(weight.shape[1:]) > WIDEST:
        return None
    if weight.ndim == 2:
        return x.reshape(-1, weight.shape[1]).T[None].float()
    given = dict(enumerate(arguments))
    stride, padding, dilation = (
        given.get(place, [value]) for place, value in ((3, 1), (4, 0), (5, 1))
    )
    places = some_places(math.prod(output.shape[2:]), POSITIONS)
    how = {"stride": stride, "padding": padding, "dilation": dilation}
    return patches(x.float(), weight, places, output.shape[3], **how)


def _observed_weight(node: Node) -> tuple[Node, Node] | None:
    """The stored tensor that is a layer's weight and its observer, both used by it alone."""
    if node.op != "call_function" or node.target not in (aten.conv2d.default, aten.linear.default):
        return None
    observer = node.args[1]
    if not isinstance(observer, Node) or observer.op != "call_module":
        return None
    source = observer.args[0]
    if not isinstance(source, Node) or source.op != "get_attr":
        return None
    alone = len(source.users) == 1 and len(observer.users) == 1
    return (source, observer) if alone else None
