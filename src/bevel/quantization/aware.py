"""Quantization-aware training: the network with the rounding of int8 in its forward.

The roundings come from the quantizer that the export will use, whichever it is: its annotated graph
says which tensors are rounded, and they are put into the graph as it was before batch norms were
folded. So the network trains like any other, with its own parameters under their own names. A
folded batch norm scales a channel's weights, and a channel has a weight scale of its own, so
rounding the weights before the batch norm is the same as rounding the folded ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from bevel.core.errors import ExportError
from bevel.core.quiet import quiet
from bevel.core.recipe import Quantization
from bevel.graph.program import fixed_batch
from bevel.quantization.annotate import WEIGHTED
from bevel.quantization.folding import BATCH_NORM
from bevel.quantization.pt2e import calibrated
from bevel.quantization.simulation import FakeQuantize, fake_quantize, observed


class _AnyBatchNorm(_BatchNorm):
    """A batch norm over inputs of any shape: the traced graph says which."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002  # torch's name
        """Nothing to check."""


def quantization_aware(
    program: ExportedProgram,
    quantizer: Any,
    calibration: Iterable[Any],
    options: Quantization | None = None,
) -> GraphModule:
    """A network that trains with int8 roundings in its forward, calibrated to begin with.

    Its parameters and buffers have the names of the traced network's; `trained_weights` takes
    them back. While it trains, the ranges of activations follow an average of the batches' and
    those of weights are as the weights are, until `freeze`. Dropout is left out.

    Args:
        program: the traced network, for any batch size.
        quantizer: the torchao `Quantizer` that the export will use.
        calibration: as `quantize` takes it.
        options: as `quantize` takes them; weights are not changed beforehand.

    Raises:
        ExportError: the network takes only one batch size, or calibration fails.
    """
    if fixed_batch(program) is not None:
        raise ExportError(
            "quantization-aware training needs a network that takes any batch size; tracing "
            "this one fixes it (bevel export says why): leave the step out"
        )
    plain = {"equalize": False, "correct_bias": False, "learn_rounding": False}
    options = (options or Quantization()).model_copy(update=plain)
    prepared = calibrated(program, quantizer, calibration, options)
    with quiet():
        traced = program.module()
    net = GraphModule(copy.deepcopy(traced), copy.deepcopy(traced.graph))
    for node in list(net.graph.nodes):
        if node.op == "call_module" and not node.users:  # torch's check of the inputs
            net.graph.erase_node(node)
    quantizer.transform_for_annotation(net)  # in place, as before the annotation
    _insert_roundings(net, prepared)
    _restore_batch_norms(net)
    net.graph.lint()
    net.delete_all_unused_submodules()
    net.recompile()
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    for module in net.modules():
        if isinstance(module, FakeQuantize):
            module.following = True
    return net.eval()


def freeze(net: nn.Module) -> None:
    """Batch-norm statistics and the ranges of activations stay as they are from now on."""
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
        elif isinstance(module, FakeQuantize) and not module.of_weight:
            module.following = False


def trained_weights(net: nn.Module, aware: nn.Module) -> nn.Module:
    """A copy of the network with the weights and statistics that its aware form learned."""
    result = copy.deepcopy(net)
    learned = aware.state_dict()
    own = result.state_dict()
    result.load_state_dict({name: learned.get(name, value) for name, value in own.items()})
    return result.eval()


def _insert_roundings(net: GraphModule, prepared: GraphModule) -> None:
    """Round in `net` what is observed in `prepared`, its copy with folded batch norms."""
    nodes = {node.name: node for node in net.graph.nodes}
    kept = {node.name for node in prepared.graph.nodes}
    modules: dict[int, nn.Module | None] = {}
    for number, (observer, source) in enumerate(observed(prepared).items()):
        module = prepared.get_submodule(str(observer.target))
        if id(module) not in modules:  # tensors that share a scale share its module
            modules[id(module)] = fake_quantize(module)
        rounding = modules[id(module)]
        value = _same_value(nodes, kept, source)
        readers = [nodes[user.name] for user in observer.users if user.name in nodes]
        if rounding is None or value is None or not readers:
            continue
        name = f"rounding_{number}"
        net.add_submodule(name, rounding)
        with net.graph.inserting_after(value):
            rounded = net.graph.call_module(name, (value,))
        for reader in readers:
            reader.replace_input_with(value, rounded)
        if isinstance(rounding, FakeQuantize) and value.op == "get_attr":
            rounding.of_weight = True  # its scale was that of the folded weight
            rounding.follow(_parameter(net, value).detach())


def _parameter(net: GraphModule, node: Node) -> Tensor:
    """The stored tensor that a node reads."""
    path, _, name = str(node.target).rpartition(".")
    value: Tensor = getattr(net.get_submodule(path), name)
    return value


def _same_value(nodes: dict[str, Node], kept: set[str], source: Node) -> Node | None:
    """The node with this value where batch norms are not folded."""
    node = nodes.get(source.name)
    if node is None or node.target not in WEIGHTED:
        return node
    after = [user for user in node.users if user.target is BATCH_NORM]
    return after[0] if after and after[0].name not in kept else node


def _restore_batch_norms(net: GraphModule) -> None:
    """Modules that estimate their statistics, in place of operators that only apply them."""
    for node in list(net.graph.nodes):
        if node.op != "call_function" or node.target is not BATCH_NORM:
            continue
        path = str(node.args[3].target).rpartition(".")[0]
        holder = net.get_submodule(path)
        if not isinstance(holder, _AnyBatchNorm):
            holder = _batch_norm(holder, *node.args[6:8])
            net.set_submodule(path, holder)
        with net.graph.inserting_before(node):
            applied = net.graph.call_module(path, (node.args[0],))
        node.replace_all_uses_with(applied)
        net.graph.erase_node(node)
        for argument in node.args[1:5]:
            if isinstance(argument, Node) and not argument.users:
                net.graph.erase_node(argument)


def _batch_norm(holder: nn.Module, momentum: float, eps: float) -> _AnyBatchNorm:
    """A batch norm with the parameters and statistics that the module holds."""
    stored = dict(holder.named_parameters()) | dict(holder.named_buffers())
    norm = _AnyBatchNorm(
        len(stored["running_mean"]), eps=eps, momentum=momentum, affine="weight" in stored
    )
    with torch.no_grad():
        for name, value in norm.state_dict().items():
            if name in stored:
                value.copy_(stored[name])
    return norm
