"""What rules look at: the functions that a network calls, in order, and the tensors between them.

One recorded pass shows `nn.SiLU`, `F.silu` and `x * torch.sigmoid(x)` alike: as calls of functions,
each with the module whose forward made it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bevel.graph.record import ExampleInputs, record
from bevel.graph.recording import Frame, Recording, Value, values_in

Ref = tuple[int, int]
"""A tensor: its `Value`'s index, and how often it had been overwritten in place."""

Function = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Node:
    """A call of a function.

    Attributes:
        frame: what was called, on what, in which module.
        number: how many calls came before it in the pass.
        inputs: tensors among its arguments, parameters included, in order.
        outputs: tensors that it returns.
        overwrites: whether it changes its first tensor in place.
    """

    frame: Frame
    number: int
    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]
    overwrites: bool

    @property
    def function(self) -> Function:
        """What is called."""
        return self.frame.function

    @property
    def module(self) -> str:
        """The module whose forward calls it, '' for the network itself."""
        return self.frame.module

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its first tensor result."""
        return next(values_in((self.frame.result,))).shape

    @property
    def place(self) -> str:
        """For people: module and function."""
        name = getattr(self.function, "__name__", str(self.function)).strip("_")
        return f"{self.module}: {name}" if self.module else name


class Seen:
    """A network's calls, and who makes and who reads each tensor.

    Args:
        net: the network.
        recording: a pass of it.
    """

    def __init__(self, net: nn.Module, recording: Recording) -> None:
        self.modules = dict(net.named_modules())
        held = Counter(id(p) for m in net.modules() for p in m.parameters(recurse=False))
        self._shared = {held_id for held_id, count in held.items() if count > 1}
        self.nodes: list[Node] = []
        self._makers: dict[Ref, Node] = {}
        self._readers: dict[Ref, list[Node]] = defaultdict(list)
        self._runs: dict[int, list[Node]] = defaultdict(list)
        version: dict[int, int] = defaultdict(int)
        for number, frame in enumerate(recording.frames):
            read = tuple(
                (value.index, version[value.index]) for value in values_in(frame.arguments)
            )
            calls = recording.calls[frame.calls]
            overwrites = any(call.function._schema.is_mutable for call in calls)
            made = [value.index for value in values_in((frame.result,))]
            if overwrites:
                for index in {index for index, _ in read} & set(made):
                    version[index] += 1
            outputs = tuple((index, version[index]) for index in made)
            node = Node(frame, number, read, outputs, overwrites)
            self.nodes.append(node)
            self._runs[frame.entry].append(node)
            if set(outputs) & set(read):  # it hands on what it got
                continue
            self._makers.update(dict.fromkeys(outputs, node))
            for ref in read:
                self._readers[ref].append(node)
        self.outputs = {(value.index, version[value.index]) for value in recording.outputs}

    @classmethod
    def of(cls, net: nn.Module, example_inputs: ExampleInputs) -> Seen:
        """Record the network.

        Raises:
            ModelError: it cannot be called with these inputs.
        """
        return cls(net, record(net, example_inputs))

    def calls(self, functions: Iterable[Function]) -> Iterator[Node]:
        """All calls of some functions."""
        wanted = set(functions)
        return (node for node in self.nodes if node.function in wanted)

    def maker(self, ref: Ref) -> Node | None:
        """The call that made a tensor; None for inputs, parameters and constants."""
        return self._makers.get(ref)

    def readers(self, ref: Ref) -> list[Node]:
        """The calls that read a tensor."""
        return self._readers.get(ref, [])

    def read_once(self, ref: Ref) -> bool:
        """Whether one call reads it and it does not leave the network."""
        return len(self.readers(ref)) == 1 and ref not in self.outputs

    def runs(self, module: str) -> int:
        """How often a module runs in one pass, counting runs with calls of its own."""
        return len({node.frame.entry for node in self.nodes if node.module == module})

    def are_whole(self, nodes: Iterable[Node]) -> bool:
        """Whether these calls are all that their module does, every time that it runs."""
        nodes = list(nodes)
        module = self.modules.get(nodes[0].module)
        if not nodes[0].module or module is None or any(True for _ in module.children()):
            return False
        wanted = [node.function for node in nodes]
        own = [run for run in self._runs.values() if run[0].module == nodes[0].module]
        return all([node.function for node in run] == wanted for run in own)

    def inside(self, module: str) -> list[Node]:
        """The calls of a module and of all that it holds."""
        return [n for n in self.nodes if n.module == module or n.module.startswith(f"{module}.")]

    def layer_before(self, *nodes: Node) -> nn.Module | None:
        """The layer with weights that makes the first call's first tensor, if these alone read it.

        Several calls may be one function, such as a gate and its product.
        """
        ref = nodes[0].inputs[0]
        maker = self.maker(ref)
        readers = {reader.number for reader in self.readers(ref)}
        if maker is None or readers != {node.number for node in nodes} or ref in self.outputs:
            return None
        return self.owner_of_weight(maker)

    def channel_axis(self, node: Node) -> int:
        """Where the channels of a call's first tensor are: 1 as in images, or last."""
        value = next(values_in(node.frame.arguments))
        if len(value.shape) == 3 or node.function is F.layer_norm:
            return len(value.shape) - 1
        maker = self.maker(node.inputs[0])
        last = maker is not None and maker.function in (F.linear, F.layer_norm)
        return len(value.shape) - 1 if last else 1

    def made(self) -> Iterator[Value]:
        """Every tensor that a call returns."""
        return (value for node in self.nodes for value in values_in((node.frame.result,)))

    def norm_behind(self, node: Node) -> Node | None:
        """The batch norm with running statistics that alone reads what a call makes."""
        ref = node.outputs[0] if node.outputs else None
        if ref is None or not self.read_once(ref):
            return None
        norm = self.readers(ref)[0]
        if norm.function is not F.batch_norm or self.runs(norm.module) != 1:
            return None
        mean = getattr(self.modules.get(norm.module), "running_mean", None)
        return norm if isinstance(mean, torch.Tensor) else None

    def owner_of_weight(self, node: Node) -> nn.Module | None:
        """The module whose own parameter `weight` a layer uses as it is, in its only run."""
        position = LAYERS.get(node.function)
        module = self.modules.get(node.module)
        if position is None or module is None or self.runs(node.module) != 1:
            return None
        used, own = node.frame.argument(position, "weight"), getattr(module, "weight", None)
        if not isinstance(used, Value) or not isinstance(own, nn.Parameter):
            return None
        is_own = used.name == f"{node.module}.weight" and id(own) not in self._shared
        return module if is_own else None


LAYERS: dict[Function, int] = {
    torch.conv1d: 1, torch.conv2d: 1, torch.conv3d: 1, F.linear: 1, F.batch_norm: 3,
}  # fmt: skip
"""Functions of layers whose channels have weights of their own -> position of the weight."""
