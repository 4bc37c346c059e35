"""Activation functions, and others of one tensor, that overwrite it -> out of place; exact.

Some exporters and hooks want every tensor to stay what it was; so do trainings whose gradients need
an overwritten one. Where a network goes on with what was overwritten instead of with the result,
the proof of the exact rules says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from bevel.rewriting.calls import OUT_OF_PLACE, plain_form
from bevel.rewriting.rule import Place
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = True


def match(seen: Seen) -> Iterator[Place]:
    """Modules that are set to do so, and calls in other forwards."""
    for name, module in seen.modules.items():
        if _is_set(module):
            yield name
    for node in seen.nodes:
        if node.overwrites and _is_activation(node) and not _is_set(seen.modules[node.module]):
            yield node


def check(seen: Seen, place: Place) -> str | None:  # noqa: ARG001
    """Everything can be rewritten."""
    return None


def rewrite(surgeon: Surgeon, place: Place) -> None:
    """Keep what it gets."""
    if isinstance(place, Node):
        surgeon.divert(place, OUT_OF_PLACE)
    else:
        surgeon.out_of_place(place)


def _is_set(module: nn.Module) -> bool:
    return getattr(module, "inplace", False) is True and not isinstance(module, _DropoutNd)


def _is_activation(node: Node) -> bool:
    """Whether it is one tensor's function, with a form that leaves the tensor alone."""
    function = node.function
    if getattr(function, "__module__", None) == "torch.nn.functional":
        return "inplace" in inspect.signature(function).parameters
    return len(node.inputs) == 1 and plain_form(function) is not None
