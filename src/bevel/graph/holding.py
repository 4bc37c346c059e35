"""Take back whatever a forward pass leaves on its modules, such as a cache."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_CONTAINERS = {list, deque, set, dict, OrderedDict, defaultdict}

_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_kwargs")))


@contextmanager
def holding(net: nn.Module) -> Iterator[None]:
    """Afterwards every module holds the attributes that it held before, contents included.

    Lists, dicts, sets and queues are put back one level deep; the elements of tensors are not.
    """
    saved = [_Saved(module) for module in net.modules()]
    try:
        yield
    finally:
        for state in saved:
            state.restore()


class _Saved:
    """What a module holds."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(vars(module))
        self.contents = [
            (value, copy.copy(value))
            for name, value in self.attributes.items()
            if type(value) in _CONTAINERS and name not in _HOOKS
        ]

    def restore(self) -> None:
        """Put everything back."""
        attributes = vars(self.module)
        attributes.clear()
        attributes.update(self.attributes)
        for container, content in self.contents:
            container.clear()
            if isinstance(container, list | deque):
                container.extend(content)
            else:
                container.update(content)
