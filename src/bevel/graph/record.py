"""Record one ordinary forward pass, operator by operator.

A `TorchDispatchMode` sees every primitive operator with concrete shapes, whatever Python the
network runs to get there, so nothing has to be traced, scripted or exported. Tensors become
`Value`s; a `Value` that is a parameter or buffer knows its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from bevel.core.errors import FORWARD_FAULTS, ModelError, one_line
from bevel.core.modes import evaluating

ExampleInputs = Tensor | Sequence[Any]
"""A tensor, or the positional arguments of the network's forward."""


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor seen during the pass. `name` is set for parameters and buffers."""

    index: int
    shape: tuple[int, ...]
    name: str | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """One operator: tensors in its arguments and outputs are replaced by `Value`s."""

    function: torch._ops.OpOverload
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    outputs: tuple[Any, ...]
    module: str

    @property
    def name(self) -> str:
        """`aten.convolution`, without the overload."""
        return str(self.function.overloadpacket)

    @property
    def place(self) -> str:
        """For messages: operator and module."""
        return f"{self.name.removeprefix('aten.')} in {self.module or 'the network itself'}"

    def inputs(self) -> list[Value]:
        """All tensors among the arguments, in order."""
        leaves = tree_leaves((self.arguments, dict(self.keywords)))
        return [leaf for leaf in leaves if isinstance(leaf, Value)]


@dataclass
class Recording:
    """A forward pass: its calls in order, and the values that leave the network."""

    calls: list[Call] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)


def as_arguments(example_inputs: ExampleInputs) -> tuple[Any, ...]:
    """The positional arguments that `example_inputs` stands for."""
    return (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)


def tensor_names(net: nn.Module) -> dict[int, str]:
    """`id(tensor)` -> name of every parameter and buffer; a shared tensor has its first name."""
    names: dict[int, str] = {}
    for source in (net.named_parameters(), net.named_buffers()):
        for name, tensor in source:
            names.setdefault(id(tensor), name)
    return names


class _Recorder(TorchDispatchMode):
    """Turns the operators of a pass into `Call`s."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.recording = Recording()
        self.names = tensor_names(net)
        self.modules = {id(module): name for name, module in net.named_modules()}
        self.stack: list[str] = []
        # Weak keys: an activation may be freed during the pass, and its address used again.
        self.values: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.count = 0

    def value(self, leaf: Any) -> Any:
        """The `Value` of a tensor; anything else unchanged."""
        if not isinstance(leaf, Tensor):
            return leaf
        known = self.values.get(leaf)
        if known is None:
            known = Value(self.count, tuple(leaf.shape), self.names.get(id(leaf)))
            self.count += 1
            self.values[leaf] = known
        return known

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        arguments, keywords = tree_map(self.value, (args, kwargs))
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, tuple | list) else (result,)
        module = self.stack[-1] if self.stack else ""
        recorded = tuple(tree_map(self.value, tuple(outputs)))
        self.recording.calls.append(Call(func, tuple(arguments), keywords, recorded, module))
        return result

    def enter(self, module: nn.Module, _inputs: Any) -> None:
        self.stack.append(self.modules.get(id(module), ""))

    def leave(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self.stack.pop()


def record(net: nn.Module, example_inputs: ExampleInputs) -> Recording:
    """Run the network once in eval mode, without gradients, and return what it did.

    Raises:
        ModelError: the network cannot be called with these inputs.
    """
    recorder = _Recorder(net)
    before = register_module_forward_pre_hook(recorder.enter)
    after = register_module_forward_hook(recorder.leave, always_call=True)
    try:
        with evaluating(net), torch.no_grad(), recorder:
            result = net(*as_arguments(example_inputs))
    except FORWARD_FAULTS as error:
        place = recorder.recording.calls[-1].module if recorder.recording.calls else ""
        raise ModelError(
            f"the network cannot be run on inputs of shape {_shapes(example_inputs)}: "
            f"{one_line(error)} (after {place or 'the first operator'}); check the input shape"
        ) from error
    finally:
        before.remove()
        after.remove()
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    recorder.recording.outputs = [recorder.value(leaf) for leaf in leaves]
    return recorder.recording


def _shapes(example_inputs: ExampleInputs) -> str:
    tensors = [a for a in tree_leaves(as_arguments(example_inputs)) if isinstance(a, Tensor)]
    return ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors) or "nothing"
