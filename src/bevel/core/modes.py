"""A network's training and evaluation modes. Knows modules by what they offer, so no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class _Moded(Protocol):
    training: bool


class _Network(Protocol):
    def modules(self) -> Iterator[_Moded]: ...

    def eval(self) -> object: ...


@contextmanager
def evaluating(net: _Network) -> Iterator[None]:
    """Eval mode inside the block; afterwards every module is in the mode it had, each its own."""
    modes = [(module, module.training) for module in net.modules()]
    if any(training for _, training in modes):  # else there is nothing to do
        net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            if module.training != training:  # torch takes its time over setting one
                module.training = training
