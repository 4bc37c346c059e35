"""Which batch norms may be folded into the layer before them.

torchao (0.18) folds every batch norm that reads a convolution or linear layer, also where others
read that layer, or share its weights: what they get is then scaled too. A DenseNet's stem and each
block of a pre-activation ResNet are such layers. So those batch norms are kept apart from their
layer by an operator that does nothing, for as long as torchao folds, and are hidden from its search
for those that were trained as quantized.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten

BATCH_NORM = aten.batch_norm.default

APART = aten.alias.default


def keep_apart(module: GraphModule) -> int:
    """Put an operator before each batch norm that must not be folded into its layer, in place.

    Returns:
        How many there are.
    """
    norms = [node for node in module.graph.nodes if node.target is BATCH_NORM]
    sharing: dict[Any, set[tuple[Any, ...]]] = defaultdict(set)
    for node in module.graph.nodes:
        weight = _weight(node)
        if weight is not None:
            sharing[weight] |= {_behind(user) for user in node.users}
    held = 0
    for norm in norms:
        layer = _argument(norm, 0)
        weight = None if layer is None else _weight(layer)
        if layer is None or weight is None:
            continue  # nothing that it could be folded into
        if sharing[weight] == {_behind(norm)} and len(layer.users) == 1:
            continue
        with module.graph.inserting_before(norm):
            apart = module.graph.call_function(APART, (layer,))
        apart.meta = dict(layer.meta)
        norm.replace_input_with(layer, apart)
        held += 1
    if held:
        module.recompile()
    return held


def rejoin(module: GraphModule) -> None:
    """Undo `keep_apart`, in place."""
    nodes = [node for node in module.graph.nodes if node.target is APART]
    for node in nodes:
        held = _argument(node, 0)
        assert held is not None  # noqa: S101  # `keep_apart`
        node.replace_all_uses_with(held)
        module.graph.erase_node(node)
    if nodes:
        module.recompile()


def converted(prepared: GraphModule, convert: Callable[[GraphModule], GraphModule]) -> GraphModule:
    """What `convert` makes of a network that was not trained as quantized.

    Where it sees a batch norm, torchao's looks for those of quantization-aware training. Tracing
    the patterns of them takes ten times as long as all the rest, and none can be there.
    """
    _retarget(prepared, BATCH_NORM, _batch_norm)
    return _retarget(convert(prepared), _batch_norm, BATCH_NORM)


def _batch_norm(*given: Any) -> Any:
    """Batch norm, by a name that torchao does not know."""
    return BATCH_NORM(*given)


def _retarget(module: GraphModule, old: Any, new: Any) -> GraphModule:
    nodes = [node for node in module.graph.nodes if node.target is old]
    for node in nodes:
        node.target = new
    if nodes:
        module.recompile()
    return module


def _weight(node: Node) -> Any:
    """Which stored tensor is the weight of a layer; None for other operators."""
    weight = _argument(node, 1) if node.op == "call_function" else None
    if weight is None or weight.op != "get_attr" or node.target is BATCH_NORM:
        return None
    return weight.target


def _argument(node: Node, position: int) -> Node | None:
    """An argument that is computed or stored; None for numbers, and where there is none."""
    found = node.args[position] if position < len(node.args) else None
    return found if isinstance(found, Node) else None


def _behind(node: Node) -> tuple[Any, ...]:
    """What a reader of a layer does with it: the same for a batch norm with the same parameters."""
    if node.target is not BATCH_NORM:
        return (node,)
    stored = (each.target if isinstance(each, Node) else each for each in node.args[1:])
    return (BATCH_NORM, *stored)
