"""What a recorded forward pass is made of: values, the calls and frames they went through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False, slots=True)
class Value:
    """A tensor seen during the pass. `name` is set for parameters and buffers.

    `data` is the tensor itself where it may serve as an index: small, of integers or booleans, and
    computed from constants if the pass was run without its arithmetic.
    """

    index: int
    shape: tuple[int, ...]
    name: str | None = None
    data: Tensor | None = None
    dtype: torch.dtype = torch.float32


@dataclass(eq=False)
class Call:
    """One operator: tensors in its arguments and outputs are replaced by `Value`s.

    `inputs` are all tensors among the arguments, in order.
    """

    function: torch._ops.OpOverload
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Any, ...]
    module: str

    @property
    def name(self) -> str:
        """`aten.convolution`, without the overload."""
        return _operator(self.function)

    @property
    def place(self) -> str:
        """For messages: operator and module."""
        return f"{self.name.removeprefix('aten.')} in {self.module or 'the network itself'}"

    @property
    def output(self) -> Value:
        """The first output, of operators whose first output is a tensor."""
        first = self.outputs[0]
        if not isinstance(first, Value):
            raise TypeError(f"{self.name} gave {type(first).__name__}, expected a tensor")
        return first

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword, as the operator's schema has it."""
        if position < len(self.arguments):
            return self.arguments[position]
        return self.keywords.get(name, default)


@cache
def _operator(function: torch._ops.OpOverload) -> str:
    return str(function.overloadpacket)


def values_in(items: Iterable[Any]) -> Iterator[Value]:
    """The `Value`s among some items, lists and tuples of them included, in order."""
    for item in items:
        if isinstance(item, Value):
            yield item
        elif isinstance(item, list | tuple):
            yield from values_in(item)


@dataclass(eq=False)
class Frame:
    """A torch function that the network's own code called, and the operators it led to."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    """Positional arguments, then the values of the keyword arguments."""
    keywords: tuple[str, ...]
    """Names of the keyword arguments."""
    result: Any
    """What it returned, tensors replaced by `Value`s."""
    calls: slice
    module: str
    entry: int = 0
    """The number of the module's run that it belongs to: a module may run several times."""
    ordinal: int = 0
    """How many calls of the same function came before it in that run; -1 if it stands in for
    another call."""

    def keyword(self, name: str) -> Any:
        """A keyword argument, None where it was not given."""
        if name not in self.keywords:
            return None
        return self.arguments[self.keywords.index(name) - len(self.keywords)]

    def argument(self, position: int, name: str) -> Any:
        """An argument by position or keyword, None where it was not given."""
        given = len(self.arguments) - len(self.keywords)
        return self.arguments[position] if position < given else self.keyword(name)


@dataclass
class Recording:
    """A forward pass: its calls and frames in order, and the values that leave the network."""

    calls: list[Call] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
