"""Changes to the weights of a traced network that make it lose less in int8, or faster.

All keep what the network computes in float: batch norms are folded, channels rescaled and gates
written differently exactly; a bias takes back only what rounding would add.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from bevel.core.progress import note
from bevel.quantization.annotate import WEIGHTED, aten
from bevel.quantization.simulation import Simulation

PASSES = 20
"""Most rounds over all pairs of layers; few networks need as many."""

SETTLED = 0.01
"""Rounds end when no channel is scaled by more than this."""

CONVOLUTIONS = tuple(target for target in WEIGHTED if target is not aten.linear.default)

HARD_SIGMOIDS = (aten.hardsigmoid.default, aten.hardsigmoid_.default)

PRODUCTS = (aten.mul.Tensor, aten.mul_.Tensor)

HOMOGENEOUS = (
    aten.relu.default,
    aten.relu_.default,
    aten.leaky_relu.default,
    aten.leaky_relu_.default,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.dropout.default,
)
"""f(s x) = s f(x) for s > 0, channel by channel. ReLU6, SiLU and hard swish are not."""


def fold_batch_norms(module: GraphModule) -> None:
    """Put every batch norm behind a convolution or linear layer into its weights, in place."""
    from torchao.quantization.pt2e.utils import _fuse_conv_bn_, _fuse_linear_bn_

    _fuse_conv_bn_(module)
    _fuse_linear_bn_(module)


@torch.no_grad()
def equalize(module: GraphModule) -> int:
    """Give the channels between two layers alike ranges, in place; batch norms are folded.

    For a channel whose largest weight is a in the first layer and b in the second, the first
    layer's channel is divided by s = sqrt(a / b) and the second's multiplied by it (Nagel et al.,
    "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, equation 11),
    over and over until nothing changes. Only pairs with an activation in between that keeps this
    exact, and with no other reader of the tensor.

    Returns:
        The number of pairs.
    """
    pairs = list(_pairs(module))
    for _ in range(PASSES):
        if max((_even_out(module, *pair) for pair in pairs), default=0.0) < SETTLED:
            break
    note(f"equalized {len(pairs)} pairs of layers")
    return len(pairs)


@torch.no_grad()
def clip_hard_sigmoids(module: GraphModule) -> int:
    """Write x * hard_sigmoid(layer) as x * ReLU6(layer), in place, where its reader allows it.

    hard_sigmoid(y) = ReLU6(y + 3) / 6: the 3 goes into the layer's bias, the 6 into the weights of
    the layer that reads the product. A ReLU6 is fused into the layer before it by runtimes that
    have no hard sigmoid in integers.

    Returns:
        The number of gates.
    """
    gates = list(_gates(module))
    for layer, gate, reader in gates:
        bias, weight = _stored(module, layer, 2), _stored(module, reader, 1)
        assert bias is not None  # noqa: S101  # `_gates`
        assert weight is not None  # noqa: S101
        _store(module, layer, 2, bias + 3)
        _store(module, reader, 1, weight / 6)
        with module.graph.inserting_before(gate):
            clipped = module.graph.call_function(aten.relu6.default, (layer,))
        clipped.meta = dict(gate.meta)
        gate.replace_all_uses_with(clipped)
        module.graph.erase_node(gate)
    module.recompile()
    return len(gates)


def _gates(module: GraphModule) -> Iterator[tuple[Node, Node, Node]]:
    """Each hard sigmoid between the layer before it and the one that reads what it scales."""
    for gate in module.graph.nodes:
        product = _only_user(gate) if gate.target in HARD_SIGMOIDS else None
        reader = _only_user(product) if product is not None else None
        if product is None or reader is None or product.target not in PRODUCTS:
            continue
        if product.args.count(gate) != 1:  # its square
            continue
        layer: Node = gate.args[0]
        ours = _own_weights(layer) and _own_weights(reader) and reader.args[0] is product
        if ours and list(layer.users) == [gate] and _bias_node(layer):
            yield layer, gate, reader


def _pairs(module: GraphModule) -> Iterator[tuple[Node, Node]]:
    """Layers with nothing between them but what scales along."""
    for first in module.graph.nodes:
        if not _own_weights(first):
            continue
        after = _only_user(first)
        while after is not None and after.target in HOMOGENEOUS:
            after = _only_user(after)
        if after is None or not _own_weights(after) or after.args[0] is first.args[0]:
            continue
        if (first.target in CONVOLUTIONS) == (after.target in CONVOLUTIONS):
            yield first, after


def _own_weights(node: Node) -> bool:
    """Whether it is a layer whose weight is a stored tensor that nothing else reads."""
    if node.op != "call_function" or node.target not in WEIGHTED:
        return False
    stored = [argument for argument in node.args[1:3] if argument is not None]
    return all(isinstance(s, Node) and s.op == "get_attr" and len(s.users) == 1 for s in stored)


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _even_out(module: GraphModule, first: Node, second: Node) -> float:
    """Rescale the channels between two layers; returns how far the largest factor is from 1."""
    weight, bias = _stored(module, first, 1), _stored(module, first, 2)
    reader = _stored(module, second, 1)
    assert weight is not None  # noqa: S101  # `_own_weights`
    assert reader is not None  # noqa: S101
    groups = weight.shape[0] // reader.shape[1]
    split = reader.reshape(groups, -1, *reader.shape[1:])
    made = weight.flatten(1).abs().amax(1)
    read = (
        split.abs().flatten(3).amax((1, 3)).flatten() if reader.ndim > 2 else reader.abs().amax(0)
    )
    usable = (made > 0) & (read > 0)
    factor = torch.where(usable, (made / read.clamp(min=1e-38)).sqrt(), 1.0)
    factor = torch.where(torch.isfinite(factor) & (factor > 0), factor, 1.0)
    _store(module, first, 1, weight / factor.reshape(-1, *[1] * (weight.ndim - 1)))
    if bias is not None:
        _store(module, first, 2, bias / factor)
    along = factor.reshape(groups, 1, -1, *[1] * (reader.ndim - 2))
    _store(module, second, 1, (split * along).reshape(reader.shape))
    return float((factor - 1).abs().max())


@torch.no_grad()
def correct_biases(prepared: GraphModule, batches: Iterable[tuple[Tensor, ...]]) -> int:
    """Subtract from each layer's bias the mean error that int8 adds to its output, in place.

    Layer by layer in the order in which they run, each with those before it corrected already
    (Nagel et al. 2019, section 4.2, the empirical form). A layer without a bias stays as it is.

    Args:
        prepared: a calibrated network.
        batches: inputs to average over; all are given the same weight.

    Returns:
        The number of layers.
    """
    simulation = Simulation(prepared)
    layers = {n.name: n for n in prepared.graph.nodes if _bias_node(n) is not None}
    total: dict[str, Tensor] = {}
    count = 0
    for inputs in batches:
        simulation.quantize_only(())
        exact = _Means(simulation.net, layers.keys(), {})
        exact.run(*inputs)
        simulation.keep_float(())
        rounded = _Means(simulation.net, layers.keys(), exact.means)
        rounded.run(*inputs)
        for name, error in rounded.errors.items():
            total[name] = total.get(name, torch.zeros(())) + error
        count += 1
    for name, error in total.items():
        bias = _stored(prepared, layers[name], 2)
        assert bias is not None  # noqa: S101  # it is one of `layers`
        _store(prepared, layers[name], 2, bias - error / count)
    note(f"corrected the bias of {len(total)} layers")
    return len(total)


class _Means(Interpreter):
    """Runs a network and takes the mean of some layers' outputs, channel by channel.

    With the means that they should have, each output is corrected before the network goes on.
    """

    def __init__(self, net: nn.Module, layers: Iterable[str], wanted: dict[str, Tensor]) -> None:
        assert isinstance(net, GraphModule)  # noqa: S101  # a simulation's network is
        super().__init__(net)
        self.layers, self.wanted = frozenset(layers), wanted
        self.means: dict[str, Tensor] = {}
        self.errors: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """The node's value, corrected."""
        value = super().run_node(n)
        if n.name not in self.layers:
            return value
        channel = 1 if n.target in CONVOLUTIONS else value.ndim - 1
        others = [axis for axis in range(value.ndim) if axis != channel]
        mean = self.means[n.name] = value.mean(others)
        if n.name not in self.wanted:
            return value
        error = self.errors[n.name] = mean - self.wanted[n.name]
        return value - error.reshape([-1 if axis == channel else 1 for axis in range(value.ndim)])


def _bias_node(node: Node) -> Node | None:
    """The stored tensor that is a layer's bias, used by it alone."""
    if node.op != "call_function" or node.target not in WEIGHTED or len(node.args) < 3:
        return None
    bias = node.args[2]
    if isinstance(bias, Node) and bias.op == "call_module":  # observed
        bias = bias.args[0]
    if isinstance(bias, Node) and bias.op == "get_attr" and len(bias.users) == 1:
        return bias
    return None


def _source(node: Node, index: int) -> Node | None:
    if index == 2:
        return _bias_node(node)
    argument = node.args[index]
    return argument if isinstance(argument, Node) else None


def _stored(module: GraphModule, node: Node, index: int) -> Tensor | None:
    """The weight (index 1) or bias (2) of a layer, if it has one."""
    source = _source(node, index)
    if source is None:
        return None
    return taken(module, source)


def taken(module: GraphModule, source: Node) -> Tensor:
    """A stored tensor."""
    parent, _, name = str(source.target).rpartition(".")
    value: Tensor = getattr(module.get_submodule(parent), name)
    return value.detach()


def _store(module: GraphModule, node: Node, index: int, value: Tensor) -> None:
    """Replace the weight or bias of a layer."""
    source = _source(node, index)
    assert source is not None  # noqa: S101  # it was read before
    put(module, source, value)


def put(module: GraphModule, source: Node, value: Tensor) -> None:
    """Replace a stored tensor; never in place, the traced network may share it."""
    parent, _, name = str(source.target).rpartition(".")
    holder = module.get_submodule(parent)
    if name in dict(holder.named_buffers(recurse=False)):
        setattr(holder, name, value)
    else:
        setattr(holder, name, nn.Parameter(value, requires_grad=False))
