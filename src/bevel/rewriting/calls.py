"""Functions that a module's own forward calls, replaced without touching its source.

The module stays what it was, with the same parameters under the same names; only its class becomes
a subclass whose forward is run with some calls diverted. A call is named by its function and by how
many calls of that function come before it in the same forward, children's forwards not counted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from bevel.graph.record import standing_in


def name_of(function: Callable[..., Any]) -> str:
    """A function's name as text: `torch.nn.functional.silu`."""
    return str(resolve_name(function))


def function_named(name: str) -> Any:
    """The function that `name_of` calls so; None where torch has none of that name."""
    found: Any = torch if name.startswith("torch.") else None
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found


def first(x: Any, *_rest: Any, **_named: Any) -> Any:
    """What was given first, unchanged."""
    return x


def second(_first: Any, y: Any, *_rest: Any, **_named: Any) -> Any:
    """What was given second, unchanged."""
    return y


def relu(x: Any, *_rest: Any, inplace: bool = False, **_named: Any) -> Any:
    """max(x, 0) of what was given first."""
    return F.relu(x, inplace=inplace)


def relu_of_second(_first: Any, y: Any, *_rest: Any, **_named: Any) -> Any:
    """max(y, 0) of what was given second."""
    return F.relu(y)


def first_of_them(them: Any, *_rest: Any, **_named: Any) -> Any:
    """The first of several tensors."""
    return them[0]


def clip(x: Any, *_rest: Any, inplace: bool = False, **_named: Any) -> Any:
    """x between 0 and 1."""
    return F.hardtanh(x, 0.0, 1.0, inplace)


def global_average(x: Any, *_rest: Any, keepdim: bool = False, **_named: Any) -> Any:
    """The mean of each channel of (N, C, H, W): (N, C), or (N, C, 1, 1)."""
    mean = F.adaptive_avg_pool2d(x, 1)
    return mean if keepdim else mean.flatten(1)


def global_average_kept(x: Any, *_rest: Any, **_named: Any) -> Any:
    """The mean of each channel of (N, C, H, W): (N, C, 1, 1)."""
    return F.adaptive_avg_pool2d(x, 1)


def interpolate_by_factors(x: Any, size: Any, *_rest: Any, mode: str = "nearest", **_: Any) -> Any:
    """`interpolate` to a size that is a multiple of the input's, by these multiples."""
    sizes = (size, size) if isinstance(size, int) else size
    factors = [float(int(n) // int(m)) for n, m in zip(sizes, x.shape[2:], strict=True)]
    return F.interpolate(x, scale_factor=factors, mode=mode)


def plain_form(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function that does what one with a trailing underscore does, but leaves its tensor."""
    name = str(getattr(function, "__name__", ""))
    plain = name.removesuffix("_")
    if plain == name or name.startswith("__"):
        return None
    found: Any = getattr(torch, plain, None) or getattr(F, plain, None)
    return found if callable(found) else None


def out_of_place(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """What a function that overwrites its tensor gives, as a tensor of its own."""
    plain = plain_form(function)
    if plain is not None:
        return plain(*given, **named)
    bound = inspect.signature(function).bind(*given, **named)
    bound.arguments["inplace"] = False
    return function(*bound.args, **bound.kwargs)


DIVERSIONS: dict[str, Callable[..., Any]] = {
    "clip": clip,
    "first": first,
    "first of them": first_of_them,
    "global average": global_average,
    "global average kept": global_average_kept,
    "interpolate by factors": interpolate_by_factors,
    "second": second,
    "relu": relu,
    "relu of second": relu_of_second,
}
"""What a call can become; besides, `module:NAME` is a child's forward of what was given first, and
`module of second:NAME` of what was given second; `out of place` depends on the function."""

OUT_OF_PLACE = "out of place"


class Depth:
    """How many children's forwards are running inside a module's own."""

    def __init__(self) -> None:
        self.value = 0

    def enter(self, *_given: Any) -> None:
        """A child's forward begins."""
        self.value += 1

    def leave(self, *_given: Any) -> None:
        """It has ended, well or not."""
        self.value -= 1


class _Diverting(TorchFunctionMode):
    def __init__(self, module: Diverted) -> None:
        super().__init__()
        self.module, self.depth = module, module.children_running
        self.names = {function_named(name): name for name, _ in module.diverted_calls}
        self.counts = dict.fromkeys(self.names.values(), 0)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.depth.value == 0 and func in self.names:
            name = self.names[func]
            ordinal = self.counts[name]
            self.counts[name] = ordinal + 1
            becomes = self.module.diverted_calls.get((name, ordinal))
            if becomes is not None:
                with standing_in(func):
                    return self._instead(becomes, func)(*args, **kwargs)
        return func(*args, **kwargs)

    def _instead(self, becomes: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if becomes == OUT_OF_PLACE:
            return partial(out_of_place, function)
        kind, _, child = becomes.partition(":")
        if not child:
            return DIVERSIONS[becomes]
        position = 0 if kind == "module" else 1
        return lambda *given, **_named: getattr(self.module, child)(given[position])


class Diverted:
    """Mixed into the class of a module some of whose calls are replaced."""

    diverted_calls: dict[tuple[str, int], str]
    children_running: Depth

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with some calls replaced."""
        self.children_running.value = 0
        module: Any = self
        for child in module.children():
            watch(module, child)
        with _Diverting(self):
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # the module's

    def __reduce_ex__(self, _protocol: Any) -> Any:
        """By the class that it was: the subclass has no name that could be found again."""
        return _blank, (type(self).__mro__[2],), self.__dict__


def divert(module: nn.Module, function: str, ordinal: int, becomes: str) -> None:
    """Replace a call in a module's own forward, in place.

    A child that is put there later has to be shown to it (`watch`).

    Args:
        module: whose forward makes the call.
        function: its name (`name_of`).
        ordinal: how many calls of it come before in the same forward.
        becomes: see `DIVERSIONS`.
    """
    if not isinstance(module, Diverted):
        module.__class__ = _diverted(type(module))
        assert isinstance(module, Diverted)  # noqa: S101  # its class is one now
        module.diverted_calls = {}
        module.children_running = Depth()
        for child in module.children():
            watch(module, child)
    module.diverted_calls[function, ordinal] = becomes


def watch(module: nn.Module, child: nn.Module) -> None:
    """Let a diverted module know when a child's forward runs, whose calls are not its own.

    Once is enough; a child may have been put there by somebody who does not know of this.
    """
    if not isinstance(module, Diverted):
        return
    running = module.children_running
    if not any(getattr(h, "__self__", None) is running for h in child._forward_pre_hooks.values()):
        child.register_forward_pre_hook(running.enter)
        child.register_forward_hook(running.leave, always_call=True)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _diverted(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass, made once per class."""
    if kind not in _CLASSES:
        name = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        _CLASSES[kind] = type(kind.__name__, (Diverted, kind), name)
    return _CLASSES[kind]


def _blank(kind: type[nn.Module]) -> nn.Module:
    subclass = _diverted(kind)
    return subclass.__new__(subclass)
