"""Smooth activation functions to ReLU: what their rules have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bevel.rewriting.fitting import Error, by_channel, fit_relu, relative_error
from bevel.rewriting.seen import Function, Node, Seen
from bevel.rewriting.surgeon import Surgeon

PRODUCTS: tuple[Function, ...] = (
    torch.mul, torch.Tensor.mul, torch.Tensor.mul_, torch.Tensor.__mul__,
    torch.Tensor.__rmul__, torch.Tensor.__imul__,
)  # fmt: skip


def products(seen: Seen, gates: tuple[Function, ...]) -> list[Node]:
    """Calls that give x * gate(x), written by hand."""
    found = []
    for node in seen.calls(PRODUCTS):
        if len(node.inputs) == 2 and _gate(seen, node, gates) is not None:
            found.append(node)
    return found


def gate_of(seen: Seen, node: Node, gates: tuple[Function, ...]) -> Node:
    """The gate's call of one of `products`."""
    gate = _gate(seen, node, gates)
    assert gate is not None  # noqa: S101  # the caller found it
    return gate


def _gate(seen: Seen, node: Node, gates: tuple[Function, ...]) -> Node | None:
    for position in (0, 1):
        gate = seen.maker(node.inputs[position])
        x = node.inputs[1 - position]
        if gate is not None and gate.function in gates and gate.inputs[0] == x:
            return gate
    return None


def check(seen: Seen, node: Node, gate: Node | None = None) -> str | None:
    """Why a place cannot become a ReLU."""
    if gate is not None and (gate.module != node.module or not seen.read_once(gate.outputs[0])):
        return "something else reads the gate"
    return None


def rewrite(
    surgeon: Surgeon,
    node: Node,
    function: Callable[[Tensor], Tensor],
    gate: Node | None = None,
) -> Error:
    """Make a ReLU of a call, as close to the function as the layers around it allow.

    The layer before takes a scale and a shift per channel, the layers behind an offset: what the
    function has below zero, a ReLU does not.

    Args:
        surgeon: the hand of the rule.
        node: gives the function's result.
        function: what it computes.
        gate: for a product written by hand, the call of the gate.
    """
    seen = surgeon.seen
    position = 0 if gate is None else node.inputs.index(gate.inputs[0])
    x = by_channel(surgeon.samples[node.number][position])
    y = function(x)
    naive = fitted = relative_error(torch.relu(x), y)
    source = node if gate is None else gate
    alone = gate is None or {r.number for r in seen.readers(gate.inputs[0])} == {
        gate.number,
        node.number,
    }
    if surgeon.fit and alone and _layer(surgeon, source, node) is not None:
        readers = surgeon.readers(node.outputs[0])
        bend = fit_relu(x, y, offset=readers is not None)
        fitted = relative_error(bend(x), y)
        surgeon.scale_output(source, bend.scale, bend.shift)
        if readers is not None:
            surgeon.shift_input(readers, bend.offset)
    if gate is not None:
        surgeon.divert(gate, "first")
        surgeon.divert(node, "relu" if position == 0 else "relu of second")
    elif seen.are_whole([node]):
        if not _is_relu(surgeon, node.module):  # a module that runs several times
            surgeon.replace(node.module, "ReLU", inplace=node.overwrites)
    else:
        surgeon.divert(node, "relu")
    return Error(naive, fitted)


def _is_relu(surgeon: Surgeon, module: str) -> bool:
    return isinstance(surgeon.net.get_submodule(module), torch.nn.ReLU)


def _layer(surgeon: Surgeon, source: Node, node: Node) -> torch.nn.Module | None:
    """The layer before, which only the function reads; a gate and its product are one function."""
    if source is node:
        return surgeon.layer(node)
    ref = source.inputs[0]
    maker = surgeon.seen.maker(ref)
    if maker is None or ref in surgeon.seen.outputs:
        return None
    return surgeon.seen.owner_of_weight(maker)
