"""What a surgery rule is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from bevel.rewriting.fitting import Error
from bevel.rewriting.seen import Node, Seen
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
