"""What a surgery rule is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from bevel.core.errors import SurgeryError
from bevel.rewriting.fitting import Error
from bevel.rewriting.seen import Function, Node, Seen
from bevel.rewriting.surgeon import Surgeon

Place = Node | str
"""A call, or the name of a module that calls nothing."""


class Rule(Protocol):
    """A rule's module: one idea. `EXACT`: the network computes the same afterwards."""

    EXACT: bool

    def match(self, seen: Seen) -> Iterable[Place]:
        """Every place of the layer: the call that gives its result, or a module's name."""
        ...

    def check(self, seen: Seen, place: Any) -> str | None:
        """Why a place cannot be rewritten; None where it can."""
        ...

    def rewrite(self, surgeon: Surgeon, place: Any) -> Error | None:
        """Rewrite one place of the copy; the error that is left there, None where exact."""
        ...


Rewrite = Callable[[Surgeon, Node], Error | None]


@dataclass(frozen=True)
class FunctionRule:
    """A rule made by `rule`."""

    functions: tuple[Function, ...]
    EXACT: bool
    rewrite: Rewrite

    @property
    def __name__(self) -> str:
        """What it is called in reports."""
        return getattr(self.rewrite, "__name__", "rule")

    def match(self, seen: Seen) -> Iterable[Node]:
        """Every call of the functions."""
        return seen.calls(self.functions)

    def check(self, seen: Seen, place: Node) -> str | None:  # noqa: ARG002
        """Everything can be rewritten."""
        return None


def rule(*functions: Function, exact: bool = False) -> Callable[[Rewrite], FunctionRule]:
    """Make a surgery rule of a function that rewrites one call.

        @bevel.surgery_rule(torch.nn.functional.softplus)
        def softplus(surgeon, node):
            surgeon.divert(node, "relu")

        bevel.surgery(net, images, rules=["silu", softplus])

    Args:
        functions: the torch functions whose calls it rewrites.
        exact: whether the network computes the same afterwards, which is then proven.

    Raises:
        SurgeryError: no function is named.
    """
    if not functions:
        raise SurgeryError("name the torch functions whose calls the rule rewrites")
    return lambda rewrite: FunctionRule(functions, exact, rewrite)
