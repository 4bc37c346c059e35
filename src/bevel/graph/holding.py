"""Take back whatever a forward pass leaves on its modules, such as a cache."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from bevel.graph.naming import named_modules

_CONTAINERS = {list, deque, set, dict, OrderedDict, defaultdict}

_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_kwargs")))


class Held:
    """The attributes that every module of a network holds now, contents included.

    Lists, dicts, sets and queues are kept one level deep; the elements of tensors are not.
    """

    def __init__(self, net: nn.Module) -> None:
        self._modules = [_Saved(module) for module in named_modules(net).values()]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Afterwards every module holds them again."""
        try:
            yield
        finally:
            for saved in self._modules:
                saved.restore()


def holding(net: nn.Module) -> AbstractContextManager[None]:
    """Afterwards every module holds the attributes that it holds now."""
    return Held(net).held()


class _Saved:
    """What a module holds."""

    __slots__ = ("attributes", "contents", "module")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(vars(module))
        self.contents = [
            (value, value.copy())
            for name, value in self.attributes.items()
            if type(value) in _CONTAINERS and name not in _HOOKS
        ]

    def restore(self) -> None:
        """Put everything back."""
        attributes = vars(self.module)
        attributes.clear()
        attributes.update(self.attributes)
        for container, content in self.contents:
            if not container and not content:
                continue
            container.clear()
            if isinstance(container, list | deque):
                container.extend(content)
            else:
                container.update(content)
