"""Activation functions to ReLU: what their rules have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bevel.graph.recording import Value
from bevel.models.fading import FUNCTIONS, Fading
from bevel.rewriting.fitting import Error, by_channel, fit_relu, relative_error
from bevel.rewriting.seen import Function, Node, Seen
from bevel.rewriting.surgeon import Surgeon

PRODUCTS: tuple[Function, ...] = (
    torch.mul, torch.Tensor.mul, torch.Tensor.mul_, torch.Tensor.__mul__,
    torch.Tensor.__rmul__, torch.Tensor.__imul__,
)  # fmt: skip


@dataclass(frozen=True)
class ToRelu:
    """The rule that an activation function becomes a ReLU, as close as the layers around it allow.

    The layer before takes a scale and a shift per channel, the layers behind an offset: what the
    function has below zero, a ReLU does not. Or it becomes something that training turns into a
    ReLU (`models.fading`), if that is asked for; then nothing has to be fitted.

    Attributes:
        function: what is replaced, as modules and forwards call it.
        gates: functions g for which x * g(x), written by hand, is the same.
        also: other names of the function, with arguments of their own.
    """

    function: Callable[..., Tensor]
    gates: tuple[Function, ...] = ()
    also: tuple[Function, ...] = ()

    def match(self, seen: Seen) -> Iterator[Node]:
        """Calls of the function, and products with its gate."""
        yield from seen.calls([self.function, *self.also])
        for node in seen.calls(PRODUCTS):
            if len(node.inputs) == 2 and self._gate(seen, node) is not None:
                yield node

    def check(self, seen: Seen, node: Node) -> str | None:
        """Why a place cannot be rewritten."""
        gate = self._gate(seen, node)
        if gate is not None and (gate.module != node.module or not seen.read_once(gate.outputs[0])):
            return "something else reads the gate"
        return None

    def rewrite(self, surgeon: Surgeon, node: Node) -> Error:
        """Make it a ReLU."""
        seen, gate = surgeon.seen, self._gate(surgeon.seen, node)
        position = 0 if gate is None else node.inputs.index(gate.inputs[0])
        x = by_channel(surgeon.samples[node.number][position])
        y = self._values(x, node, gate, surgeon.net)
        naive = fitted = relative_error(torch.relu(x), y)
        name = self.function.__name__
        if surgeon.progressive and name in FUNCTIONS and torch.equal(FUNCTIONS[name](x), y):
            self._fade(surgeon, node, gate, position)
            return Error(naive, 0.0)
        calls = (node,) if gate is None else (gate, node)
        if surgeon.fit and seen.layer_before(*calls) is not None:
            readers = surgeon.readers(node.outputs[0])
            bend = fit_relu(x, y, offset=readers is not None)
            fitted = relative_error(bend(x), y)
            surgeon.scale_output(calls[0], bend.scale, bend.shift)
            if readers is not None:
                surgeon.shift_input(readers, bend.offset)
        if gate is not None:
            surgeon.divert(gate, "first")
            surgeon.divert(node, "relu" if position == 0 else "relu of second")
        elif not seen.are_whole([node]):
            surgeon.divert(node, "relu")
        elif not isinstance(surgeon.net.get_submodule(node.module), nn.ReLU):
            # It is one already where a module runs several times.
            surgeon.replace(node.module, "ReLU", inplace=node.overwrites)
        return Error(naive, fitted)

    def _fade(self, surgeon: Surgeon, node: Node, gate: Node | None, position: int) -> None:
        """Make it what turns into a ReLU later."""
        name, seen = self.function.__name__, surgeon.seen
        if gate is None and seen.are_whole([node]):
            if not isinstance(surgeon.net.get_submodule(node.module), Fading):
                surgeon.replace(node.module, "Fading", function=name)
            return
        owner = surgeon.net.get_submodule(node.module)
        child = f"fading_{sum(isinstance(each, Fading) for each in owner.children())}"
        surgeon.replace(f"{node.module}.{child}".lstrip("."), "Fading", function=name)
        if gate is not None:
            surgeon.divert(gate, "first")
        surgeon.divert(node, f"module:{child}" if position == 0 else f"module of second:{child}")

    def _gate(self, seen: Seen, node: Node) -> Node | None:
        """The call of the gate where the node is a product written by hand."""
        if node.function in (self.function, *self.also):
            return None
        for position in (0, 1):
            gate = seen.maker(node.inputs[position])
            x = node.inputs[1 - position]
            if gate is not None and gate.function in self.gates and gate.inputs[0] == x:
                return gate
        return None

    def _values(self, x: Tensor, node: Node, gate: Node | None, net: nn.Module) -> Tensor:
        """The function of (channels, samples), with the settings that this place calls it with."""
        if gate is not None:
            return self.function(x)
        frame = node.frame
        given: list[Any] = [
            net.get_parameter(argument.name or "").detach()
            if isinstance(argument, Value)
            else argument
            for argument in frame.arguments[1 : len(frame.arguments) - len(frame.keywords)]
        ]
        named = {key: frame.keyword(key) for key in frame.keywords if key != "inplace"}
        images = x.clone()[None]  # it may be told to overwrite
        result: Tensor = node.function(images, *given, **named)
        return result[0]
